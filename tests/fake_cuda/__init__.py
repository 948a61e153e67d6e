"""A CUDA device that runs nothing: the CPU build of torch traces, with fake tensors, what it would do on a GPU.

    python -m tests.fake_cuda.trace "yolov9-t step bf16" "yolov9-c predict off"

prints as JSON what a training step or a prediction does: where the host waits and what it copies, layouts, casts, and
launches. `start()` has to run before torch is imported, so that tests do it in a process of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "fake_cuda"


def torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def library() -> Path:
    """The compiled device; compiles it if it or torch has changed. `RuntimeError` says why there is none."""
    return compiled("device.cpp", [f"-isystem{torch_folder() / 'include'}"])


def compiled(name: str, options: Sequence[str], target: str = "{}.so") -> Path:
    """A source file of this folder as a shared library; compiled if it, torch or the options have changed."""
    source = Path(__file__).with_name(name)
    content = source.read_bytes() + (torch_folder() / "version.py").read_bytes() + repr(list(options)).encode()
    key = hashlib.sha256(content).hexdigest()[:16]
    path = FOLDER / target.format(f"{source.stem}-{key}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path
        partial = path.with_suffix(".part")
        compiler = [*os.environ.get("CXX", "c++").split(), "-std=c++20"]
        if source.suffix == ".c":
            compiler = os.environ.get("CC", "cc").split()
        include = f"-isystem{sysconfig.get_path('include')}"
        command = [*compiler, "-shared", "-fPIC", "-O1", include, *options, str(source), "-o", str(partial)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise RuntimeError(f"no compiler: {error}") from error
        if done.returncode:
            raise RuntimeError(f"{name} cannot be compiled: {done.stderr[-2000:]}")
        partial.replace(path)
    return path


def start() -> None:
    """Give torch, which must not have been imported, a CUDA device that runs nothing."""
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already")
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("YOLOV9_FAST_HOST_MICROSECONDS", "0")  # blocks run fused, however small, as where captured
    os.environ["YOLOV9_FAST_LIBRARY_FOLDER"] = str(_cpu_alone())
    device = library()
    ctypes.CDLL(str(torch_folder() / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(device), mode=ctypes.RTLD_GLOBAL)


def _cpu_alone() -> Path:
    """A folder with the CPU's compiled operators, without those of a real GPU."""
    folder = FOLDER / "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("_C_cpu.so", "_build_info.json"):
        with contextlib.suppress(FileExistsError):  # by this process or another that begins now
            (folder / name).symlink_to(ROOT / "yolov9_fast" / name)
    return folder


def cuda_operators() -> list[str]:
    """The operators with a kernel in `csrc/cuda`."""
    text = "".join(path.read_text() for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
    return re.findall(r'library\.impl\("(\w+)"', text)


_kept: list[Any] = []


def implement_cuda_operators() -> None:
    """Before the package is imported: its compiled operators of a GPU are there, whether nvcc is or not.

    None of them is called on fake tensors, whose results are those of the fakes.
    """
    import torch

    library = torch.library.Library("yolov9_fast", "FRAGMENT")
    for name in cuda_operators():
        library.impl(name, lambda *args: None, "CUDA")
    _kept.append(library)


def end() -> NoReturn:
    """End a process that has used the device: autograd's threads of it sometimes abort an ordinary end."""
    sys.stdout.flush()
    os._exit(0)
