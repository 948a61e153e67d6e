"""A CUDA device that runs nothing: the CPU build of torch traces, with fake tensors, what it would do on a GPU.

    python -m tests.fake_cuda.trace NETWORK [--what step|inference] [--amp off|bf16|fp16]

prints as JSON what one training step or one prediction does: kernel launches, operations that depend on data, copies
between host and device, strides at the operators' boundaries. `start()` has to run before torch is imported, so that
tests do it in a process of their own.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "fake_cuda"


def torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def library() -> Path:
    """The compiled device; compiles it if it or torch has changed. `RuntimeError` says why there is none."""
    source = Path(__file__).with_name("device.cpp")
    torch = torch_folder()
    key = hashlib.sha256(source.read_bytes() + (torch / "version.py").read_bytes()).hexdigest()[:16]
    target = FOLDER / f"fake_cuda-{key}.so"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        partial = target.with_suffix(".part")
        command = [*os.environ.get("CXX", "c++").split(), "-shared", "-fPIC", "-std=c++20", "-O1"]
        include = [f"-isystem{torch / 'include'}", f"-isystem{sysconfig.get_path('include')}"]
        try:
            done = subprocess.run([*command, *include, str(source), "-o", str(partial)], capture_output=True, text=True)
        except OSError as error:
            raise RuntimeError(f"no C++ compiler: {error}") from error
        if done.returncode:
            raise RuntimeError(f"the fake device cannot be compiled: {done.stderr[-2000:]}")
        partial.replace(target)
    return target


def start() -> None:
    """Give torch, which must not have been imported, a CUDA device that runs nothing."""
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already")
    os.environ.pop("TRITON_INTERPRET", None)
    device = library()
    ctypes.CDLL(str(torch_folder() / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(device), mode=ctypes.RTLD_GLOBAL)
