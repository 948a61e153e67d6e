"""Where Triton kernels run: on CUDA tensors; interpreted on CPU tensors with TRITON_INTERPRET=1 when asked for."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from yolov9_fast.ops._backend import get_backend


def triton_missing() -> str | None:
    """Why no Triton implementation can run on this machine; None when Triton is installed. Imports nothing of it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return None


def runs_triton(op: str, *tensors: Tensor) -> str | None:
    """For `supports`: the reason when the tensors are float64, or neither on CUDA nor to be interpreted."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "it computes in float32, got float64"
    devices = {tensor.device.type for tensor in tensors}
    if devices == {"cuda"}:
        return None
    if devices != {"cpu"}:
        return f"it needs tensors on cuda, got {', '.join(sorted(devices))}"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs tensors on cuda; on the cpu it is only interpreted, with TRITON_INTERPRET=1"
    # Interpreted kernels are thousands of times slower: a check of their arithmetic, never what "auto" means.
    return None if get_backend(op) == "triton" else "interpreted Triton runs only when asked for by name"


def triton_launcher(module: str, name: str) -> Callable[..., Any]:
    """The function `name` of `yolov9_fast.kernels.MODULE`, imported at its first call: only then Triton is needed."""

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"yolov9_fast.kernels.{module}"), name)(*args)

    return launch
