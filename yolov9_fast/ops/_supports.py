"""What the `supports` functions of implementations ask about their arguments; plain Python: torch.compile traces it."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from yolov9_fast.ops import _probe
from yolov9_fast.ops._backend import chosen


def supports_anything(*args: Any) -> str | None:
    """`supports` of an implementation that takes all arguments of the operator."""
    return None


def not_on(device: str, *tensors: Tensor) -> str | None:
    """The reason when a tensor is on another type of device than `device` ("cpu", "cuda")."""
    for tensor in tensors:
        if tensor.device.type != device:
            return f"it needs tensors on {device}, got one on {tensor.device.type}"
    return None


def not_for_compiled(device: str, *tensors: Tensor) -> str | None:
    """The reason when a tensor is on another type of device, or on a GPU that the compiled kernels cannot run on."""
    reason = not_on(device, *tensors)
    return _probe.why_not("cuda", tensors[0].device) if reason is None and device == "cuda" else reason


def needs_gradient(*tensors: Tensor) -> str | None:
    """For an implementation without a backward: the reason when autograd would record the call."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "it has no gradient, and an argument requires one"
    return None


def not_for_triton(op: str, *tensors: Tensor) -> str | None:
    """The reason when the tensors are float64, or neither on a GPU that can run Triton's kernels nor interpreted.

    `TRITON_INTERPRET=1` interprets, on the CPU.
    """
    devices = set()
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return "it computes in float32, got float64"
        devices.add(tensor.device.type)
    if devices == {"cuda"}:
        return _probe.why_not("triton", tensors[0].device)
    if devices != {"cpu"}:
        return f"it needs tensors on cuda, got {', '.join(sorted(devices))}"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs tensors on cuda; on the cpu it is only interpreted, with TRITON_INTERPRET=1"
    # Interpreted kernels are thousands of times slower: they check the arithmetic and never run under "auto".
    return None if chosen(op) == "triton" else "interpreted Triton runs only when selected by name"
