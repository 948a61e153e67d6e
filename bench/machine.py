"""The machine that measures: its name, versions, clocks, commit, and the ceilings of bandwidth and matrix product.

Ceilings are measured in the run that uses them. Bandwidth is measured for several sizes, because what fits a cache is
not bound by the memory behind it: the limit of a case is the bandwidth at the number of bytes that it touches.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from yolov9_fast.kernels.device_time import DeviceTimer, overwrite

import yolov9_fast

_SIZES_MIB = (0.25, 1, 4, 16, 64, 256)
_CUDA_SIZES_MIB = (1, 8, 32, 128, 512, 2048)
_VENDORS = re.compile(r"\b(AMD|Intel|NVIDIA|Corporation|CPU|Processor|GeForce)\b|\((R|TM)\)|@.*$", re.IGNORECASE)


def device_slug(device: torch.device) -> str:
    """The folder of a device's records: `cpu-epyc-2cores`, `nvidia-h200`."""
    if device.type == "cuda":
        words = _slug(_VENDORS.sub(" ", torch.cuda.get_device_name(device)))
        return f"nvidia-{words}"
    words = _slug(_VENDORS.sub(" ", cpu_name())).split("-")[0] or _slug(platform.machine())
    return f"cpu-{words}-{cores()}cores"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _vector_units() -> list[str]:
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "asimd") if name in flags]


def environment(device: torch.device) -> dict[str, Any]:
    """Everything about this machine and installation that a measurement depends on, as plain data."""
    content: dict[str, Any] = {
        "device": device_slug(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "vector_units": _vector_units(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "clocks": clocks(device),
        **source(Path(yolov9_fast.__file__).resolve().parent.parent),
        "versions": {
            "yolov9_fast": yolov9_fast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "numpy": np.__version__,
            "triton": _version("triton"),
        },
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        content["capability"] = f"{properties.major}.{properties.minor}"
        content["memory_gib"] = round(properties.total_memory / 2**30, 1)
        content["driver"] = _nvidia("driver_version")
    return content


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def clocks(device: torch.device) -> dict[str, Any]:
    """Clocks as they are now (they are read, never set): MHz, and watts on a GPU."""
    if device.type == "cuda":
        names = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")
        text = _nvidia(",".join(names))
        return dict(zip(names, (part.strip() for part in text.split(",")), strict=False)) if text else {}
    try:
        mhz = [
            float(value) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text(), re.M)
        ]
    except OSError:
        mhz = []
    return {"mhz": mhz}


def _nvidia(query: str) -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, f"--query-gpu={query}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def git(folder: Path, *words: str) -> str | None:
    """What `git WORDS` prints in `folder`; None where there is no git, no repository, or it fails."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def source(folder: Path) -> dict[str, Any]:
    """Commit of the repository that holds `folder`, and whether files of the product differ from it."""
    commit = git(folder, "rev-parse", "--short=10", "HEAD")
    changed = git(folder, "status", "--porcelain", "--", "yolov9_fast", "kernels", "csrc") if commit else None
    return {"commit": commit, "dirty": bool(changed) if changed is not None else None}


@dataclass(frozen=True)
class Ceilings:
    """`bandwidth`: (bytes touched, bytes per second), sizes rising; `matrix`: dtype name → operations per second."""

    bandwidth: tuple[tuple[float, float], ...]
    matrix: dict[str, float] = field(default_factory=dict)

    def bandwidth_at(self, size: float) -> float:
        """Bytes per second for a working set of `size` bytes, interpolated over the logarithm of the size."""
        sizes, speeds = zip(*self.bandwidth, strict=True)
        return float(np.interp(np.log(max(size, 1.0)), np.log(sizes), speeds))

    def limit(self, moved: float, operations: float, dtype: str, footprint: float) -> tuple[float, str]:
        """Least seconds for so many bytes and operations, and which of the two sets it: "memory" or "arithmetic"."""
        memory = moved / self.bandwidth_at(footprint)
        speed = self.matrix.get(dtype) or self.matrix.get("float32")
        arithmetic = operations / speed if speed else 0.0
        return (memory, "memory") if memory >= arithmetic else (arithmetic, "arithmetic")

    def as_dict(self) -> dict[str, Any]:
        return {"bandwidth": [list(pair) for pair in self.bandwidth], "matrix": self.matrix}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Ceilings:
        return cls(tuple((float(a), float(b)) for a, b in data["bandwidth"]), dict(data["matrix"]))


def measure_ceilings(
    device: torch.device, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
) -> Ceilings:
    """Best of several passes: `a + b → c` over three equal arrays; products and convolutions.

    On a GPU each pass begins on overwritten caches, as the samples of a case do.
    """
    sizes = _CUDA_SIZES_MIB if device.type == "cuda" else _SIZES_MIB
    bandwidth = []
    for mib in sizes:
        count = int(mib * 2**20 / 4 / 3)
        a, b, c = (torch.ones(count, device=device) for _ in range(3))
        # One thread alone is the faster form for what is small, or where another process holds the other cores.
        seconds = min(
            _best(lambda a=a, b=b, c=c: torch.add(a, b, out=c), device, 0.1, threads)  # type: ignore[misc]
            for threads in ({1, torch.get_num_threads()} if device.type == "cpu" else {None})
        )
        bandwidth.append((mib * 2**20, 12.0 * count / seconds))
    matrix = {}
    side = 8192 if device.type == "cuda" else 1024
    for dtype in dtypes:
        left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
        seconds = _best(lambda left=left, right=right: left @ right, device, 0.4)  # type: ignore[misc]
        product = 2.0 * side**3 / seconds
        # Convolutions have a library of their own, which may be the faster one.
        channels, plane = 256 if device.type == "cuda" else 128, 80 if device.type == "cuda" else 40
        x = torch.ones(16, channels, plane, plane, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        weight = torch.ones(channels, channels, 3, 3, device=device, dtype=dtype)
        weight = weight.contiguous(memory_format=torch.channels_last)
        seconds = _best(lambda x=x, w=weight: F.conv2d(x, w, padding=1), device, 0.4)  # type: ignore[misc]
        convolution = 2.0 * x.numel() * channels * 9 / seconds
        matrix[str(dtype).removeprefix("torch.")] = max(product, convolution)
    return Ceilings(tuple(bandwidth), matrix)


def _best(call: Callable[[], Any], device: torch.device, budget: float, threads: int | None = None) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return _shortest(call, device, budget)
    finally:
        torch.set_num_threads(before)


def _shortest(call: Callable[[], Any], device: torch.device, budget: float) -> float:
    timer = DeviceTimer(device, overwrite(device)) if device.type == "cuda" else None
    call()
    times: list[float] = []
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times) < 5:
        if timer is not None:
            times.append(timer(call).device)
            continue
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def program_line() -> str:
    """The command that made a run, without the interpreter's path."""
    return " ".join(["yolov9-fast", *sys.argv[1:]])
