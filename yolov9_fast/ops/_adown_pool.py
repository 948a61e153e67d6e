"""Pooling of the down-sampling blocks ADown and AConv (YOLOv9, arXiv 2402.13616, appendix), in one pass.

Average pool 2×2, stride 1; for ADown its two channel halves apart: the first as it is, the second after a max pool 3×3,
stride 2, padding 1. The average of the second half never reaches the memory, and both results are dense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov9_fast._layout import check_map, in_layout_of, memory_format_of
from yolov9_fast.ops import _library as library
from yolov9_fast.ops._backend import Implementation, Operator, not_on, register, select
from yolov9_fast.ops._interpreted import runs_triton, triton_launcher, triton_missing


def adown_pool(x: Tensor, split: bool = True) -> tuple[Tensor, Tensor | None]:
    """The pooled halves of `x` [B, C, H, W]: [B, C/2, H − 1, W − 1] and [B, C/2, H // 2, W // 2].

    `split=False` (AConv): the average of all channels, [B, C, H − 1, W − 1], and None. Differentiable once, as torch's
    `avg_pool2d` and `max_pool2d` are: the first maximum of a window gets the gradient. Raises `TypeError`/`ValueError`
    that name the argument: H and W of at least 2, C even where it is split.
    """
    check_map("adown_pool", "x", x)
    if min(x.shape[2:]) < 2:
        raise ValueError(f"adown_pool: x must be at least 2 pixels high and wide, got {list(x.shape)}")
    if split and (x.shape[1] % 2 or x.shape[1] == 0):
        raise ValueError(f"adown_pool: x must have an even number of channels to split, got {list(x.shape)}")
    first, second = select(OPERATOR, x, split)(x, split)
    return first, second


def adown_pool_reference(x: Tensor, split: bool = True) -> tuple[Tensor, Tensor | None]:
    """The definition, in eager PyTorch."""
    average = F.avg_pool2d(x, 2, 1)
    if not split:
        return average, None
    first, second = average.chunk(2, 1)
    return first, F.max_pool2d(second, 3, 2, 1)


@dataclass(frozen=True)
class _Kernels:
    """One implementation's two raw operators, and its name in `_kernels`."""

    name: str
    forward: Callable[[Tensor, bool], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor | None, Tensor | None, Tensor, bool], Tensor]

    def __call__(self, x: Tensor, split: bool) -> tuple[Tensor, Tensor | None]:
        first, second = _ADownPool.apply(self.name, x, split)
        return first, second if split else None


class _ADownPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, x: Tensor, split: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.name = name
        ctx.split = split
        (source,) = in_layout_of(x, [x])
        ctx.save_for_backward(source)
        first, second = _kernels[name].forward(source, split)
        if not split:
            ctx.mark_non_differentiable(second)
        return first, second

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_first: Tensor | None, d_second: Tensor | None) -> tuple[None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        if not ctx.split:
            d_second = None
        if d_first is None and d_second is None:
            return None, None, None
        first, second = (None if d is None else in_layout_of(x, [d])[0] for d in (d_first, d_second))
        return None, _kernels[ctx.name].backward(first, second, x, ctx.split), None


def forward_reference(x: Tensor, split: bool) -> tuple[Tensor, Tensor]:
    """The raw operator `adown_pool_forward`, defined; the second result is empty where nothing is split."""
    first, second = adown_pool_reference(x, split)
    memory_format = memory_format_of(x)
    if second is None:
        return first.contiguous(memory_format=memory_format), x.new_empty((0,))
    return tuple(torch.empty_like(y, memory_format=memory_format).copy_(y) for y in (first, second))  # type: ignore[return-value]


def backward_reference(d_first: Tensor | None, d_second: Tensor | None, x: Tensor, split: bool) -> Tensor:
    """The raw operator `adown_pool_backward`, defined; None stands for a gradient of zeros."""
    half = x.shape[1] // 2 if split else x.shape[1]
    average = F.avg_pool2d(x, 2, 1)
    d_average = torch.zeros_like(average)
    if d_first is not None:
        d_average[:, :half] = d_first
    if split and d_second is not None:
        second = average[:, half:].contiguous()
        indices = F.max_pool2d_with_indices(second, [3, 3], [2, 2], [1, 1])[1]
        d_average[:, half:] = torch.ops.aten.max_pool2d_with_indices_backward(
            d_second, second, [3, 3], [2, 2], [1, 1], [1, 1], False, indices
        )
    dx: Tensor = torch.ops.aten.avg_pool2d_backward(d_average, x, [2, 2], [1, 1], [0, 0], False, True, None)
    return dx.contiguous(memory_format=memory_format_of(x))


def _fake_forward(x: Tensor, split: bool) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    first = channels // 2 if split else channels

    def new(count: int, h: int, w: int) -> Tensor:
        return torch.empty((batch, count, h, w), dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))

    second = new(channels - first, height // 2, width // 2) if split else x.new_empty((0,))
    return new(first, height - 1, width - 1), second


def _fake_backward(d_first: Tensor | None, d_second: Tensor | None, x: Tensor, split: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


_FORWARD = "(Tensor x, bool split) -> (Tensor, Tensor)"
_BACKWARD = "(Tensor? d_first, Tensor? d_second, Tensor x, bool split) -> Tensor"
_kernels = {
    "cpu": _Kernels(
        "cpu",
        library.define(f"adown_pool_forward{_FORWARD}", fake=_fake_forward, reference=forward_reference),
        library.define(f"adown_pool_backward{_BACKWARD}", fake=_fake_backward, reference=backward_reference),
    ),
    "triton": _Kernels(
        "triton",
        library.define(
            f"adown_pool_forward_triton{_FORWARD}",
            fake=_fake_forward,
            reference=triton_launcher("adown_pool", "adown_pool_forward"),
        ),
        library.define(
            f"adown_pool_backward_triton{_BACKWARD}",
            fake=_fake_backward,
            reference=triton_launcher("adown_pool", "adown_pool_backward"),
        ),
    ),
}


def _supports_cpu(x: Tensor, split: bool = True) -> str | None:
    return not_on("cpu", x)


def _supports_triton(x: Tensor, split: bool = True) -> str | None:
    return runs_triton("adown_pool", x)


OPERATOR = register(
    Operator(
        "adown_pool",
        "average pool, and max pool of its second half, in one pass",
        {
            "eager": Implementation(adown_pool_reference),
            "cpu": Implementation(_kernels["cpu"], library.missing("adown_pool_forward", "cpu"), _supports_cpu),
            "triton": Implementation(_kernels["triton"], triton_missing(), _supports_triton),
        },
        order=("cpu", "triton", "eager"),
    )
)
