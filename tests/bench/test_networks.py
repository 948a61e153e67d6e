"""References in float64: on the device that is measured, on as many images as it can afford."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from yolov9_fast.bench import networks, operators
from yolov9_fast.bench.cases import Case, Settings
from yolov9_fast.bench.detection import detection_cases
from yolov9_fast.bench.networks import TrainingStep

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SETTINGS = Settings(full=True, peers=False)


def made(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """The arguments of every `name` that is made from now on."""
    found: list[tuple[Any, ...]] = []

    def make(*args: Any, **options: Any) -> Any:
        found.append((*args, options.get("dtype"), options.get("checked")))
        return SimpleNamespace(results=dict)

    monkeypatch.setattr(networks, name, make)
    monkeypatch.setattr(networks, "_loader_batches", lambda size, batch: (None, ""))
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


def test_results_of_some_images_are_those_of_the_first() -> None:
    step = TrainingStep("yolov9-t", 64, 3, CPU, checked=2)
    results = step.results()
    assert {len(value) for name, value in results.items() if name.startswith("map")} == {2}
