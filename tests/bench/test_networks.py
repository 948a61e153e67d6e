"""References in float64: on the device that is measured, on as many images as it can afford."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from yolov9_fast.bench import networks, operators
from yolov9_fast.bench.cases import Case, NoClock, Settings
from yolov9_fast.bench.detection import detection_cases
from yolov9_fast.bench.networks import TrainingStep

from yolov9_fast.losses.targets import PaddedTargets

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SETTINGS = Settings(full=True, peers=False)


def made(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """The arguments of every `name` that is made from now on."""
    found: list[tuple[Any, ...]] = []

    def make(*args: Any, **options: Any) -> Any:
        found.append((*args, options.get("dtype"), options.get("checked")))
        return SimpleNamespace(results=dict)

    monkeypatch.setattr(networks, name, make)
    return found


def cases(device: torch.device) -> list[Case]:
    return [*networks.step_cases(SETTINGS, ("bfloat16",), device)]


def test_on_a_gpu_a_step_is_checked_there_on_two_images(monkeypatch: pytest.MonkeyPatch) -> None:
    found = made(monkeypatch, "TrainingStep")
    for case in cases(GPU):
        opened = case.open(GPU, SETTINGS)
        runner = next(opened.runners)
        assert opened.reference is not None
        assert runner is not None
        opened.reference()
    assert [(name, size, batch, device, dtype, checked) for name, size, batch, device, dtype, checked in found] == [
        ("yolov9-t", 640, 32, GPU, "bfloat16", 2),
        ("yolov9-t", 640, 32, GPU, "float64", 2),
        ("yolov9-c", 640, 16, GPU, "bfloat16", 2),
        ("yolov9-c", 640, 16, GPU, "float64", 2),
    ]


def test_on_a_gpu_inference_is_checked_there_on_two_images_whatever_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = made(monkeypatch, "Inference")
    for case in networks.infer_cases(SETTINGS, ("bfloat16",), GPU):
        opened = case.open(GPU, SETTINGS)
        assert opened.reference is not None
        opened.reference()
    assert len(found) == 12
    assert {args[2] for args in found} == {GPU}
    assert {args[6] for args in found} == {1, 2}


def test_operators_are_checked_on_the_device_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    where: list[torch.device] = []

    def cast(self: Any, device: torch.device, dtype: torch.dtype, layout: str) -> list[Any]:
        where.append(device)
        raise RuntimeError

    monkeypatch.setattr(operators.Problem, "cast", cast)
    case = next(one for one in detection_cases(SETTINGS, ("float32",)) if one.subject == "box_iou")
    opened = case.open(GPU, SETTINGS)
    assert opened.reference is not None
    with pytest.raises(RuntimeError):
        opened.reference()
    assert where == [GPU]


def test_on_a_gpu_a_step_loads_no_images_and_pads_its_targets_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading in the same process takes ten times the step; a pageable copy, and padding on the GPU, wait for it."""
    pinned: list[torch.Size] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        pinned.append(tensor.shape)
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(networks, "_Loader", lambda *args: pytest.fail("the loader is made"))
    opened = cases(GPU)[0].open(GPU, SETTINGS)
    assert opened.runners is not None
    batches = networks.resident_batch(64, 2, CPU)
    images, targets = batches()
    assert pinned == [images.shape]
    assert isinstance(targets, PaddedTargets)
    assert batches()[0] is images
    step = TrainingStep("yolov9-t", 64, 2, CPU, batches=batches)
    rows = TrainingStep("yolov9-t", 64, 2, CPU)
    assert torch.equal(step.forward(NoClock()), rows.forward(NoClock()))


def test_results_of_some_images_are_those_of_the_first() -> None:
    step = TrainingStep("yolov9-t", 64, 3, CPU, checked=2)
    results = step.results()
    assert {len(value) for name, value in results.items() if name.startswith("map")} == {2}
