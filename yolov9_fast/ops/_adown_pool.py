"""Pooling of the down-sampling blocks ADown and AConv (YOLOv9, arXiv 2402.13616, appendix), in one pass.

Average pool 2×2, stride 1; for ADown the first half of the channels is returned, the second half goes through a max
pool 3×3, stride 2, padding 1. The average of the second half is never written to memory; both results are dense.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov9_fast._layout import dense, empty_map, in_layout_of, memory_format_of
from yolov9_fast.ops._checks import check_map
from yolov9_fast.ops._operator import AutogradFunction, Compiled, Kernel, Operator, Python, once_differentiable
from yolov9_fast.ops._supports import not_for_triton, not_on


def adown_pool(x: Tensor, split: bool = True) -> tuple[Tensor, Tensor | None]:
    """The pooled halves of `x` [B, C, H, W]: [B, C/2, H − 1, W − 1] and [B, C/2, H // 2, W // 2].

    `split=False` (AConv): the average of all channels, [B, C, H − 1, W − 1], and None. Differentiable once, as torch's
    `avg_pool2d` and `max_pool2d` are: the first maximum of a window gets the gradient. Raises `TypeError`/`ValueError`
    that name the argument: H and W of at least 2, C even where it is split.
    """
    check_map("x", x)
    if min(x.shape[2:]) < 2:
        raise ValueError(f"x: expected a height and width of at least 2, got {list(x.shape)}")
    if split and (x.shape[1] % 2 or x.shape[1] == 0):
        raise ValueError(f"x: expected an even number of channels to split, got {list(x.shape)}")
    first, second = OPERATOR(x, split)
    return first, second


def adown_pool_reference(x: Tensor, split: bool = True) -> tuple[Tensor, Tensor | None]:
    """The definition, in eager PyTorch."""
    average = F.avg_pool2d(x, 2, 1)
    if not split:
        return average, None
    first, second = average.chunk(2, 1)
    return first, F.max_pool2d(second, 3, 2, 1)


# ---- kernels


def forward_reference(x: Tensor, split: bool) -> tuple[Tensor, Tensor]:
    """Kernel `adown_pool_forward`; the second result is empty without `split`."""
    first, second = adown_pool_reference(x, split)
    memory_format = memory_format_of(x)
    if second is None:
        return dense(first, memory_format), x.new_empty((0,))
    return first.clone(memory_format=memory_format), second.clone(memory_format=memory_format)


def backward_reference(d_first: Tensor | None, d_second: Tensor | None, x: Tensor, split: bool) -> Tensor:
    """Kernel `adown_pool_backward`: the gradient of `x`; None stands for a gradient of zeros."""
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
    return dense(dx, memory_format_of(x))


def _fake_forward(x: Tensor, split: bool) -> tuple[Tensor, Tensor]:
    _, channels, height, width = x.shape
    first = channels // 2 if split else channels
    second = empty_map(x, channels - first, (height // 2, width // 2)) if split else x.new_empty((0,))
    return empty_map(x, first, (height - 1, width - 1)), second


def _fake_backward(d_first: Tensor | None, d_second: Tensor | None, x: Tensor, split: bool) -> Tensor:
    return empty_map(x)


class _Kernels(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., Any]


KERNELS = _Kernels(
    Kernel("adown_pool_forward(Tensor x, bool split) -> (Tensor, Tensor)", forward_reference, _fake_forward),
    Kernel(
        "adown_pool_backward(Tensor? d_first, Tensor? d_second, Tensor x, bool split) -> Tensor",
        backward_reference,
        _fake_backward,
    ),
)


# ---- gradient


def _run(kernels: _Kernels, x: Tensor, split: bool) -> tuple[Tensor, Tensor | None]:
    first, second = _ADownPool.apply(kernels, x, split)
    return first, second if split else None


class _ADownPool(AutogradFunction):
    @staticmethod
    def forward(ctx: Any, kernels: _Kernels, x: Tensor, split: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.kernels = kernels
        ctx.split = split
        (source,) = in_layout_of(x, [x])
        ctx.save_for_backward(source)
        first, second = kernels.forward(source, split)
        if not split:
            ctx.mark_non_differentiable(second)
        return first, second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_first: Tensor | None, d_second: Tensor | None) -> tuple[None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        if not ctx.split:
            d_second = None
        if d_first is None and d_second is None:
            return None, None, None
        first, second = (None if d is None else in_layout_of(x, [d])[0] for d in (d_first, d_second))
        return None, ctx.kernels.backward(first, second, x, ctx.split), None


# ---- backends


def _supports_cpu(x: Tensor, split: bool) -> str | None:
    return not_on("cpu", x)


def _supports_triton(x: Tensor, split: bool) -> str | None:
    return not_for_triton("adown_pool", x)


def _triton() -> _Kernels:
    from yolov9_fast.kernels.adown_pool import adown_pool_backward, adown_pool_forward

    return _Kernels(adown_pool_forward, adown_pool_backward)


OPERATOR = Operator(
    "adown_pool",
    "average pool, and max pool of its second half, in one pass",
    reference=adown_pool_reference,
    kernels=KERNELS,
    run=_run,
    backends={"cpu": Compiled(_supports_cpu), "triton": Python(_triton, _supports_triton)},
)
