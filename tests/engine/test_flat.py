"""The tensors of a run are views of a few buffers, and stay what they were to everybody else."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.engine.test_step import IMAGES, TARGETS, make_step, run
from yolov9_fast.engine.clock import PhaseClock
from yolov9_fast.engine.optimizer import build_optimizer
from yolov9_fast.engine.step import PHASES, TrainStep
from yolov9_fast.errors import UserError
from yolov9_fast.losses import DetectionLoss
from yolov9_fast.models import DetectionModel, create_model


@pytest.fixture
def model(tiny_graph: Path) -> DetectionModel:
    torch.manual_seed(0)
    return create_model(tiny_graph, 3, class_tower=8)


def storages(tensors: list[Tensor]) -> int:
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors})


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_tensors_keep_identity_value_and_strides_and_lie_in_few_buffers(
    model: DetectionModel, memory_format: torch.memory_format
) -> None:
    nn.Module.to(model, memory_format=memory_format)  # type: ignore[call-overload]
    before = dict(model.state_dict(keep_vars=True))
    values = {name: (value.detach().clone(), value.stride()) for name, value in before.items()}
    state = make_step(model, clip=0.0).state
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is before[name]
        assert torch.equal(value, values[name][0])
        assert value.stride() == values[name][1]
        assert value.data_ptr() % 64 == 0 or value.numel() == 0
    for one in (model, state.ema.model):
        assert storages(list(one.state_dict().values())) == 3  # trained; statistics and fixed weights; counts
    run(make_step(model, clip=0.0), update=True)  # laid out again


def test_running_statistics_have_version_counters_of_their_own(model: DetectionModel) -> None:
    make_step(model, clip=0.0)
    first, second = [b for b in model.buffers() if b.is_floating_point()][:2]
    version = second._version
    first.add_(1)
    assert second._version == version


def steps_of_torch(model: DetectionModel, frozen: set[str], updates: int) -> DetectionModel:
    """Plain SGD; parameters named by `frozen` have no gradient in the second update."""
    optimizer = build_optimizer(model, "sgd", lr=0.1, momentum=0.9, weight_decay=1e-3)
    for number in range(updates):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(number != 1 or name not in frozen)
        DetectionLoss(3)(model(IMAGES.float() / 255), TARGETS, 64).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_a_parameter_without_gradient_is_left_as_torch_leaves_it(model: DetectionModel) -> None:
    """Neither decay nor momentum moves it, and its average goes on; later it is trained again."""
    plain = copy.deepcopy(model)
    frozen = {name for name, _ in model.named_parameters() if name.startswith("model.0.")}
    assert frozen
    step = make_step(model, clip=0.0)
    for number in range(3):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(number != 1 or name not in frozen)
        before = {name: model.state_dict()[name].clone() for name in frozen}
        averages = {name: step.state.ema.model.state_dict()[name].clone() for name in frozen}
        run(step, update=True)
        if number == 1:
            weight = step.state.ema.weight().float()
            for name in frozen:
                assert torch.equal(model.state_dict()[name], before[name])
                expected = torch.lerp(averages[name], before[name], weight)
                assert torch.equal(step.state.ema.model.state_dict()[name], expected)
    for ours, theirs in zip(
        model.state_dict().values(), steps_of_torch(plain, frozen, 3).state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_parameter_that_a_callback_adds_to_the_optimiser_is_trained(model: DetectionModel) -> None:
    late = dict(model.named_parameters())["model.0.conv.weight"]
    late.requires_grad_(False)
    step = make_step(model, clip=0.0)
    before = late.clone()
    run(step, update=True)
    assert torch.equal(late, before)
    momenta = {id(p): state["momentum_buffer"].clone() for p, state in step.state.optimizer.state.items()}
    late.requires_grad_(True)
    step.state.optimizer.add_param_group({"params": [late], "lr": 0.1, "weight_decay": 0.0})
    step._prepare(update=True)
    for parameter, state in step.state.optimizer.state.items():
        assert torch.equal(state["momentum_buffer"], momenta.get(id(parameter), torch.zeros_like(parameter)))
    run(step, update=True)
    assert not torch.equal(late, before)


def test_gradients_that_a_callback_changes_between_batches_are_used(model: DetectionModel) -> None:
    parameters = list(model.parameters())
    results = []
    for change in ("replace", "in place", "none"):
        step = make_step(copy.deepcopy(model), clip=0.0)
        own = list(step.state.model.parameters())
        run(step)
        if change == "replace":
            own[0].grad = own[0].grad * 2  # type: ignore[operator]
            own[1].grad = None
        elif change == "in place":
            own[0].grad.mul_(2)  # type: ignore[union-attr]
            own[1].grad.zero_()  # type: ignore[union-attr]
        run(step, update=True)
        results.append([own[0].clone(), own[1].clone()])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not torch.equal(results[0][0], results[2][0])
    assert not torch.equal(results[0][1], results[2][1])
    assert len(parameters) > 2


def test_a_tensor_with_memory_of_its_own_is_taken_back(model: DetectionModel) -> None:
    step = make_step(model, clip=0.0)
    weight = next(model.parameters())
    weight.data = torch.full_like(weight, 0.5)
    step.state.flat.refresh()
    assert weight.untyped_storage().data_ptr() == step.state.flat.parameters.untyped_storage().data_ptr()
    assert torch.equal(weight, torch.full_like(weight, 0.5))


def test_momenta_that_differ_between_groups_are_refused(model: DetectionModel) -> None:
    step = make_step(model, clip=0.0)
    step.state.optimizer.param_groups[1]["momentum"] = 0.5
    with pytest.raises(UserError, match=r"expected one momentum for all groups, got 0.9, 0.5, 0.9"):
        run(step, update=True)


def test_other_optimisers_and_dtypes_are_refused(model: DetectionModel) -> None:
    step = make_step(model, clip=0.0)
    step.state.optimizer = torch.optim.RMSprop(model.parameters())
    with pytest.raises(UserError, match="expected torch's SGD, Adam or AdamW, got RMSprop"):
        step.state.flatten()
    with pytest.raises(UserError, match="expected parameters of float32"):
        make_step(model.double(), clip=0.0)


@pytest.mark.parametrize("objects", [0, 1, 7, 8, 9, 40])
def test_padding_of_targets_changes_nothing(model: DetectionModel, objects: int) -> None:
    """The shapes of a step are few; its results are those of exactly padded targets."""
    generator = torch.Generator().manual_seed(objects)
    rows = torch.cat(
        (
            torch.zeros(objects, 1),
            torch.randint(3, (objects, 1), generator=generator),
            torch.rand(objects, 2, generator=generator),
            torch.rand(objects, 2, generator=generator) * 0.5 + 0.05,
        ),
        1,
    )
    results = []
    for exact in (False, True):
        step = make_step(copy.deepcopy(model), clip=10.0)
        if exact:
            step.criterion.max_objects = objects
        loss = step(IMAGES, rows, size=None, update=True, clock=PhaseClock(*PHASES)).loss
        results.append([loss, *step.state.model.state_dict().values()])
        [shape] = step._targets
        assert shape == (2, objects if exact else {0: 8, 1: 8, 7: 8, 8: 8, 9: 16, 40: 64}[objects])
    assert all(torch.equal(padded, own) for padded, own in zip(*results, strict=True))


def test_what_stays_keeps_its_address(model: DetectionModel) -> None:
    step = make_step(model, clip=10.0)
    run(step, update=True)
    before = addresses(step)
    for update in (False, True, True):
        run(step, update=update)
    assert addresses(step) == before


def addresses(step: TrainStep) -> list[int]:
    """Of every tensor that lives as long as the run."""
    state, flat = step.state, step.state.flat
    tensors = [*state.model.state_dict().values(), *state.ema.model.state_dict().values()]
    tensors += [value for one in state.optimizer.state.values() for value in one.values()]
    tensors += [flat.parameters, flat.gradients, flat.averages, *flat.moments, flat._numbers, flat._rates, flat._steps]
    tensors += [state.ema.updates, state.scale.value, step.totals, step.skipped]
    tensors += [*step._images.values(), *(tensor for one in step._targets.values() for tensor in one[:3])]
    return [tensor.data_ptr() for tensor in tensors]
