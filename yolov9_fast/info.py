"""What this installation is and can do: versions, what was compiled, optional packages, which operator runs where."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

import torch

import yolov9_fast
from yolov9_fast.ops import _library as library
from yolov9_fast.ops._backend import backends, get_backend
from yolov9_fast.ops._operator import list_backends, operators


@dataclass(frozen=True)
class OptionalPackage:
    """A package that only some commands need, and what is lost without it."""

    module: str
    distribution: str
    without: str


OPTIONAL = (
    OptionalPackage("cv2", "opencv-python-headless", "no reading of images and videos: no train, val, predict, demo"),
    OptionalPackage("pycocotools", "pycocotools", "no COCO AP: no val, and no AP while training"),
    OptionalPackage("tqdm", "tqdm", "no train, val and demo"),
    OptionalPackage("matplotlib", "matplotlib", "no plots"),
    OptionalPackage("tensorboard", "tensorboard", "no TensorBoard logs"),
    OptionalPackage("triton", "triton", "no Triton kernels on NVIDIA GPUs"),
)
_VARIABLES = ("YOLOV9_FAST_", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")


def environment_report() -> str:
    """Versions, build, optional packages, operators × backends as text; each thing that is missing with its reason."""
    sections = (
        ("Versions", _versions()),
        ("Compiled operators", _build()),
        ("Optional packages", _packages()),
        ("Operators", _operators()),
        ("Environment", _environment()),
    )
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections)


def _versions() -> Iterable[str]:
    yield f"yolov9_fast {yolov9_fast.__version__} in {library.PACKAGE_FOLDER}"
    yield f"python      {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    yield f"torch       {torch.__version__}, {torch.get_num_threads()} threads, CUDA {torch.version.cuda or 'none'}"
    yield f"numpy       {_version_of('numpy') or 'missing'}"
    yield f"GPU         {_gpus()}"
    yield f"nvcc        {_version_line('nvcc', 'release') or 'not found'}"
    yield f"compiler    {_version_line(os.environ.get('CXX', 'c++'), '') or 'not found'}"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none" if torch.version.cuda is None else "none visible"
    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return ", ".join(f"{device.name} (sm_{device.major}{device.minor})" for device in devices)


def _build() -> Iterable[str]:
    info = library.build_info()
    if tree := library.uncompiled_tree():
        yield tree
    if info:
        yield f"built against torch {info.get('torch')}, {'portable' if info.get('portable') else 'for this CPU only'}"
    for backend, reason in library.loaded.items():
        if reason is not None:
            yield f"{backend:<5}no   {reason}"
            continue
        part = info.get("parts", {}).get(backend, {})
        yield f"{backend:<5}yes  {part.get('compiler')}: {' '.join(part.get('flags', []))}"


def _packages() -> Iterable[str]:
    for package in OPTIONAL:
        if importlib.util.find_spec(package.module) is not None:
            yield f"{package.module:<12}{_version_of(package.distribution) or 'present'}"
        else:
            yield f"{package.module:<12}missing: {package.without}; pip install {package.distribution}"
    yield "all at once: pip install 'yolov9-fast[all]'"


def _operators() -> Iterable[str]:
    width = max(8, *(len(name) + 1 for name in list_backends()))
    for operator in operators.values():
        yield f"{operator.name}: {operator.summary}; backend {get_backend(operator.name)}"
        for name in sorted(list_backends(), key="eager".__ne__):
            reason = operator.why_not(name) or _without_gpu(name)
            yield f"  {name:<{width}}{'yes' if reason is None else f'no   {reason}'}"


def _without_gpu(name: str) -> str | None:
    if backends[name].devices == ("cuda",) and not torch.cuda.is_available():
        return "it is compiled, but torch sees no GPU"
    return None


def _environment() -> Iterable[str]:
    found = [name for name in sorted(os.environ) if name.startswith(_VARIABLES)]
    yield from (f"{name}={os.environ[name]}" for name in found)
    if not found:
        yield "no relevant variable is set"


def _version_of(distribution: str) -> str | None:
    """Its version; some distributions provide a module under another name, then None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version_line(program: str, word: str) -> str | None:
    """The first line of `program --version` that holds `word`, or None when it cannot be run."""
    path = shutil.which(program)
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next((line.strip() for line in done.stdout.splitlines() if word in line and line.strip()), None)
