"""Whether a backend runs on a GPU: before its first use there, one small launch, compared with the definition.

"auto" passes over a backend that fails, one set by name raises with the reason, `yolov9-fast info` shows it. Nothing is
touched but the GPU that is asked about, and no GPU before it is asked about.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from yolov9_fast._lazy import when_imported
from yolov9_fast._untrusted import reason
from yolov9_fast.ops import _backend, _library

log = logging.getLogger(__name__)
_lock = threading.Lock()
_known: dict[tuple[str, int], str | None] = {}
"""By backend and index of the GPU: None where it ran, else why it cannot. Only what lasts is kept."""
_told: set[tuple[str, int, str]] = set()
_PASSING = (errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EAGAIN)
"""Errors of the operating system that may be gone at the next call: no memory, disk, open files, processes."""


def why_not(backend: str, device: torch.device) -> str | None:
    """Why kernels of `backend` ("triton", "cuda") cannot run on this GPU; None when they can.

    The first call for a GPU launches one, and logs a line if it fails. torch.compile calls this, and traces the answer.
    """
    try:
        return _known[backend, device.index]
    except KeyError:
        return _first_use(backend, device.index)


_DYNAMO = "torch._dynamo"  # slow to import
when_imported(_DYNAMO, lambda: sys.modules[_DYNAMO].assume_constant_result(why_not))


def _first_use(backend: str, index: int | None) -> str | None:
    index = torch.cuda.current_device() if index is None else index
    found = tried(backend, index)
    if found is not None and (backend, index, found) not in _told:
        _told.add((backend, index, found))
        log.warning(f"cuda:{index}: backend {backend} cannot run, 'auto' takes the next one: {found}")
    return found


def tried(backend: str, index: int) -> str | None:
    """`why_not` for GPU `index`, without the line in the log."""
    if torch.cuda._is_in_bad_fork():
        return "CUDA cannot be used in a forked process"
    with _lock:
        if (backend, index) in _known:
            return _known[backend, index]
        found, lasting = _attempt(backend, torch.device("cuda", index))
        if lasting:
            _known[backend, index] = found
        else:
            _backend.changed()  # What was decided by this answer is decided again.
    return found


def _attempt(backend: str, device: torch.device) -> tuple[str | None, bool]:
    """Why the launch fails, and whether it will fail again.

    The launch has a thread of its own: there no autocast, no transform, no fake tensors and no mode are in force, and
    the stream is the default one.
    """
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 interprets its kernels, for tensors on the CPU: unset it", True
    result: list[tuple[str | None, bool]] = []

    def launch() -> None:
        try:
            with torch.cuda.device(device):
                result.append((None, True) if LAUNCHES[backend](device) else ("its result is wrong", True))
        except Exception as error:  # whatever triton, a compiler or the driver raises
            result.append((_explained(backend, error, device), not _passes(error)))

    try:
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return "its first run must not be part of a CUDA graph: run once before the capture", False
        thread = threading.Thread(target=launch, name=f"{backend} on {device}")
        thread.start()
    except RuntimeError as error:  # a GPU that cannot be used, or an interpreter that ends
        return _line_of(error), False
    thread.join()
    return result[0]


# ---- the launches


def _launch_triton(device: torch.device) -> bool:
    from yolov9_fast.kernels.bn_silu import bn_silu_apply
    from yolov9_fast.ops._bn_silu import KERNELS

    x = torch.arange(-256.0, 256.0, device=device).view(1, 8, 8, 8).div_(64)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias, mean, rstd = torch.linspace(0.5, 1.5, 32, device=device).view(4, 8).unbind()
    found, expected = torch.empty_like(x), torch.empty_like(x)
    bn_silu_apply(x, weight, bias, mean, rstd, x, found, True)
    KERNELS.apply(x, weight, bias, mean, rstd, x, expected, True)
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


def _launch_cuda(device: torch.device) -> bool:
    from yolov9_fast.ops._box_iou import box_iou_reference

    corners = torch.arange(10.0, device=device).view(5, 2)
    boxes = torch.cat((corners, corners + torch.tensor([7.0, 5.0], device=device)), 1)
    return torch.allclose(torch.ops.yolov9_fast.box_iou(boxes, boxes), box_iou_reference(boxes, boxes), rtol=1e-4)


LAUNCHES: dict[str, Callable[[torch.device], bool]] = {"triton": _launch_triton, "cuda": _launch_cuda}
"""By backend: launch a kernel on this GPU; whether its result is that of the definition."""


# ---- what the errors mean


def _passes(error: Exception) -> bool:
    """Whether the next call may succeed: memory, disk or processes ran out, or something killed the compiler."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(error).lower():
        return True
    if isinstance(error, subprocess.CalledProcessError):
        return error.returncode < 0
    return isinstance(error, OSError) and error.errno in _PASSING


def _explained(backend: str, error: Exception, device: torch.device) -> str:
    """The error on one line, with what to do where that is known."""
    text = _line_of(error)
    header = Path(sysconfig.get_path("include"), "Python.h")
    if isinstance(error, subprocess.CalledProcessError) and not header.exists():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return f"{text}; Python.h is missing: install python{version}-dev"
    if "Failed to find C compiler" in text:
        return "triton finds no C compiler for its launcher: install gcc or clang, or set CC"
    if backend == "cuda" and "no kernel image" in text:
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"{text}: compiled for {', '.join(_architectures())}, this GPU is sm_{major}{minor}; "
            f"install again with YOLOV9_FAST_CUDA_ARCHS={major}.{minor}"
        )
    if "driver version is insufficient" in text or "unsupported toolchain" in text:
        return f"{text}: update the NVIDIA driver"
    return text


def _line_of(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        command = error.cmd if isinstance(error.cmd, str) else str(error.cmd[0])
        ending = f"was ended by signal {-error.returncode}" if error.returncode < 0 else f"returned {error.returncode}"
        return f"{Path(command).name} {ending}"
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    # Triton's errors begin with an excerpt of the kernel and end with what is wrong; ptxas' log follows the first line.
    told = next((line for line in lines if "fatal" in line or ": error" in line), None)
    excerpt = re.match(r"at \d+:\d+:", lines[0]) is not None
    line = reason(error) if isinstance(error, OSError) else " ".join(filter(None, [lines[-excerpt], told]))
    return f"{type(error).__name__}: {line[:200].strip()}" if line else type(error).__name__


def _architectures() -> list[str]:
    """What the compiled CUDA part has machine code for."""
    flags = _library.build_info().get("parts", {}).get("cuda", {}).get("flags", [])
    return re.findall(r"code=(sm_\w+)", " ".join(flags)) or ["other GPUs"]
