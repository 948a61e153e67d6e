"""BatchNorm and SiLU: out = silu((x − mean)·rstd·weight + bias) (+ residual), and its gradients.

Tensor passes: forward 3 (statistics read x; apply reads x, writes out), backward 5 (sums read dz, x; dx reads dz, x and
writes dx). A tensor small enough to stay in registers between the two goes through one launch: 2 and 3 passes.
With s = sigmoid(y): d silu/dy = s·(1 + y·(1 − s)); dx = weight·rstd·(dy − mean(dy) − x̂·mean(dy·x̂)).
"""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor
from yolov9_fast.kernels.batch_norm import (
    Norm,
    bn_stats,
    channel_vectors,
    column_sums,
    extent,
    forward_views,
    given,
    load_channel,
    per_tile,
    plan,
    silu_gradient,
    silu_of,
    statistics,
    strides,
    whole_tile,
)
from yolov9_fast.kernels.bn_silu_whole import whole_backward, whole_forward
from yolov9_fast.kernels.launch import (
    View,
    affine,
    as_stored,
    dense_like,
    kernel,
    origin,
    parameters,
    tile_offsets,
    vector_of,
    views,
)

__all__ = [
    "bn_silu_apply",
    "bn_silu_backward",
    "bn_silu_backward_apply",
    "bn_silu_backward_sums",
    "bn_silu_forward",
    "bn_stats",
]


# Reads x (and residual), writes out: 4 (6) bytes an element of bf16. Grid: tiles of pixels × blocks of channels.
@kernel(roomy=8)
def bn_silu_apply_kernel(
    x_ptr,
    residual_ptr,
    out_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    x_image,
    x_stride,
    residual_image,
    residual_stride,
    out_image,
    out_stride,
    pixels,
    channels,
    blocks,
    SILU: tl.constexpr,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    if LAST:
        channels = channels * VEC
    else:
        pixels = pixels * VEC
    image = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks) * BLOCK_P
    first = tl.program_id(1) * BLOCK_C
    p = tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    inside = first + c < channels
    valid = (start + p < pixels)[:, None] & inside[None, :]
    x_ptr += origin(image, start, first, x_image * VEC, x_stride * VEC, LAST)
    x = tl.load(x_ptr + tile_offsets(p, c, x_stride * VEC, LAST), mask=valid, other=0).to(tl.float32)
    mean = load_channel(mean_ptr, first + c, inside, 0.0)
    rstd = load_channel(rstd_ptr, first + c, inside, 1.0)
    y = (x - mean) * (rstd * load_channel(weight_ptr, first + c, inside, 1.0))
    y += load_channel(bias_ptr, first + c, inside, 0.0)
    if SILU:
        y = silu_of(y)
    if residual_ptr is not None:
        residual_ptr += origin(image, start, first, residual_image * VEC, residual_stride * VEC, LAST)
        y += tl.load(residual_ptr + tile_offsets(p, c, residual_stride * VEC, LAST), mask=valid, other=0).to(tl.float32)
    out_ptr += origin(image, start, first, out_image * VEC, out_stride * VEC, LAST)
    tl.store(out_ptr + tile_offsets(p, c, out_stride * VEC, LAST), as_stored(y, out_ptr), mask=valid)


