"""Checks of arguments that several operators share; each raises an error that names the argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_map(name: str, x: object) -> None:
    """Raises `TypeError` or `ValueError` unless `x` is a floating-point tensor [B, C, H, W]."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATING:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a tensor of float32, float64, bfloat16 or float16, got {got}")
    if x.ndim != 4:
        raise ValueError(f"{name}: expected [B, C, H, W], got {list(x.shape)}")


def check_floating(name: str, x: object) -> None:
    """Raises `TypeError` unless `x` is a floating-point tensor."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a floating-point tensor, got {got}")


def check_vector(name: str, vector: Tensor | None, x: Tensor) -> None:
    """Raises `ValueError` unless `vector` is None or has one element for each channel of `x`."""
    if vector is not None and vector.shape != x.shape[1:2]:
        raise ValueError(f"{name}: expected [{x.shape[1]}], got {list(vector.shape)}")


def check_like(name: str, given: Tensor, shape: Sequence[int], device: torch.device) -> None:
    """Raises `ValueError` for another shape or device."""
    if list(given.shape) != list(shape):
        raise ValueError(f"{name}: expected {list(shape)}, got {list(given.shape)}")
    if given.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {given.device}")


def check_out(name: str, out: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """Raises `ValueError` or `TypeError` unless `out` can be written to: this shape, the dtype and device of `like`."""
    check_map(name, out)
    check_like(name, out, shape, like.device)
    if out.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype}, got {out.dtype}")
    if out.requires_grad:
        raise ValueError(f"{name}: expected a tensor that requires no gradient: it is overwritten")


def check_one_device(**tensors: Tensor | None) -> None:
    """Raises `ValueError` unless all tensors (None apart) are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{', '.join(devices)}: expected tensors on one device, got {found}")
