"""Convolution of one map, or of several as if they were concatenated, without copying slices and parts first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yolov9_fast.nn.weight_casts import casting, weight_of
from yolov9_fast.ops._cbfuse import cbfuse
from yolov9_fast.ops._conv1x1 import conv1x1
from yolov9_fast.ops._convs import convs_where_faster


class Upsampled(NamedTuple):
    """A map [B, C, H, W] that stands for its nearest-neighbour up-sampling [B, C, factor·H, factor·W]."""

    source: Tensor
    factor: int

    def materialise(self) -> Tensor:
        return F.interpolate(self.source, scale_factor=self.factor, mode="nearest")


Sources = Tensor | Sequence[Tensor | Upsampled]
"""The input of a convolution: one map, or several that stand for their concatenation along the channels."""


def joined(x: Sources) -> Tensor:
    """One map [B, ΣC, H, W] of what may be several."""
    if isinstance(x, Tensor):
        return x
    return torch.cat([part if isinstance(part, Tensor) else part.materialise() for part in x], 1)


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether `conv` is a plain 1×1 convolution, a matrix product over pixels."""
    return (
        tuple(conv.kernel_size) == (1, 1)
        and tuple(conv.stride) == (1, 1)
        and conv.padding in (0, (0, 0))
        and conv.groups == 1
    )


def is_same_size(conv: nn.Conv2d) -> bool:
    """Whether `conv` is a plain 3×3 or 1×1 convolution whose result has the size of its input."""
    kernel = tuple(conv.kernel_size)
    border = (kernel[0] // 2, kernel[0] // 2)
    return (
        kernel in ((3, 3), (1, 1))
        and tuple(conv.stride) == (1, 1)
        and conv.padding in (border[0], border)
        and tuple(conv.dilation) == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def convolve_small(x: Sources, *convolutions: nn.Conv2d) -> list[Tensor] | None:
    """The result of each convolution of `x`, all `is_same_size`, where `convs` is faster; None elsewhere."""
    if not isinstance(x, Tensor) or not x.is_cpu:
        return None
    weights = []
    for conv in convolutions:
        weight = weight_of(conv)
        if conv.bias is not None or weight.shape[1:] != (x.shape[1], *conv.kernel_size):
            return None
        weights.append(weight)
    return convs_where_faster(x, weights)


def convolve(
    x: Sources,
    conv: nn.Conv2d,
    pointwise: bool,
    *,
    add_bias: bool = True,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """The convolution of `x` by the weights of `conv` [B, O, H', W'].

    A 1×1 convolution (`pointwise`) reads several maps, and slices of wider buffers, in place. It commutes with
    nearest-neighbour up-sampling: an `Upsampled` part is convolved at its own size, and only the result is up-sampled.
    `memory_format`: in which the weights are read, so that the result has it too; None: as they are.
    """
    weight: Tensor | None
    bias: Tensor | None
    parameters = conv._parameters  # `conv.weight` would run a Python function of nn.Module
    if "weight" in parameters:
        weight, bias = parameters["weight"], parameters["bias"]
        assert weight is not None
    else:  # plain attributes, as in the replicas of DataParallel
        weight, bias = conv.weight, conv.bias
    if casting.weights is not None:
        weight = casting.weights.get(id(weight), weight)
    bias = bias if add_bias else None
    if memory_format is not None:
        weight = weight.contiguous(memory_format=memory_format)
    if isinstance(x, Tensor):
        if not pointwise and x.shape[2:] == (1, 1) and _needs_centre_alone(x, conv):
            row, column = (size // 2 for size in weight.shape[2:])
            weight = weight[:, :, row : row + 1, column : column + 1]
            return F.conv2d(x, weight, bias, 1, 0, 1, conv.groups)
        if not pointwise or x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
            return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return conv1x1(x, weight, bias)
    if pointwise and isinstance(x[-1], Tensor):
        return _sum_of_products(x, weight, bias)
    return F.conv2d(joined(x), weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _needs_centre_alone(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether `conv` of the one pixel of `x` is left to the centre of its kernel, which alone meets the pixel.

    PyTorch's gradient of the other weights (3×3, stride 2, bfloat16, CPU) is what lay in memory.
    """
    return (
        x.is_cpu
        and x.dtype == torch.bfloat16
        and tuple(conv.padding) == tuple(size // 2 for size in conv.kernel_size)
        and tuple(conv.dilation) == (1, 1)
    )


def _sum_of_products(parts: Sequence[Tensor | Upsampled], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Σ W_i x_i + bias over the parts; the last is a map of the full size."""
    if all(isinstance(part, Tensor) for part in parts):
        return conv1x1([part for part in parts if isinstance(part, Tensor)], weight, bias)
    widths = [(part if isinstance(part, Tensor) else part.source).shape[1] for part in parts]
    full, full_weights, small = [], [], []
    for part, part_weight in zip(parts, torch.split(weight, widths, 1), strict=True):
        if isinstance(part, Tensor):
            full.append(part)
            full_weights.append(part_weight)
        else:
            small.append(_product(part.source, part_weight))
    if len(full) == 1:
        return cbfuse(small, _product(full[0], full_weights[0], bias))
    return cbfuse(small, conv1x1(full, torch.cat(full_weights, 1), bias))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, weight, bias) if dense else conv1x1(x, weight, bias)
