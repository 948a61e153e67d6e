"""Registration with PyTorch: schemas and fakes in Python, compiled kernels from `_C_*.so` where present.

A schema exists whether or not a compiled file loads, so the package imports, traces and runs in eager PyTorch without
one. `YOLOV9_FAST_SKIP_LOADING=1` loads none; `YOLOV9_FAST_LIBRARY_FOLDER` loads them from another folder, such as that
of a build with sanitizers.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from yolov9_fast._lazy import when_imported

NAMESPACE = "yolov9_fast"
PACKAGE_FOLDER = Path(__file__).resolve().parent.parent
_DEVICE_OF_BACKEND = {"cpu": "CPU", "cuda": "CUDA"}

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_defined: dict[str, Callable[..., Any]] = {}


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    flops: Callable[..., int] | None = None,
) -> Callable[..., Any]:
    """Register one operator and return it, `torch.ops.yolov9_fast.NAME.default`.

    `schema`: as `box_iou(Tensor a, Tensor b) -> Tensor`. `fake`: same arguments, returns empty tensors of the right
    shape, stride, dtype and device. `reference`: eager PyTorch; it runs where there is no compiled implementation.
    `flops`: floating-point operations of a call by the shapes of its arguments, for `FlopCounterMode`.
    A schema that is registered already is not registered again.
    """
    name = schema.split("(", 1)[0]
    if schema not in _defined:
        _library.define(schema)
        _library.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        packet = getattr(getattr(torch.ops, NAMESPACE), name)
        if flops is not None:
            _count_flops(packet, flops)
        # The overload itself: finding it at each call would cost more than some of these kernels.
        _defined[schema] = packet.default
    return _defined[schema]


def _count_flops(packet: Any, flops: Callable[..., int]) -> None:
    module = "torch.utils.flop_counter"  # imports triton
    when_imported(module, lambda: sys.modules[module].register_flop_formula(packet)(flops))


def why_not_compiled(name: str, backend: str) -> str | None:
    """Why kernel `name` is not compiled for `backend` ("cpu" or "cuda") here; None when it is."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", _DEVICE_OF_BACKEND[backend]):
        return None
    return loaded[backend] or f"_C_{backend}.so holds no {name}; install the package again to compile it"


def not_nvidia() -> str | None:
    """Why nothing that is made for NVIDIA's GPUs can run with this torch; None with another than one for AMD's."""
    version = torch.version.hip
    return version and f"for NVIDIA GPUs only, this torch is for AMD's (ROCm {version}): operators run in eager PyTorch"


def build_info() -> dict[str, Any]:
    """What the installation compiled and why not the rest, from `_build_info.json`; empty before any installation."""
    try:
        info = json.loads((_folder() / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def _folder() -> Path:
    return Path(os.environ.get("YOLOV9_FAST_LIBRARY_FOLDER") or PACKAGE_FOLDER)


def _load(backend: str, info: dict[str, Any]) -> str | None:
    """Load `_C_BACKEND.so`; the reason when that cannot be."""
    if os.environ.get("YOLOV9_FAST_SKIP_LOADING", "").strip().lower() not in ("", "0", "false", "no", "off"):
        return "YOLOV9_FAST_SKIP_LOADING is set"
    if backend == "cuda" and (elsewhere := not_nvidia()):
        return elsewhere
    path = _folder() / f"_C_{backend}.so"
    if not path.exists():
        part = info.get("parts", {}).get(backend) or {}
        return f"not compiled: {part.get('reason') or 'the package was not installed (pip install)'}"
    lacking = sorted(set(info.get("cpu_features", [])) - _cpu_features()) if backend == "cpu" else []
    if lacking:
        return (
            f"compiled for a CPU with {', '.join(lacking)}, which this one lacks; compile with YOLOV9_FAST_PORTABLE=1"
        )
    if info.get("machine", platform.machine()) != platform.machine():
        return f"compiled for {info['machine']}, this machine is {platform.machine()}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name} cannot be loaded: {error}"
    return None


def uncompiled_tree() -> str | None:
    """What to do where Python has found the package's sources, which no installation has compiled; None elsewhere."""
    if build_info() or loaded["cpu"] is None or not loaded["cpu"].startswith("not compiled"):
        return None
    text = f"{PACKAGE_FOLDER} is not compiled: all operators run in eager PyTorch"
    for entry in sys.path:
        other = Path(entry or ".").resolve() / PACKAGE_FOLDER.name
        if other != PACKAGE_FOLDER and (other / "_build_info.json").exists():
            return f"{text}; start Python in another folder to use the installation in {other}"
    return f"{text}; compile with `pip install`"


def _warn_once() -> None:
    text = uncompiled_tree()
    if text and os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None:
        logging.getLogger("yolov9_fast").warning(text)


def _cpu_features() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return set(match.group(1).split()) if match else set()


loaded: dict[str, str | None] = {}
"""For each compiled part ("cpu", "cuda"): None once loaded, else the reason."""

_info = build_info()
loaded.update({_backend: _load(_backend, _info) for _backend in _DEVICE_OF_BACKEND})
_warn_once()
