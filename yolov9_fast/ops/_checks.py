"""Checks of arguments that several operators share; each raises an error that names the argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_map(name: str, x: object) -> None:
    """Raises `TypeError` or `ValueError` unless `x` is a floating-point tensor [B, C, H, W]; only B may be 0."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATING:
        raise TypeError(f"{name}: expected a tensor of float32, float64, bfloat16 or float16, got {described(x)}")
    if x.ndim != 4:
        raise ValueError(f"{name}: expected [B, C, H, W], got {list(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{name}: expected [B, C, H, W] with C, H and W of at least 1, got {list(x.shape)}")


def maps_of(name: str, maps: object, *, single: bool = False) -> list[Tensor]:
    """The list of several maps, with `single` also of one; `TypeError` for what is no list or tuple of them."""
    if single and isinstance(maps, Tensor):
        return [maps]
    if not isinstance(maps, list | tuple):
        wanted = "a tensor or a list of tensors" if single else "a list of tensors"
        raise TypeError(f"{name}: expected {wanted}, got {described(maps)}")
    return list(maps)


def described(value: object) -> str:
    """What an argument of a wrong type is: a tensor's dtype, or the type."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def check_floating(name: str, x: object) -> None:
    """Raises `TypeError` unless `x` is a floating-point tensor."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {described(x)}")


def check_vectors(x: Tensor, names: Sequence[str], vectors: Sequence[Tensor | None], prefix: str = "") -> None:
    """Raises `TypeError` or `ValueError` unless each vector is None or [C] on the device and in the dtype of `x`.

    As in torch's batch_norm, or in float32 where `x` has half of its bits.
    """
    channels, device = x.shape[1:2], x.device
    allowed = (x.dtype, torch.float32) if x.dtype in HALF else (x.dtype,)
    for name, vector in zip(names, vectors, strict=True):
        # One call for all of them, hundreds of times in a training step: what is right needs no other function.
        if vector is None or (
            isinstance(vector, Tensor)
            and vector.dtype in allowed
            and vector.shape == channels
            and vector.device == device
        ):
            continue
        check_floating(prefix + name, vector)
        check_like(prefix + name, vector, channels, device)
        raise TypeError(f"{prefix}{name}: expected {' or '.join(map(str, allowed))}, got {vector.dtype}")


def check_integers(name: str, x: object) -> None:
    """Raises `TypeError` unless `x` is a tensor of integers."""
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer tensor, got {described(x)}")


def check_like(name: str, given: Tensor, shape: Sequence[int], device: torch.device) -> None:
    """Raises `TypeError` for anything but a tensor, `ValueError` for another shape or device."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {described(given)}")
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
    if out.requires_grad or 0 in out.stride():
        check_writable(name, out)


def check_writable(name: str, out: Tensor) -> None:
    """Raises `ValueError` for a tensor that requires a gradient or whose elements share memory: it is overwritten."""
    if out.requires_grad:
        raise ValueError(f"{name}: expected a tensor that requires no gradient: it is overwritten, got one that does")
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(f"{name}: expected elements in memory of their own, got strides {list(out.stride())}")


def check_one_device(**tensors: Tensor | None) -> None:
    """Raises `ValueError` unless all tensors (None apart) are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{', '.join(devices)}: expected tensors on one device, got {found}")
