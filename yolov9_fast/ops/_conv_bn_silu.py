"""The whole unit: convolution, BatchNorm, SiLU (+ residual), written where its consumer reads it.

z = SiLU(γ (y − μ) / √(σ² + ε) + β) + r with y = conv(x); every block of YOLOv9 (arXiv 2402.13616, section 4) is made of
it. Composed of PyTorch's convolution, or `conv1x1` where that reads several tensors or a slice in place, and `bn_silu`;
with BatchNorm folded into the convolution, of the convolution and one pass for bias, SiLU and residual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov9_fast.ops._bn_silu import bias_silu, bn_silu
from yolov9_fast.ops._cbfuse import cbfuse
from yolov9_fast.ops._conv1x1 import conv1x1


class Upsampled(NamedTuple):
    """A map [B, C, H, W] standing for its nearest-neighbour enlargement [B, C, factor·H, factor·W]."""

    source: Tensor
    factor: int

    def materialise(self) -> Tensor:
        return F.interpolate(self.source, scale_factor=self.factor, mode="nearest")


Sources = Tensor | Sequence[Tensor | Upsampled]
"""What a convolution reads: a map, or several whose concatenation along the channels it takes."""
Place = Tensor | Callable[[Tensor], Tensor]
"""Where to write: a tensor, or what makes one once the convolution's output is known."""


class Convolution(NamedTuple):
    """A convolution's weight [O, I / groups, k, k], bias [O] or None, and geometry, as `F.conv2d` takes them."""

    weight: Tensor
    bias: Tensor | None = None
    stride: int | tuple[int, ...] = 1
    padding: str | int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1

    @property
    def pointwise(self) -> bool:
        """Whether it is a plain 1×1 convolution, a matrix product over pixels."""
        one, none = (1, (1, 1)), (0, (0, 0))
        size = tuple(self.weight.shape[2:]) == (1, 1)
        return size and self.groups == 1 and self.stride in one and self.padding in none and self.dilation in one


def convolve(x: Sources, conv: Convolution) -> Tensor:
    """The convolution of `x`; several maps stand for their concatenation along the channels.

    A 1×1 convolution reads them, and slices of wider buffers, where they lie. It takes enlarged maps at their own size,
    since it commutes with the enlargement: only its result is enlarged, while it is added.
    """
    if isinstance(x, Tensor):
        if conv.pointwise and not _dense(x):
            return conv1x1(x, conv.weight, conv.bias)
    elif conv.pointwise and isinstance(x[-1], Tensor):
        return _pointwise(x, conv)
    return F.conv2d(joined(x), conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def joined(x: Sources) -> Tensor:
    """One map of what may be several."""
    if isinstance(x, Tensor):
        return x
    return torch.cat([part if isinstance(part, Tensor) else part.materialise() for part in x], 1)


def _pointwise(parts: Sequence[Tensor | Upsampled], conv: Convolution) -> Tensor:
    """Σ W_i x_i over the parts; the last is a map of the full size."""
    small = [part for part in parts if not isinstance(part, Tensor)]
    if not small:
        return conv1x1([part for part in parts if isinstance(part, Tensor)], conv.weight, conv.bias)
    widths = [(part if isinstance(part, Tensor) else part.source).shape[1] for part in parts]
    weights = conv.weight.split(widths, 1)
    full, full_weights, sums = [], [], []
    for part, weight in zip(parts, weights, strict=True):
        if isinstance(part, Tensor):
            full.append(part)
            full_weights.append(weight)
        else:
            sums.append(convolve(part.source, Convolution(weight)))
    weight = full_weights[0] if len(full) == 1 else torch.cat(full_weights, 1)
    return cbfuse(sums, convolve(full[0] if len(full) == 1 else full, Convolution(weight, conv.bias)))


def conv_bn_silu(
    x: Sources,
    conv: Convolution,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    out: Place | None = None,
    activation: bool = True,
    group: Any = None,
) -> Tensor:
    """SiLU(BatchNorm(convolution(x))) (+ residual).

    Args:
        x: [B, I, H, W], or several maps whose channels add up to I, standing for their concatenation.
        conv: the convolution.
        weight, bias, running_mean, running_var, training, momentum, eps, residual, activation, group: as in `bn_silu`.
        out: slice to write into, or a function of the convolution's output that gives one; None makes a new tensor.

    Returns:
        [B, O, H', W'] in the convolution's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    y = convolve(x, conv)
    return bn_silu(
        y,
        weight,
        bias,
        running_mean,
        running_var,
        training=training,
        momentum=momentum,
        eps=eps,
        residual=residual,
        out=out(y) if callable(out) else out,
        activation=activation,
        group=group,
    )


def conv_bias_silu(
    x: Sources,
    conv: Convolution,
    *,
    residual: Tensor | None = None,
    out: Place | None = None,
    activation: bool = True,
) -> Tensor:
    """SiLU(convolution(x) + bias) (+ residual): the unit with its BatchNorm folded in.

    Without gradients one pass follows the convolution, in place or into `out`. A CPU's convolution adds the bias on its
    way; a GPU's leaves it to a pass of its own, so there it joins the SiLU. Arguments as in `conv_bn_silu`.
    """
    if torch.is_grad_enabled():
        y = convolve(x, conv)
        y = F.silu(y) if activation else y
        return y if residual is None else y + residual
    on_the_way = conv.weight.device.type == "cpu"
    y = convolve(x, conv if on_the_way else conv._replace(bias=None))
    place = out(y) if callable(out) else out
    place = y if place is None else place
    if not on_the_way:
        return bias_silu(y, conv.bias, residual=residual, out=place, activation=activation)
    if activation:
        torch.ops.aten.silu.out(y, out=place)
    elif place is not y:
        place.copy_(y)
    return place if residual is None else place.add_(residual)


def conv_bn_silu_reference(
    x: Sources,
    conv: Convolution,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    activation: bool = True,
) -> Tensor:
    """The definition, in eager PyTorch."""
    y = F.conv2d(joined(x), conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    y = F.batch_norm(y, running_mean, running_var, weight, bias, training, momentum, eps)
    y = F.silu(y) if activation else y
    return y if residual is None else y + residual


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
