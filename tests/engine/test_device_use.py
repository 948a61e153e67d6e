"""A run uses its own GPU only, and asks that GPU whether it has bfloat16."""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from yolov9_fast.engine import distributed, inference, predictor, validator
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.engine.device import autocast, computing_on, has_bf16, resolve_amp
from yolov9_fast.engine.distributed import ProcessGroup, join_process_group
from yolov9_fast.engine.trainer import Trainer
from yolov9_fast.models import create_model

ROOT = Path(__file__).parents[2]
CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
OF_A_DEVICE = {
    "current_stream",
    "default_stream",
    "device_memory_used",
    "get_device_capability",
    "get_device_name",
    "get_device_properties",
    "is_bf16_supported",
    "max_memory_allocated",
    "max_memory_reserved",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "memory_stats",
    "memory_summary",
    "reset_peak_memory_stats",
    "synchronize",
}
"""Functions of torch.cuda that take a device and mean the current one without it."""


class Cuda:
    """Three GPUs: 0 and 1 of capability 7.5, 2 of 9.0; which of them were touched, and which is current."""

    def __init__(self) -> None:
        self.current = 0
        self.touched: set[int] = set()

    def index(self, device: Any = None) -> int:
        found = self.current if device is None else device if isinstance(device, int) else torch.device(device).index
        self.touched.add(found)
        return int(found)

    def set_device(self, device: Any) -> None:
        self.current = self.index(device)

    def capability(self, device: Any = None) -> tuple[int, int]:
        return (9, 0) if self.index(device) == 2 else (7, 5)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    fake = Cuda()

    class Device:
        def __init__(self, device: Any) -> None:
            self.device = device

        def __enter__(self) -> None:
            self.before, fake.current = fake.current, fake.index(self.device)

        def __exit__(self, *error: object) -> None:
            fake.current = self.before

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", fake.index)
    monkeypatch.setattr(torch.cuda, "set_device", fake.set_device)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", fake.capability)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: bool(fake.index() + 1) and including_emulation
    )
    return fake


def test_bf16_is_chosen_where_the_runs_own_gpu_has_it(cuda: Cuda, caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_amp("auto", SECOND) == "off"
    assert cuda.touched == {1}
    assert resolve_amp("auto", torch.device("cuda", 2)) == "bf16"
    assert not has_bf16(FIRST)
    with caplog.at_level(logging.WARNING, "yolov9_fast"):
        assert resolve_amp("fp16", SECOND) == "fp16"
        assert not caplog.records
        assert resolve_amp("bf16", SECOND) == "bf16"
    assert caplog.messages == ["amp: cuda:1 emulates bf16, which is slow; fp16 and off are not"]


def test_a_gpu_of_amd_has_bf16(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert resolve_amp("auto", SECOND) == "bf16"


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "RANK": "1"}])
def test_a_run_makes_its_gpu_the_current_one_first(
    environment: dict[str, str], cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    current: list[tuple[str, int]] = []
    monkeypatch.setattr(
        distributed.dist, "init_process_group", lambda backend, **options: current.append((backend, cuda.current))
    )
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "start_heartbeat", lambda *arguments: object())
    monkeypatch.setattr(distributed, "_heartbeat", None)
    group = join_process_group("1" if not environment else "0,1")
    assert group.device == SECOND
    assert cuda.current == 1
    assert current == ([("nccl", 1)] if environment else [])
    with autocast(group.device, "bf16"):  # torch asks whether the current device has it
        pass
    assert cuda.touched == {1}


def test_a_barrier_uses_the_gpu_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[Any] = []
    monkeypatch.setattr(distributed.dist, "barrier", lambda device_ids=None: devices.append(device_ids))
    ProcessGroup(0, 2, SECOND).barrier()
    ProcessGroup(0, 2, CPU).barrier()
    assert devices == [[1], None]


class Reached(Exception):
    pass


def test_prediction_and_evaluation_run_on_the_current_device_and_give_it_back(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    current: list[int] = []

    def reached(*arguments: Any, **options: Any) -> Any:
        current.append(cuda.current)
        raise Reached

    predict = predictor.Predictor(create_model("gelan-t", 2), 64, device="cpu")
    predict.device = SECOND
    monkeypatch.setattr(inference, "prepare_images", reached)
    with pytest.raises(Reached):
        predict.detect(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(Reached), computing_on(SECOND):
        reached()
    assert current == [1, 1]
    assert cuda.current == 0
    assert cuda.touched == {1}
    cuda.touched.clear()
    with computing_on(CPU, fixed_sizes=True):
        pass
    assert not cuda.touched


def test_evaluation_makes_the_networks_device_current(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[torch.device, dict[str, Any]]] = []

    def computing(device: torch.device, **options: Any) -> Any:
        used.append((device, options))
        raise Reached

    trainer = Trainer(tiny_config(rect=True))
    monkeypatch.setattr(validator, "computing_on", computing)
    with pytest.raises(Reached):
        trainer._validate(trainer.model, "")
    assert used == [(CPU, {"fixed_sizes": False})]


def calls_without_device(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in OF_A_DEVICE
            and ast.unparse(node.func.value) == "torch.cuda"
            and not node.args
            and not any(keyword.arg == "device" for keyword in node.keywords)
        ):
            yield f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"


def test_every_call_of_torch_cuda_names_its_device() -> None:
    files = [path for folder in ("yolov9_fast", "kernels", "bench") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert [call for path in files for call in calls_without_device(path)] == []
