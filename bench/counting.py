"""What a call does, counted by profilers, not by a clock: kernels, copies, allocations, bytes, Python calls.

On the CPU a kernel is an operator call that calls no other and does work (views and empty tensors are none); on CUDA it
is a kernel that the device ran.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

# Operators that only describe memory, ask about it or reserve it.
_NO_WORK = frozenset(
    f"{space}{name}"
    for space in ("aten::", "")
    for name in [
        "view",
        "as_strided",
        "as_strided_",
        "empty",
        "empty_like",
        "empty_strided",
        "resize_",
        "detach",
        "detach_",
        "slice",
        "select",
        "narrow",
        "permute",
        "transpose",
        "t",
        "expand",
        "expand_as",
        "unsqueeze",
        "squeeze",
        "reshape",
        "_reshape_alias",
        "unbind",
        "split",
        "chunk",
        "split_with_sizes",
        "alias",
        "lift_fresh",
        "result_type",
        "set_",
        "is_nonzero",
        "item",
        "to",
        "_local_scalar_dense",
        "contiguous",
        "size",
        "stride",
        "flatten",
        "view_as",
        "numpy_T",
        "unsafe_split",
        "unfold",
        "real",
        "swapaxes",
        "unflatten",
        "requires_grad_",
        "output_nr",
        "_version",
        "equal",
        "is_same_size",
        "can_cast",
        "_nnpack_available",
        "resolve_conj",
        "resolve_neg",
        "new_empty",
        "new_empty_strided",
        "movedim",
        "conj",
        "diagonal",
    ]
)


def works(operator: str) -> bool:
    """Whether an operator, such as "aten::add", does work: it is no view and reserves no memory only."""
    return operator not in _NO_WORK


COPIES = ("aten::copy_", "aten::cat", "aten::_foreach_copy_", "aten::stack")


@dataclass
class Counts:
    """One call: kernels, copies among them, allocations and their bytes, the peak of live bytes, kernels by name.

    `kernel_seconds`: on CUDA the sum of the times in which a kernel ran.
    """

    kernels: int = 0
    copies: int = 0
    allocations: int = 0
    allocated_bytes: int = 0
    peak_bytes: int = 0
    by_kernel: dict[str, int] = field(default_factory=dict)
    kernel_seconds: float = 0.0

    def numbers(self) -> dict[str, int]:
        content = asdict(self)
        del content["by_kernel"], content["kernel_seconds"]
        return content


def count(call: Callable[[], Any], device: torch.device) -> Counts:
    """Counts of one call of `call`, which should have run before (caches filled, code compiled)."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with quiet_stderr(), profile(activities=activities, profile_memory=True) as profiler:
        value = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    del value
    counts = Counts()
    found: Counter[str] = Counter()
    for event in profiler.events():
        if device.type == "cuda":
            # Kernels, memory copies and fills are events of the device.
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
                found[event.name] += 1
                counts.kernel_seconds += event.time_range.elapsed_us() / 1e6
        elif (
            event.name.split("::")[0] in ("aten", "yolov9_fast", "mkldnn")
            and event.name not in _NO_WORK
            and not any(child.name not in _NO_WORK and "::" in child.name for child in event.cpu_children)
        ):
            found[event.name] += 1
    counts.kernels = sum(found.values())
    counts.copies = sum(number for name, number in found.items() if name in COPIES or "Memcpy DtoD" in name)
    counts.by_kernel = dict(sorted(found.items()))
    counts.allocations, counts.allocated_bytes, counts.peak_bytes = _memory(profiler, device)
    if device.type == "cuda":
        counts.peak_bytes = torch.cuda.max_memory_allocated(device) - before
    return counts


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Discard what is written to file descriptor 2: the profiler's library writes a line at every start and stop."""
    sys.stderr.flush()
    try:
        own = os.dup(2)
    except OSError:
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)
        os.close(null)


def _memory(profiler: Any, device: torch.device) -> tuple[int, int, int]:
    """Allocations, their bytes, and the most bytes that were live above the start, from the raw memory events."""
    wanted = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == wanted
    ]
    number = total = live = peak = 0
    for _, size in sorted(events, key=lambda pair: pair[0]):
        live += size
        if size > 0:
            number, total, peak = number + 1, total + size, max(peak, live)
    return number, total, peak


def saved_bytes(forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward of `forward()`, each storage once; parameters and leaves excluded."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        value = forward()
    total = sum(storages.values())
    del value
    return total


def python_calls(call: Callable[[], Any]) -> int:
    """How many functions of this package `call()` calls in this thread; those of bench, torch and others excluded.

    Comprehensions are not counted, which newer versions of Python run without a call, nor generated functions.
    """
    number = 0

    def profiled(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal number
        name, module = frame.f_code.co_name, frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith("yolov9_fast.") and not module.startswith("yolov9_fast.bench"):
            number += (not name.startswith("<") or name == "<lambda>") and frame.f_code.co_filename != "<string>"

    before = sys.getprofile()
    sys.setprofile(profiled)
    try:
        call()
    finally:
        sys.setprofile(before)
    return number


def resident_peak(call: Callable[[], Any]) -> int | None:
    """Bytes by which this process's resident memory rose during `call()`; None where Linux does not report it.

    Free memory is returned to the system first, otherwise the call would reuse what earlier ones left.
    """
    _trim()
    try:
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        value = call()
        peak = _status("VmHWM")
    except OSError:
        return None
    del value
    return max(peak - before, 0)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _trim() -> None:
    name = ctypes.util.find_library("c")
    library = ctypes.CDLL(name) if name else None
    if library is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
