"""The host's part of the GPU path, run without a GPU: Triton's own driver on a driver library that launches nothing.

`start()` gives torch the fake device, memory of the host for its tensors, and Triton a `libcuda.so.1` that notes what
it is asked to launch. Everything up to there is real: specialisation, cache keys, compilation by ptxas, arguments.
PyTorch's operators compute on the CPU, convolutions and Triton's kernels compute nothing: values mean nothing.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from tests import fake_cuda

DEVICE_NAMES = {80: "NVIDIA A100-SXM4-80GB", 90: "NVIDIA H100 80GB HBM3", 100: "NVIDIA B200"}


class Launch(NamedTuple):
    """What the driver library was asked for; `shared` in bytes."""

    kernel: str
    device: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    stream: int


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char * 64),
        ("device", ctypes.c_int),
        ("grid", ctypes.c_int * 3),
        ("threads", ctypes.c_int),
        ("shared", ctypes.c_int),
        ("stream", ctypes.c_ulonglong),
    )


class Driver:
    """What was launched and compiled; `streams` and `capturing` are what torch answers."""

    def __init__(self, capability: int) -> None:
        import torch

        self.capability = capability
        self.streams: defaultdict[int, int] = defaultdict(int)
        self.capturing = False
        self._library = _driver_library()
        self._library.fake_launch.restype = ctypes.POINTER(_Launch)
        self._library.fake_set_capability(capability)
        self.memory = _host_memory()
        self._library.fake_set_device(ctypes.c_void_p(self.memory.device_index))
        torch_cuda: Any = torch.cuda
        torch_cuda._lazy_init = lambda: None
        torch_cuda.is_available = lambda: True
        torch_cuda.device_count = lambda: 2
        torch_cuda.current_device = self.memory.current_device
        torch_cuda.get_device_capability = lambda device=None: divmod(self.capability, 10)
        torch_cuda.get_device_name = lambda device=None: DEVICE_NAMES[self.capability]
        torch_cuda.is_bf16_supported = lambda *args, **kwargs: True
        torch_cuda.is_current_stream_capturing = lambda: self.capturing
        torch_cuda.synchronize = lambda device=None: None
        torch_cuda._exchange_device = torch_cuda._maybe_exchange_device = self.memory.exchange_device
        binding: Any = torch._C
        binding._cuda_getCurrentRawStream = self.streams.__getitem__  # as cheap as torch's own
        binding._cuda_getDevice = self.memory.current_device
        torch.UntypedStorage.clone = _clone  # type: ignore[method-assign]
        for operator in fake_cuda.cuda_operators():
            self.memory.implement("yolov9_fast", operator, True)
        for name in torch._C._dispatch_get_all_op_names():
            if name.startswith("aten::_foreach_") and re.search(r"_(\.|$)", name):
                self.memory.implement("aten", name.removeprefix("aten::"), False)
        from yolov9_fast.ops import _probe

        # What is launched here computes nothing, so the probe would refuse it.
        _probe._known.update({(backend, device): None for backend in _probe.LAUNCHES for device in range(2)})

    def launches(self) -> list[Launch]:
        """Since `reset`, the last 65,536 of them."""
        count = self._library.fake_launches()
        found = [self._library.fake_launch(index).contents for index in range(max(0, count - 65536), count)]
        return [
            Launch(one.kernel.decode(), one.device, tuple(one.grid), one.threads, one.shared, one.stream)
            for one in found
        ]

    def count(self) -> int:
        """Launches since `reset`."""
        return int(self._library.fake_launches())

    def by_kernel(self) -> dict[str, int]:
        return dict(sorted(Counter(launch.kernel for launch in self.launches()).items()))

    def reset(self) -> None:
        self._library.fake_reset()

    def variants(self) -> dict[str, int]:
        """Compiled variants of each kernel that this process has used, on all devices."""
        from yolov9_fast.kernels.launch import kernels

        found = {
            name: sum(len(cache[0]) for cache in kernel.function.device_caches.values())
            for name, kernel in kernels.items()
        }
        return {name: count for name, count in sorted(found.items()) if count}


def start(capability: int = 90) -> Driver:
    """Before torch is imported: the fake device with memory, two of them, of this compute capability (90 = 9.0)."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("unset TRITON_INTERPRET: kernels are compiled here")
    libraries()
    os.environ["TRITON_LIBCUDA_PATH"] = str(_libcuda().parent)
    os.environ.setdefault("TRITON_CACHE_DIR", str(fake_cuda.FOLDER / "triton_cache"))
    fake_cuda.start()
    return Driver(capability)


def libraries() -> None:
    """Compile what `start` loads; `RuntimeError` says why that cannot be."""
    fake_cuda.library()
    _libcuda()
    _host_memory_file()


def _libcuda() -> Path:
    found = importlib.util.find_spec("triton")
    if found is None or found.submodule_search_locations is None:
        raise RuntimeError("triton is not installed")
    include = f"-I{found.submodule_search_locations[0]}/backends/nvidia/include"
    return fake_cuda.compiled("libcuda.c", [include, "-Wl,-soname,libcuda.so.1"], target="{}/libcuda.so.1")


def _driver_library() -> ctypes.CDLL:
    return ctypes.CDLL(str(_libcuda()), mode=ctypes.RTLD_GLOBAL)


def _host_memory_file() -> Path:
    torch = fake_cuda.torch_folder()
    include = [f"-isystem{torch / 'include'}", f"-isystem{torch / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    return fake_cuda.compiled("host_memory.cpp", [*include, f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"])


def _host_memory() -> Any:
    loader = importlib.machinery.ExtensionFileLoader("host_memory", str(_host_memory_file()))
    spec = importlib.util.spec_from_loader("host_memory", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _clone(storage: Any) -> Any:
    import torch

    made = torch.empty(storage.nbytes(), dtype=torch.uint8, device=storage.device)
    return made.copy_(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)).untyped_storage()
