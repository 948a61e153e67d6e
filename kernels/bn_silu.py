"""BatchNorm and SiLU: out = silu((x − mean)·rstd·weight + bias) (+ residual), and its gradients.

Passes over a tensor: forward 3 (statistics read x; apply reads x, writes out), backward 5 (sums read dz, x; dx reads
dz, x, writes dx). Where a program holds all pixels of its channels in registers: 2 and 3, in one launch each.
With s = sigmoid(y): d silu/dy = s·(1 + y·(1 − s)); dx = weight·rstd·(dy − mean(dy) − x̂·mean(dy·x̂)).

The functions over a sequence of inputs also serve `rep_bn_silu`, which has two.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from yolov9_fast.kernels import bn_silu_single_pass, bn_silu_tiled
from yolov9_fast.kernels.batch_norm import Norm, bn_stats, channel_vectors, given, statistics
from yolov9_fast.kernels.launch import View, affine, dense_like, vector_in_float, vector_of, views
from yolov9_fast.kernels.replay import replayed

__all__ = [
    "bn_silu_apply",
    "bn_silu_backward",
    "bn_silu_backward_apply",
    "bn_silu_backward_sums",
    "bn_silu_forward",
    "bn_stats",
]
Unnormalised = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""An input [N, C, H, W], its weight and bias, its running mean and variance, [C] each."""
Normalised = tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]
"""An input [N, C, H, W], its weight and bias, its mean and rstd, [C] each."""


@replayed()
def bn_silu_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    out: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Training: batch statistics, running statistics, `out`; returns mean and rstd, float32 [C]."""
    mean, rstd = forward([(x, weight, bias, running_mean, running_var)], momentum, eps, residual, out, silu)
    return mean, rstd


@replayed()
def bn_silu_apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    out: Tensor,
    silu: bool,
) -> None:
    """`out`, which may be x itself, from given statistics."""
    apply([(x, weight, bias, mean, rstd)], residual, out, silu)


@replayed()
def bn_silu_backward(
    dz: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (like x), weight and bias (float32 [C]) through the batch statistics."""
    (dx,), (dbias, dweight) = backward(dz, [(x, weight, bias, mean, rstd)], silu)
    return dx, dweight, dbias


@replayed()
def bn_silu_backward_sums(
    dz: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, silu: bool
) -> Tensor:
    """Σ dy and Σ dy·x̂ over all pixels: float32 [2, C]."""
    return backward_sums(dz, [(x, weight, bias, mean, rstd)], silu)


@replayed()
def bn_silu_backward_apply(
    dz: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mean_dy: Tensor,
    mean_dy_xhat: Tensor,
    silu: bool,
) -> Tensor:
    """dx from given means of dy and dy·x̂ (zeros where the statistics are constants)."""
    (dx,) = backward_apply(dz, [(x, weight, bias, mean, rstd)], (mean_dy, mean_dy_xhat), silu)
    return dx


def forward(
    inputs: Sequence[Unnormalised], momentum: float, eps: float, residual: Tensor | None, out: Tensor, silu: bool
) -> list[Tensor]:
    """Training: batch statistics, running statistics, `out`; returns mean and rstd of each input, float32 [C]."""
    sources, extra, target = _forward_views([x for x, *_ in inputs], residual, out)
    tile = bn_silu_single_pass.tile_of(sources[0], vector_of(*sources, extra, target), len(inputs))
    norms, running = [], []
    for source, (_, weight, bias, running_mean, running_var) in zip(sources, inputs, strict=True):
        if tile is None:
            mean, rstd = statistics(source, True, eps, momentum, running_mean, running_var)
        else:
            mean, rstd = channel_vectors(source, 2)
        norms.append(Norm(source, *affine(weight, bias, source), mean, rstd))
        running += [running_mean, running_var]
    one, two = norms[0], norms[1] if len(norms) > 1 else None
    if tile is None:
        bn_silu_tiled.apply(one, two, extra, target, silu)
    else:
        bn_silu_single_pass.forward(one, two, extra, target, running, momentum, eps, silu, tile)
    return [vector for norm in norms for vector in (norm.mean, norm.rstd)]


def apply(inputs: Sequence[Normalised], residual: Tensor | None, out: Tensor, silu: bool) -> None:
    """`out`, which may be one of the inputs, from given statistics."""
    sources, extra, target = _forward_views([x for x, *_ in inputs], residual, out)
    bn_silu_tiled.apply(*_norms(sources, inputs), extra, target, silu)


def backward(dz: Tensor, inputs: Sequence[Normalised], silu: bool) -> tuple[list[Tensor], list[Tensor]]:
    """dx of each input; float32 [C]: dbias, which all share, and dweight of each input."""
    gradient, one, two = _backward_norms(dz, inputs)
    targets = dense_like(one.x), dense_like(one.x) if two else None
    sums = channel_vectors(one.x, 1 + len(inputs))
    tile = bn_silu_single_pass.tile_of(one.x, vector_of(gradient, one.x, two.x if two else None, *targets), len(sums))
    if tile is None:
        bn_silu_tiled.sums(gradient, one, two, sums, silu)
        bn_silu_tiled.dx(gradient, one, two, targets, sums, 1.0 / max(one.x.images * one.x.pixels, 1), silu)
    else:
        bn_silu_single_pass.backward(gradient, one, two, targets, sums, silu, tile)
    return [target.data for target in targets if target], sums


def backward_sums(dz: Tensor, inputs: Sequence[Normalised], silu: bool) -> Tensor:
    """Σ dy and Σ dy·x̂ of each input over all pixels: float32 [1 + inputs, C]."""
    gradient, one, two = _backward_norms(dz, inputs)
    sums = torch.empty((1 + len(inputs), one.x.channels), dtype=torch.float32, device=dz.device)
    bn_silu_tiled.sums(gradient, one, two, sums.unbind(), silu)
    return sums


def backward_apply(dz: Tensor, inputs: Sequence[Normalised], means: Sequence[Tensor], silu: bool) -> list[Tensor]:
    """dx of each input from given means of dy and of its dy·x̂ (zeros where the statistics are constants)."""
    gradient, one, two = _backward_norms(dz, inputs)
    targets = dense_like(one.x), dense_like(one.x) if two else None
    bn_silu_tiled.dx(gradient, one, two, targets, [vector_in_float(mean) for mean in means], 1.0, silu)
    return [target.data for target in targets if target]


def _forward_views(
    inputs: Sequence[Tensor], residual: Tensor | None, out: Tensor
) -> tuple[list[View], View | None, View]:
    """Views of the inputs, of the residual and of the output, in one layout."""
    *seen, target = views(*inputs, *([] if residual is None else [residual]), written=[out])
    return seen[: len(inputs)], None if residual is None else seen[-1], target


def _backward_norms(dz: Tensor, inputs: Sequence[Normalised]) -> tuple[View, Norm, Norm | None]:
    """Views of dz and of the inputs in the layout of the first input."""
    *sources, gradient = views(*(x for x, *_ in inputs), dz)
    return gradient, *_norms(sources, inputs)


def _norms(sources: Sequence[View], inputs: Sequence[Normalised]) -> tuple[Norm, Norm | None]:
    norms = [
        given(x, weight, bias, mean, rstd) for x, (_, weight, bias, mean, rstd) in zip(sources, inputs, strict=True)
    ]
    return norms[0], norms[1] if len(norms) > 1 else None
