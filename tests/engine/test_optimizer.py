"""Parameter groups, learning rates and warm-up are the published ones."""

from __future__ import annotations

import pytest
import torch

from yolov9_fast.engine.optimizer import Schedule, accumulation, build_optimizer, lr_factor, parameter_groups
from yolov9_fast.errors import UserError
from yolov9_fast.models import create_model


def test_gelan_c_has_the_published_numbers_of_parameters_in_its_groups() -> None:
    with torch.device("meta"):
        model = create_model("gelan-c")
    biases, weights, norms = parameter_groups(model)
    # The frozen DFL weight is the 161st published one; it is never stepped here.
    assert (len(biases), len(weights), len(norms)) == (160, 160, 154)


def test_only_convolution_weights_decay() -> None:
    model = create_model("gelan-t", 1)
    optimizer = build_optimizer(model, "sgd", lr=0.01, momentum=0.9, weight_decay=5e-4)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 5e-4, 0.0]
    assert all(p.dim() == 4 for p in optimizer.param_groups[1]["params"])


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_optimizers_by_name(name: str, kind: type) -> None:
    assert type(build_optimizer(create_model("gelan-t", 1), name, lr=0.1, momentum=0.9, weight_decay=0)) is kind


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(UserError, match="expected sgd, adam or adamw"):
        build_optimizer(create_model("gelan-t", 1), "lion", lr=0.1, momentum=0.9, weight_decay=0)


def test_the_linear_schedule_ends_one_step_above_its_final_factor() -> None:
    factor = lr_factor("linear", 500, 0.01)
    assert factor(0) == 1.0
    assert factor(499) == pytest.approx(0.01198)


def test_the_cosine_schedule_descends_from_one_to_the_final_factor() -> None:
    factor = lr_factor("cosine", 10, 0.1)
    assert [factor(0), factor(5), factor(10)] == pytest.approx([1.0, 0.55, 0.1])


def _schedule(**changes: object) -> Schedule:
    options: dict[str, object] = {
        "base_lr": 0.01,
        "momentum": 0.937,
        "factor": lr_factor("linear", 100, 0.01),
        "warmup_iterations": 100,
        "warmup_bias_lr": 0.1,
        "warmup_momentum": 0.8,
        "accumulate": 4,
    }
    return Schedule(**{**options, **changes})  # type: ignore[arg-type]


def test_warm_up_lowers_the_biases_and_raises_the_others() -> None:
    optimizer = build_optimizer(create_model("gelan-t", 1), "sgd", lr=0.01, momentum=0.937, weight_decay=0)
    schedule = _schedule()
    assert schedule.apply(optimizer, 0, 0) == 1
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1, 0.0, 0.0])
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.8)
    assert schedule.apply(optimizer, 50, 0) == 2
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.055, 0.005, 0.005])
    assert schedule.apply(optimizer, 101, 10) == 4
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.01 * (0.9 * 0.99 + 0.01)] * 3)
    assert optimizer.param_groups[2]["momentum"] == pytest.approx(0.937)


def test_without_warm_up_the_first_iteration_has_the_full_rate() -> None:
    optimizer = build_optimizer(create_model("gelan-t", 1), "adamw", lr=0.01, momentum=0.9, weight_decay=0)
    assert _schedule(warmup_iterations=0).apply(optimizer, 0, 0) == 4
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.01] * 3)


@pytest.mark.parametrize(("batch", "steps"), [(8, 8), (16, 4), (48, 1), (64, 1), (128, 1), (1, 64)])
def test_gradients_accumulate_to_about_64_images(batch: int, steps: int) -> None:
    assert accumulation(batch) == steps
