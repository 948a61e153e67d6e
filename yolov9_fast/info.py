"""What this installation is and can do: versions, what was compiled, optional packages, which operator runs where."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import yolov9_fast
from yolov9_fast._untrusted import reason
from yolov9_fast.engine.busy import SETTINGS, WAYS, busy_policy, loaded_libgomp, observable
from yolov9_fast.engine.device import automatic_amp, cpu_bf16_units, has_bf16
from yolov9_fast.ops import _library as library
from yolov9_fast.ops import _probe
from yolov9_fast.ops._backend import backends, get_backend
from yolov9_fast.ops._operator import Operator, list_backends, operators


@dataclass(frozen=True)
class OptionalPackage:
    """A package that only some commands need, and what is lost without it."""

    module: str
    distribution: str
    without: str


OPTIONAL = (
    OptionalPackage("cv2", "opencv-python-headless", "no reading of images and videos: no train, val, predict, demo"),
    OptionalPackage("simplejpeg", "simplejpeg", "JPEG files are decoded by OpenCV, which takes longer"),
    OptionalPackage("pycocotools", "pycocotools", "no COCO AP: no val, and no AP while training"),
    OptionalPackage("tqdm", "tqdm", "no train, val and demo"),
    OptionalPackage("matplotlib", "matplotlib", "no plots"),
    OptionalPackage("tensorboard", "tensorboard", "no TensorBoard logs"),
    OptionalPackage("triton", "triton", "no Triton kernels on NVIDIA GPUs"),
)
_VARIABLES = ("YOLOV9_FAST_", "OMP_NUM_THREADS", *SETTINGS, "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")


def environment_report() -> str:
    """Versions, GPUs, build, optional packages, operators × backends; each thing that is missing with its reason."""
    sections = (
        ("Versions", _versions()),
        ("Processor", _processor()),
        ("GPUs", _gpus()),
        ("Busy machine", _when_busy()),
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
    yield f"nvcc        {_version_line('nvcc', 'release') or 'not found'}"
    yield f"compiler    {_version_line(os.environ.get('CXX', 'c++'), '') or 'not found'}"


def _when_busy() -> Iterable[str]:
    """What the commands do while other processes compute, and why."""
    policy = busy_policy(os.environ, observable=observable())
    yield f"{policy.way:<12}{WAYS[policy.way]} ({policy.why})"
    if policy.way != "off" and not loaded_libgomp():
        yield "            this torch has another OpenMP than libgomp: its waits stay as they are"


def _processor() -> Iterable[str]:
    """Whether it computes in bfloat16, and which precision `--amp auto` means on it."""
    yield f"bf16        {' and '.join(cpu_bf16_units()) or 'emulated: slow'}"
    yield "amp auto    {}: {}".format(*automatic_amp(torch.device("cpu")))


def _gpus() -> Iterable[str]:
    """Each GPU and the backends that run on it, found out by a launch; why there is none."""
    yield f"driver      {_driver()}"
    if not torch.cuda.is_available():
        yield f"none        {_why_no_gpu()}"
        return
    for index in range(torch.cuda.device_count()):
        try:
            yield from _gpu(torch.device("cuda", index))
        except RuntimeError as error:  # one that another process has for itself, or that is broken
            yield f"cuda:{index}      cannot be used: {reason(error)}"


def _gpu(device: torch.device) -> Iterable[str]:
    found = torch.cuda.get_device_properties(device)
    nvidia = torch.version.hip is None
    kind = f"sm_{found.major}{found.minor}" if nvidia else "AMD"
    yield f"{device!s:<12}{found.name}, {kind}, {found.total_memory / 2**30:.1f} GiB"
    yield f"  bf16      {'native' if has_bf16(device) else 'emulated: slow, and `--amp auto` does not take it'}"
    if nvidia:
        convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
        words = [
            f"{what} {'on' if settings.fp32_precision == 'tf32' else 'off'}"
            for what, settings in (("convolutions", convolutions), ("matrix products", products))
        ]
        yield f"  TF32      {', '.join(words)}; in float32, by torch.backends"
    for backend in _probe.LAUNCHES:
        yield f"  {backend:<10}{_answer(backends[backend].why_not() or _probe.tried(backend, device.index))}"


def _driver() -> str:
    """Its version, and the newest CUDA that it knows."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "none: no NVIDIA driver is loaded"
    match = re.search(r"Module.*?(\d+\.\d[\d.]*)", text)
    version = match.group(1) if match else "of an unknown version"
    known = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    return f"NVIDIA {version}" + (f", for CUDA up to {known // 1000}.{known % 1000 // 10}" if known else "")


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for CPUs"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"torch sees no GPU: {reason(error)}"
    return "torch sees no GPU"


def _answer(why_not: str | None) -> str:
    return "yes" if why_not is None else f"no   {why_not}"


def _build() -> Iterable[str]:
    info = library.build_info()
    if tree := library.uncompiled_tree():
        yield tree
    if info:
        yield f"built against torch {info.get('torch')}, {'portable' if info.get('portable') else 'for this CPU only'}"
    for backend, why_not in library.loaded.items():
        if why_not is not None:
            yield f"{backend:<5}no   {why_not}"
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
            yield f"  {name:<{width}}{_answer(operator.why_not(name) or _without_gpu(operator, name))}"


def _without_gpu(operator: Operator[Any], name: str) -> str | None:
    """Why there is no GPU that the operator's backend can run on; None where there is one."""
    if backends[name].devices != ("cuda",):
        return None
    if not torch.cuda.is_available():
        return "it is compiled, but torch sees no GPU"
    implementation = operator.found(name)
    if implementation is None or not implementation.probed:
        return None
    found = [_probe.tried(implementation.probed, index) for index in range(torch.cuda.device_count())]
    return f"no GPU runs it: {found[0]}" if found and all(found) else None


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
