"""The weights of a block's convolutions in the dtype of autocast: converted together, not by a launch for each."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from yolov9_fast.ops._operator import AutogradFunction, once_differentiable

DEVICE_TYPES = ("cuda", "cpu")


def is_autocast_enabled(*device_types: str) -> bool:
    """Whether autocast is in force for one of these (without arguments: of those whose weights are converted)."""
    return any(kind in DEVICE_TYPES and torch.is_autocast_enabled(kind) for kind in device_types or DEVICE_TYPES)


class _Casting(threading.local):
    """By the weight's id: the weight in the dtype of autocast."""

    weights: dict[int, Tensor] | None = None


casting = _Casting()


@contextlib.contextmanager
def cast_together(convolutions: Sequence[nn.Conv2d]) -> Iterator[None]:
    """Within the block `weight_of` gives the weights of these convolutions as autocast would convert them."""
    weights = [conv._parameters.get("weight") for conv in convolutions]
    device_type = next((weight.device.type for weight in weights if weight is not None), "")
    chosen = [
        weight
        for weight in weights
        if weight is not None
        and weight.requires_grad
        and weight.dtype == torch.float32
        and weight.device.type == device_type
    ]
    if casting.weights is not None or len(chosen) < 2 or not is_autocast_enabled(device_type):
        yield
        return
    cast = _Cast.apply(torch.get_autocast_dtype(device_type), *chosen)
    casting.weights = dict(zip(map(id, chosen), cast, strict=True))
    try:
        yield
    finally:
        casting.weights = None


def weight_of(conv: nn.Conv2d) -> Tensor:
    """The weight that a convolution computes with."""
    weight: Tensor = conv.weight
    if casting.weights is None:
        return weight
    return casting.weights.get(id(weight), weight)


class _Cast(AutogradFunction):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """Arguments: the dtype, then weights."""
        dtype, *weights = arguments
        ctx.set_materialize_grads(False)
        return _converted(weights, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        cast = iter(_converted([one for one in gradients if one is not None], torch.float32))
        return (None, *(None if one is None else next(cast) for one in gradients))


def _converted(tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    made = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if made:
        torch._foreach_copy_(made, tensors)
    return tuple(made)