# Reads dz and x (4 bytes an element of bf16), writes 8 bytes per channel and block. Grid: blocks of pixels × channels.
@kernel(roomy=8)
def bn_silu_sums_kernel(
    dz_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    partial_ptr,
    dz_image,
    dz_stride,
    x_image,
    x_stride,
    pixels,
    channels,
    blocks,
    tiles,
    SILU: tl.constexpr,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    if LAST:
        channels = channels * VEC
    else:
        pixels = pixels * VEC
    block = tl.program_id(0)
    image = block // blocks
    start = (block % blocks) * (tiles * BLOCK_P)
    first = tl.program_id(1) * BLOCK_C
    p = tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    inside = first + c < channels
    dz_ptr += origin(image, start, first, dz_image * VEC, dz_stride * VEC, LAST)
    x_ptr += origin(image, start, first, x_image * VEC, x_stride * VEC, LAST)
    mean = load_channel(mean_ptr, first + c, inside, 0.0)
    rstd = load_channel(rstd_ptr, first + c, inside, 1.0)
    weight = load_channel(weight_ptr, first + c, inside, 1.0)
    bias = load_channel(bias_ptr, first + c, inside, 0.0)
    sum_dy = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_dy_xhat = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for t in range(tiles):
        valid = (start + t * BLOCK_P + p < pixels)[:, None] & inside[None, :]
        dy = tl.load(dz_ptr + tile_offsets(t * BLOCK_P + p, c, dz_stride * VEC, LAST), mask=valid, other=0)
        x = tl.load(x_ptr + tile_offsets(t * BLOCK_P + p, c, x_stride * VEC, LAST), mask=valid, other=0)
        dy = dy.to(tl.float32)
        xhat = (x.to(tl.float32) - mean) * rstd
        if SILU:
            dy = silu_gradient(dy, xhat * weight + bias)
        # A masked value's dz is 0, but a weight or statistic of infinity would still make it NaN.
        sum_dy += tl.where(valid, dy, 0.0)
        sum_dy_xhat += tl.where(valid, dy * xhat, 0.0)
    channels_i64 = tl.cast(channels, tl.int64)
    place = block * channels_i64 + first + c
    tl.store(partial_ptr + place, tl.sum(sum_dy, axis=0), mask=inside)
    tl.store(partial_ptr + tl.num_programs(0) * channels_i64 + place, tl.sum(sum_dy_xhat, axis=0), mask=inside)


# Reads dz and x, writes dx: 6 bytes an element of bf16. Grid: tiles of pixels × blocks of channels.
@kernel(roomy=8)
def bn_silu_dx_kernel(
    dz_ptr,
    x_ptr,
    dx_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    mean_dy_ptr,
    mean_dy_xhat_ptr,
    scale,
    dz_image,
    dz_stride,
    x_image,
    x_stride,
    dx_image,
    dx_stride,
    pixels,
    channels,
    blocks,
    SILU: tl.constexpr,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    if LAST:
        channels = channels * VEC
    else:
        pixels = pixels * VEC
    image = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks) * BLOCK_P
    first = tl.program_id(1) * BLOCK_C
    p = tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    inside = first + c < channels
    valid = (start + p < pixels)[:, None] & inside[None, :]
    dz_ptr += origin(image, start, first, dz_image * VEC, dz_stride * VEC, LAST)
    x_ptr += origin(image, start, first, x_image * VEC, x_stride * VEC, LAST)
    dy = tl.load(dz_ptr + tile_offsets(p, c, dz_stride * VEC, LAST), mask=valid, other=0).to(tl.float32)
    x = tl.load(x_ptr + tile_offsets(p, c, x_stride * VEC, LAST), mask=valid, other=0).to(tl.float32)
    rstd = load_channel(rstd_ptr, first + c, inside, 1.0)
    weight = load_channel(weight_ptr, first + c, inside, 1.0)
    xhat = (x - load_channel(mean_ptr, first + c, inside, 0.0)) * rstd
    if SILU:
        dy = silu_gradient(dy, xhat * weight + load_channel(bias_ptr, first + c, inside, 0.0))
    part = tl.cast(scale, tl.float32)
    mean_dy = load_channel(mean_dy_ptr, first + c, inside, 0.0) * part
    mean_dy_xhat = load_channel(mean_dy_xhat_ptr, first + c, inside, 0.0) * part
    dx = (weight * rstd) * (dy - mean_dy - xhat * mean_dy_xhat)
    dx_ptr += origin(image, start, first, dx_image * VEC, dx_stride * VEC, LAST)
    tl.store(dx_ptr + tile_offsets(p, c, dx_stride * VEC, LAST), as_stored(dx, dx_ptr), mask=valid)


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
    source, extra, target = forward_views([x], residual, out)
    weight, bias = affine(weight, bias, x.shape[1], x.device)
    block = whole_tile(source, vector_of(source, extra, target), 1)
    if block is None:
        mean, rstd = statistics(source, True, eps, momentum, running_mean, running_var)
        _apply(Norm(source, weight, bias, mean, rstd), extra, target, silu)
        return mean, rstd
    norm = Norm(source, weight, bias, *channel_vectors(source, 2))
    whole_forward(norm, extra, target, running_mean, running_var, momentum, eps, silu, block)
    return norm.mean, norm.rstd


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
    source, extra, target = forward_views([x], residual, out)
    _apply(given(source, weight, bias, mean, rstd), extra, target, silu)


def bn_silu_backward(
    dz: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (like x), weight and bias (float32 [C]) through the batch statistics."""
    source, gradient = views(x, dz)
    norm = given(source, weight, bias, mean, rstd)
    dx = dense_like(source)
    dweight, dbias = channel_vectors(source, 2)
    block = whole_tile(source, vector_of(source, gradient, dx), 2)
    if block is None:
        _sums(gradient, norm, (dbias, dweight), silu)
        _dx(gradient, norm, dx, dbias, dweight, 1.0 / max(source.images * source.pixels, 1), silu)
    else:
        whole_backward(gradient, norm, dx, dweight, dbias, silu, block)
    return dx.data, dweight, dbias


def bn_silu_backward_sums(
    dz: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, silu: bool
) -> Tensor:
    """Σ dy and Σ dy·x̂ over all pixels: float32 [2, C]."""
    source, gradient = views(x, dz)
    sums = torch.empty((2, source.channels), dtype=torch.float32, device=x.device)
    _sums(gradient, given(source, weight, bias, mean, rstd), sums.unbind(), silu)
    return sums


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
    source, gradient = views(x, dz)
    dx = dense_like(source)
    mean_dy, mean_dy_xhat = parameters(mean_dy, mean_dy_xhat)
    _dx(gradient, given(source, weight, bias, mean, rstd), dx, mean_dy, mean_dy_xhat, 1.0, silu)
    return dx.data


def _apply(norm: Norm, extra: View | None, target: View, silu: bool) -> None:
    vector = vector_of(norm.x, extra, target)
    shared, grid = per_tile("bn_silu_apply_kernel", norm.x, vector)
    bn_silu_apply_kernel(
        grid,
        norm.x.data,
        extra.data if extra else None,
        target.data,
        *norm.vectors,
        *strides(vector, norm.x, extra, target),
        *extent(norm.x, vector),
        shared.blocks,
        SILU=silu,
        **shared.constants(norm.x, vector),
    )


def _sums(gradient: View, norm: Norm, out: Sequence[Tensor], silu: bool) -> None:
    vector = vector_of(gradient, norm.x)
    shared = plan("bn_silu_sums_kernel", norm.x, vector)
    partial = torch.empty((2, shared.partials, norm.x.channels), dtype=torch.float32, device=norm.x.data.device)
    bn_silu_sums_kernel(
        (shared.partials, shared.columns),
        gradient.data,
        norm.x.data,
        *norm.vectors,
        partial,
        *strides(vector, gradient, norm.x),
        *extent(norm.x, vector),
        shared.blocks,
        shared.tiles,
        SILU=silu,
        **shared.constants(norm.x, vector),
    )
    column_sums(partial, *out)


def _dx(
    gradient: View, norm: Norm, dx: View, mean_dy: Tensor | None, mean_dy_xhat: Tensor | None, scale: float, silu: bool
) -> None:
    vector = vector_of(gradient, norm.x, dx)
    shared, grid = per_tile("bn_silu_dx_kernel", norm.x, vector)
    bn_silu_dx_kernel(
        grid,
        gradient.data,
        norm.x.data,
        dx.data,
        *norm.vectors,
        mean_dy,
        mean_dy_xhat,
        scale,
        *strides(vector, gradient, norm.x, dx),
        *extent(norm.x, vector),
        shared.blocks,
        SILU=silu,
        **shared.constants(norm.x, vector),
    )
