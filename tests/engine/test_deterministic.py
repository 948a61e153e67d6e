"""`deterministic`: the settings, what gives them back, what is refused, and two runs with the same bits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from yolov9_fast.cli.main import main
from yolov9_fast.engine import Callback, Predictor, Trainer
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.engine.device import computing_on, prepare_determinism
from yolov9_fast.errors import UserError
from yolov9_fast.models import create_model

ROOT = Path(__file__).parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)
VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
Settings = tuple[bool, bool, bool]


def settings() -> Settings:
    """Deterministic algorithms, cuDNN's deterministic ones, cuDNN's timing."""
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


@pytest.mark.parametrize("fixed_sizes", [None, False, True])
def test_settings_hold_in_the_block_and_are_given_back(fixed_sizes: bool | None) -> None:
    before = settings()
    with computing_on(CPU, fixed_sizes=fixed_sizes):
        assert settings() == (False, False, fixed_sizes or False)
        with computing_on(CPU, fixed_sizes=fixed_sizes, deterministic=True):
            assert settings() == (True, True, False)
            with computing_on(CPU, fixed_sizes=True):
                assert settings() == (True, True, False), "an inner block asks for no determinism and leaves it"
    assert settings() == before
    with pytest.raises(KeyError), computing_on(CPU, deterministic=True):
        raise KeyError
    assert settings() == before


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with computing_on(CPU, deterministic=True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    with computing_on(CPU):
        assert torch.backends.cudnn.benchmark


def test_cublas_gets_its_variable_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    started = False
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    prepare_determinism(CPU)
    assert VARIABLE not in os.environ
    prepare_determinism(GPU)
    assert os.environ[VARIABLE] == ":4096:8"
    started = True
    monkeypatch.setenv(VARIABLE, ":16:8")
    prepare_determinism(GPU)
    assert os.environ[VARIABLE] == ":16:8"
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(UserError, match=rf"deterministic: expected {VARIABLE}=:4096:8 before the first use of CUDA"):
        prepare_determinism(GPU)


def test_an_operation_without_a_deterministic_form_is_refused_in_one_line() -> None:
    """As torch words it on a GPU; on the CPU `put_` has no such form."""
    x = torch.zeros(2)
    with pytest.raises(UserError) as caught, computing_on(CPU, deterministic=True):
        x.put_(torch.tensor([0, 0]), torch.ones(2))
    assert str(caught.value) == "deterministic: put_ does not have a deterministic implementation"
    with pytest.raises(RuntimeError, match="size of tensor"), computing_on(CPU, deterministic=True):
        torch.zeros(2) + torch.zeros(3)
    x.put_(torch.tensor([0, 0]), torch.ones(2))


class Seen(Callback):
    """The settings while training, and after each validation."""

    def __init__(self) -> None:
        self.settings: set[Settings] = set()

    def on_batch_end(self, trainer: Trainer, result: Any) -> None:
        self.settings.add(settings())

    def on_validation_end(self, trainer: Trainer, result: Any) -> None:
        self.settings.add(settings())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (False, False, True)),
        ({"multi_scale": True}, (False, False, False)),
        ({"deterministic": True}, (True, True, False)),
    ],
    ids=["fixed sizes", "multi-scale", "deterministic"],
)
def test_a_run_has_its_settings_and_gives_them_back(
    options: dict[str, Any], expected: Settings, tiny_config: Callable[..., TrainConfig]
) -> None:
    before, seen = settings(), Seen()
    Trainer(tiny_config(epochs=1, **options), callbacks=[seen]).run()
    assert seen.settings == {expected}
    assert settings() == before


def test_two_deterministic_runs_have_the_same_bits(tiny_config: Callable[..., TrainConfig]) -> None:
    runs = [Trainer(tiny_config(epochs=1, deterministic=True, name=name)) for name in ("one", "two")]
    results = [run.run() for run in runs]
    first, second = (run.state.ema.model.state_dict() for run in runs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert results[0] is not None
    assert results[1] is not None
    assert results[0].detections == results[1].detections


def test_prediction_is_deterministic_for_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor(create_model("gelan-t", 2), 64, device="cpu", deterministic=True)
    seen: list[Settings] = []
    forward = predictor.model.raw
    monkeypatch.setattr(predictor.model, "raw", lambda *a, **k: (seen.append(settings()), forward(*a, **k))[1])
    image = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
    first, second = (predictor.detect(image).boxes for _ in range(2))
    assert np.array_equal(first, second)
    assert seen == [(True, True, False)] * 2
    assert settings() == (False, False, False)


@pytest.mark.parametrize("command", ["train", "val", "predict"])
def test_every_command_that_computes_has_the_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([command, "--help"])
    assert "--deterministic" in capsys.readouterr().out


def test_kernels_add_no_floats_in_an_order_of_chance() -> None:
    """Atomic operations of the CUDA code are on integers; the Triton kernels have none."""
    triton = [path for path in (ROOT / "kernels").glob("*.py") if "tl.atomic" in path.read_text()]
    assert triton == []
    found = {
        line.strip()
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".h", ".cuh", ".cu") and "cuda_on_host" not in path.parts
        for line in path.read_text().splitlines()
        if "atomicAdd(" in line
    }
    assert found
    assert all("float" not in line and "double" not in line for line in found)
