"""Faults to plant into the forward and the backward of a unit: waits, copies, layouts, casts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _branch(x: Tensor) -> Any:
    return 1 if x.sum() > 0 else 0


def _fill_masked(x: Tensor) -> Any:
    x = x.detach().clone()
    x[x > 0] = 0.0
    return x


PLANTS: dict[str, Callable[[Tensor], Any]] = {
    "nothing": lambda x: None,
    "item": lambda x: x.sum().item(),
    "branch": _branch,
    "tolist": lambda x: x.sum((1, 2, 3)).tolist(),
    "cpu": lambda x: x.detach().cpu(),
    "cpu_without_waiting": lambda x: x.detach().to("cpu", non_blocking=True),
    "numpy": lambda x: x.detach().cpu().float().numpy(),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "to_device": lambda x: torch.zeros(3).to(x.device),
    "contiguous": lambda x: x.contiguous(),
    "nchw": lambda x: torch.zeros_like(x, memory_format=torch.contiguous_format),
    "mask": lambda x: x[x > 0],
    "fill_masked": _fill_masked,
    "nonzero": lambda x: x.nonzero(),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "float": lambda x: x.float(),
}
