"""Loads the simulated device into torch, and what `torch.cuda` says and does about it."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib
import os
import pkgutil
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from csrc import on_host
from tests import fake_cuda
from tests.recording import Recording

CAPABILITY = (9, 0)
SYNC_MODES = {"default": 0, "warn": 1, "error": 2}


@functools.cache
def library() -> ctypes.CDLL:
    include = fake_cuda.torch_folder() / "include"
    made = ctypes.CDLL(str(fake_cuda.compiled("simulated.cpp", [f"-isystem{include}"])), mode=ctypes.RTLD_GLOBAL)
    made.simulated_cuda_waits.restype = ctypes.c_int64
    made.simulated_cuda_current.restype = ctypes.c_int
    return made


def start() -> None:
    """Give torch the device, and the package its CUDA operators."""
    library()
    for name, value in _TORCH_CUDA.items():
        setattr(torch.cuda, name, value)
    for name in ("get_rng_state", "set_rng_state", "get_rng_state_all", "set_rng_state_all"):
        setattr(torch.cuda.random, name, _TORCH_CUDA[name])
    torch.storage._StorageBase.clone = _clone
    os.environ["YOLOV9_FAST_LIBRARY_FOLDER"] = str(operators())  # read when the package is imported
    interpret()
    del os.environ["YOLOV9_FAST_LIBRARY_FOLDER"]


def interpret() -> None:
    """Interpret Triton kernels on tensors of the device only: on a GPU machine none runs on tensors of the host."""
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton and the kernels are imported
    import triton

    from yolov9_fast import kernels

    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"yolov9_fast.kernels.{module.name}")
    importlib.import_module("yolov9_fast.ops")
    # An interpreted launch on the device gives nothing that could be launched again.
    tape = importlib.import_module("yolov9_fast.kernels.replay").Tape
    tape.note_launch = lambda self, *_: setattr(self, "_foreign", True)
    del os.environ["TRITON_INTERPRET"]
    triton.knobs.runtime.__dict__["interpret"] = True


def operators() -> Path:
    """A folder with the package's compiled operators, those for CUDA run by the host."""
    folder = fake_cuda.ROOT / "build" / "simulated_cuda"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # other processes may build too
        fcntl.flock(lock, fcntl.LOCK_EX)
        on_host.build_on_host("simulated", folder=folder)
        for name in ("_C_cpu.so", "_build_info.json"):
            own = fake_cuda.ROOT / "yolov9_fast" / name
            if own.exists():
                partial = folder / f"{name}.part"
                shutil.copy2(own, partial)
                partial.replace(folder / name)
    return folder


def _clone(storage: Any) -> Any:
    """`storage.clone()`, which the CPU build knows of the host's storages only."""
    made = torch.empty(storage.nbytes(), dtype=torch.uint8, device=storage.device).untyped_storage()
    return made.copy_(storage)


def _number(device: Any = None) -> int:
    if device is None:
        return library().simulated_cuda_current()
    return device if isinstance(device, int) else torch.device(device).index or 0


def set_device(device: Any) -> None:
    library().simulated_cuda_set(_number(device))


class Device:
    """`torch.cuda.device`: the current device inside a block."""

    def __init__(self, device: Any) -> None:
        self.number, self.before = _number(device), -1

    def __enter__(self) -> None:
        self.before = _number()
        set_device(self.number)

    def __exit__(self, *_: object) -> None:
        set_device(self.before)


def set_sync_debug_mode(mode: int | str) -> None:
    library().simulated_cuda_sync_mode(SYNC_MODES[mode] if isinstance(mode, str) else mode)


class Stream:
    """Work is done when a call returns, so that there is nothing to order."""

    def __init__(self, *_: object, **__: object) -> None:
        self.device, self.device_index, self.stream_id, self.cuda_stream = torch.device("cuda", 0), 0, 0, 0

    def nothing(self, *_: object, **__: object) -> None:
        pass

    wait_stream = wait_event = synchronize = record_event = record = wait = nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: object) -> float:
        return 0.0

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class CUDAGraph(Recording):
    capturing = False

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def pool(self) -> tuple[int, int]:
        return (0, 0)


@contextmanager
def graph(captured: CUDAGraph, *_: object, **__: object) -> Iterator[None]:
    set_sync_debug_mode("error")
    CUDAGraph.capturing = True
    try:
        with captured:
            yield
    finally:
        CUDAGraph.capturing = False
        set_sync_debug_mode("default")


class Event(Stream):
    pass


def _always(value: Any) -> Any:
    """A function of its own for each name: the compiler tells torch's functions apart by identity."""
    return lambda *_, **__: value


_PROPERTIES = SimpleNamespace(
    name="simulated",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    total_memory=80 * 2**30,
    multi_processor_count=132,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)
_TORCH_CUDA: dict[str, Any] = {
    "_lazy_init": _always(None),
    "is_available": _always(True),
    "is_initialized": _always(True),
    "device_count": _always(2),
    "current_device": _number,
    "set_device": set_device,
    "device": Device,
    "get_device_capability": _always(CAPABILITY),
    "get_device_name": _always(_PROPERTIES.name),
    "get_device_properties": _always(_PROPERTIES),
    "is_bf16_supported": _always(True),
    "synchronize": _always(None),
    "empty_cache": _always(None),
    "manual_seed": _always(None),
    "manual_seed_all": _always(None),
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "get_rng_state_all": lambda: [torch.get_rng_state()] * 2,
    "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
    "set_sync_debug_mode": set_sync_debug_mode,
    "get_sync_debug_mode": lambda: library().simulated_cuda_get_sync_mode(),
    "is_current_stream_capturing": lambda: CUDAGraph.capturing,
    "Stream": Stream,
    "Event": Event,
    "current_stream": lambda device=None: Stream(),
    "default_stream": lambda device=None: Stream(),
    "stream": lambda stream: stream or Stream(),
    "CUDAGraph": CUDAGraph,
    "graph_pool_handle": _always((0, 0)),
    "graph": graph,
    "reset_peak_memory_stats": _always(None),
    "memory_allocated": _always(0),
    "memory_reserved": _always(0),
    "max_memory_allocated": _always(0),
    "max_memory_reserved": _always(0),
    "mem_get_info": _always((_PROPERTIES.total_memory, _PROPERTIES.total_memory)),
}
