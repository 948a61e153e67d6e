"""RepConv in training: out = silu(BN1(x1) + BN2(x2)) (+ residual) in one pass over both, and its gradients.

Tensor passes: forward 5 (statistics read x1, x2; apply reads both, writes out), backward 8 (sums read dz, x1, x2; dx
reads them again and writes dx1, dx2). Tensors small enough to stay in registers between the two: 3 and 5 passes.
"""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor
from yolov9_fast.kernels.batch_norm import (
    Norm,
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
from yolov9_fast.kernels.rep_bn_silu_whole import whole_backward, whole_forward


# Reads x1, x2 (and residual), writes out: 6 (8) bytes an element of bf16. Grid: tiles of pixels × blocks of channels.
@kernel()
def rep_bn_silu_apply_kernel(
    x1_ptr,
    x2_ptr,
    residual_ptr,
    out_ptr,
    weight1_ptr,
    bias1_ptr,
    mean1_ptr,
    rstd1_ptr,
    weight2_ptr,
    bias2_ptr,
    mean2_ptr,
    rstd2_ptr,
    x1_image,
    x1_stride,
    x2_image,
    x2_stride,
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
    x1_ptr += origin(image, start, first, x1_image * VEC, x1_stride * VEC, LAST)
    x2_ptr += origin(image, start, first, x2_image * VEC, x2_stride * VEC, LAST)
    x1 = tl.load(x1_ptr + tile_offsets(p, c, x1_stride * VEC, LAST), mask=valid, other=0).to(tl.float32)
    x2 = tl.load(x2_ptr + tile_offsets(p, c, x2_stride * VEC, LAST), mask=valid, other=0).to(tl.float32)
    mean1 = load_channel(mean1_ptr, first + c, inside, 0.0)
    rstd1 = load_channel(rstd1_ptr, first + c, inside, 1.0)
    weight1 = load_channel(weight1_ptr, first + c, inside, 1.0)
    mean2 = load_channel(mean2_ptr, first + c, inside, 0.0)
    rstd2 = load_channel(rstd2_ptr, first + c, inside, 1.0)
    weight2 = load_channel(weight2_ptr, first + c, inside, 1.0)
    bias = load_channel(bias1_ptr, first + c, inside, 0.0) + load_channel(bias2_ptr, first + c, inside, 0.0)
    y = (x1 - mean1) * (rstd1 * weight1) + (x2 - mean2) * (rstd2 * weight2) + bias
    if SILU:
        y = silu_of(y)
    if residual_ptr is not None:
        residual_ptr += origin(image, start, first, residual_image * VEC, residual_stride * VEC, LAST)
        y += tl.load(residual_ptr + tile_offsets(p, c, residual_stride * VEC, LAST), mask=valid, other=0).to(tl.float32)
    out_ptr += origin(image, start, first, out_image * VEC, out_stride * VEC, LAST)
    tl.store(out_ptr + tile_offsets(p, c, out_stride * VEC, LAST), as_stored(y, out_ptr), mask=valid)


# Reads dz, x1 and x2 (6 bytes an element of bf16), writes 12 bytes per channel and block. Grid: blocks × channels.
@kernel(roomy=8)
def rep_bn_silu_sums_kernel(
    dz_ptr,
    x1_ptr,
    x2_ptr,
    weight1_ptr,
    bias1_ptr,
    mean1_ptr,
    rstd1_ptr,
    weight2_ptr,
    bias2_ptr,
    mean2_ptr,
    rstd2_ptr,
    partial_ptr,
    dz_image,
    dz_stride,
    x1_image,
    x1_stride,
    x2_image,
    x2_stride,
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
    image = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks) * (tiles * BLOCK_P)
    first = tl.program_id(1) * BLOCK_C
    p = tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    inside = first + c < channels
    dz_ptr += origin(image, start, first, dz_image * VEC, dz_stride * VEC, LAST)
    x1_ptr += origin(image, start, first, x1_image * VEC, x1_stride * VEC, LAST)
    x2_ptr += origin(image, start, first, x2_image * VEC, x2_stride * VEC, LAST)
    mean1 = load_channel(mean1_ptr, first + c, inside, 0.0)
    rstd1 = load_channel(rstd1_ptr, first + c, inside, 1.0)
    weight1 = load_channel(weight1_ptr, first + c, inside, 1.0)
    mean2 = load_channel(mean2_ptr, first + c, inside, 0.0)
    rstd2 = load_channel(rstd2_ptr, first + c, inside, 1.0)
    weight2 = load_channel(weight2_ptr, first + c, inside, 1.0)
    bias = load_channel(bias1_ptr, first + c, inside, 0.0) + load_channel(bias2_ptr, first + c, inside, 0.0)
    sum_dy = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_dy_xhat1 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_dy_xhat2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for t in range(tiles):
        valid = (start + t * BLOCK_P + p < pixels)[:, None] & inside[None, :]
        dy = tl.load(dz_ptr + tile_offsets(t * BLOCK_P + p, c, dz_stride * VEC, LAST), mask=valid, other=0)
        x1 = tl.load(x1_ptr + tile_offsets(t * BLOCK_P + p, c, x1_stride * VEC, LAST), mask=valid, other=0)
        x2 = tl.load(x2_ptr + tile_offsets(t * BLOCK_P + p, c, x2_stride * VEC, LAST), mask=valid, other=0)
        dy = dy.to(tl.float32)
        xhat1 = (x1.to(tl.float32) - mean1) * rstd1
        xhat2 = (x2.to(tl.float32) - mean2) * rstd2
        if SILU:
            dy = silu_gradient(dy, xhat1 * weight1 + xhat2 * weight2 + bias)
        sum_dy += tl.where(valid, dy, 0.0)
        sum_dy_xhat1 += tl.where(valid, dy * xhat1, 0.0)
        sum_dy_xhat2 += tl.where(valid, dy * xhat2, 0.0)
    channels_i64 = tl.cast(channels, tl.int64)
    step = tl.num_programs(0) * channels_i64
    place = tl.program_id(0) * channels_i64 + first + c
    tl.store(partial_ptr + place, tl.sum(sum_dy, axis=0), mask=inside)
    tl.store(partial_ptr + step + place, tl.sum(sum_dy_xhat1, axis=0), mask=inside)
    tl.store(partial_ptr + 2 * step + place, tl.sum(sum_dy_xhat2, axis=0), mask=inside)


# Reads dz, x1 and x2, writes dx1 and dx2: 10 bytes an element of bf16. Grid: tiles of pixels × blocks of channels.
@kernel()
def rep_bn_silu_dx_kernel(
    dz_ptr,
    x1_ptr,
    x2_ptr,
    dx1_ptr,
    dx2_ptr,
    weight1_ptr,
    bias1_ptr,
    mean1_ptr,
    rstd1_ptr,
    weight2_ptr,
    bias2_ptr,
    mean2_ptr,
    rstd2_ptr,
    mean_dy_ptr,
    mean_dy_xhat1_ptr,
    mean_dy_xhat2_ptr,
    scale,
    dz_image,
    dz_stride,
    x1_image,
    x1_stride,
    x2_image,
    x2_stride,
    dx1_image,
    dx1_stride,
    dx2_image,
    dx2_stride,
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
    x1_ptr += origin(image, start, first, x1_image * VEC, x1_stride * VEC, LAST)
    x2_ptr += origin(image, start, first, x2_image * VEC, x2_stride * VEC, LAST)
    dy = tl.load(dz_ptr + tile_offsets(p, c, dz_stride * VEC, LAST), mask=valid, other=0).to(tl.float32)
    x1 = tl.load(x1_ptr + tile_offsets(p, c, x1_stride * VEC, LAST), mask=valid, other=0).to(tl.float32)
    x2 = tl.load(x2_ptr + tile_offsets(p, c, x2_stride * VEC, LAST), mask=valid, other=0).to(tl.float32)
    mean1 = load_channel(mean1_ptr, first + c, inside, 0.0)
    rstd1 = load_channel(rstd1_ptr, first + c, inside, 1.0)
    weight1 = load_channel(weight1_ptr, first + c, inside, 1.0)
    mean2 = load_channel(mean2_ptr, first + c, inside, 0.0)
    rstd2 = load_channel(rstd2_ptr, first + c, inside, 1.0)
    weight2 = load_channel(weight2_ptr, first + c, inside, 1.0)
    bias = load_channel(bias1_ptr, first + c, inside, 0.0) + load_channel(bias2_ptr, first + c, inside, 0.0)
    xhat1 = (x1 - mean1) * rstd1
    xhat2 = (x2 - mean2) * rstd2
    if SILU:
        dy = silu_gradient(dy, xhat1 * weight1 + xhat2 * weight2 + bias)
    part = tl.cast(scale, tl.float32)
    dy -= load_channel(mean_dy_ptr, first + c, inside, 0.0) * part
    dx1 = (weight1 * rstd1) * (dy - xhat1 * (load_channel(mean_dy_xhat1_ptr, first + c, inside, 0.0) * part))
    dx2 = (weight2 * rstd2) * (dy - xhat2 * (load_channel(mean_dy_xhat2_ptr, first + c, inside, 0.0) * part))
    dx1_ptr += origin(image, start, first, dx1_image * VEC, dx1_stride * VEC, LAST)
    dx2_ptr += origin(image, start, first, dx2_image * VEC, dx2_stride * VEC, LAST)
    tl.store(dx1_ptr + tile_offsets(p, c, dx1_stride * VEC, LAST), as_stored(dx1, dx1_ptr), mask=valid)
    tl.store(dx2_ptr + tile_offsets(p, c, dx2_stride * VEC, LAST), as_stored(dx2, dx2_ptr), mask=valid)


def rep_bn_silu_forward(
    x1: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    running_mean1: Tensor | None,
    running_var1: Tensor | None,
    x2: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    running_mean2: Tensor | None,
    running_var2: Tensor | None,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    out: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training: both batch and running statistics, and `out`; returns mean1, rstd1, mean2, rstd2, float32 [C]."""
    first, second, extra, target = forward_views([x1, x2], residual, out)
    weight1, bias1 = affine(weight1, bias1, x1.shape[1], x1.device)
    weight2, bias2 = affine(weight2, bias2, x1.shape[1], x1.device)
    running = (running_mean1, running_var1, running_mean2, running_var2)
    block = whole_tile(first, vector_of(first, second, extra, target), 2)
    if block is None:
        mean1, rstd1 = statistics(first, True, eps, momentum, running_mean1, running_var1)
        mean2, rstd2 = statistics(second, True, eps, momentum, running_mean2, running_var2)
    else:
        mean1, rstd1, mean2, rstd2 = channel_vectors(first, 4)
    one, two = given(first, weight1, bias1, mean1, rstd1), given(second, weight2, bias2, mean2, rstd2)
    if block is None:
        _apply(one, two, extra, target, silu)
    else:
        whole_forward(one, two, extra, target, running, momentum, eps, silu, block)
    return mean1, rstd1, mean2, rstd2


def rep_bn_silu_apply(
    x1: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    mean1: Tensor,
    rstd1: Tensor,
    x2: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    mean2: Tensor,
    rstd2: Tensor,
    residual: Tensor | None,
    out: Tensor,
    silu: bool,
) -> None:
    """`out`, which may be x1 or x2 itself, from given statistics."""
    first, second, extra, target = forward_views([x1, x2], residual, out)
    one, two = given(first, weight1, bias1, mean1, rstd1), given(second, weight2, bias2, mean2, rstd2)
    _apply(one, two, extra, target, silu)


def rep_bn_silu_backward(
    dz: Tensor,
    x1: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    mean1: Tensor,
    rstd1: Tensor,
    x2: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    mean2: Tensor,
    rstd2: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx1, dx2, dweight1, dbias1, dweight2, dbias2 through the batch statistics; dbias1 equals dbias2."""
    first, second, gradient = views(x1, x2, dz)
    one, two = given(first, weight1, bias1, mean1, rstd1), given(second, weight2, bias2, mean2, rstd2)
    dx1, dx2 = dense_like(first), dense_like(second)
    dbias1, dweight1, dweight2 = sums = channel_vectors(first, 3)
    block = whole_tile(first, vector_of(first, second, gradient, dx1, dx2), 3)
    if block is None:
        _sums(gradient, one, two, sums, silu)
        _dx(gradient, one, two, dx1, dx2, sums, 1.0 / max(first.images * first.pixels, 1), silu)
    else:
        whole_backward(gradient, one, two, dx1, dx2, sums, silu, block)
    return dx1.data, dx2.data, dweight1, dbias1, dweight2, dbias1.clone()


def rep_bn_silu_backward_sums(
    dz: Tensor,
    x1: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    mean1: Tensor,
    rstd1: Tensor,
    x2: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    mean2: Tensor,
    rstd2: Tensor,
    silu: bool,
) -> Tensor:
    """Σ dy, Σ dy·x̂1 and Σ dy·x̂2 over all pixels: float32 [3, C]."""
    first, second, gradient = views(x1, x2, dz)
    one, two = given(first, weight1, bias1, mean1, rstd1), given(second, weight2, bias2, mean2, rstd2)
    sums = torch.empty((3, first.channels), dtype=torch.float32, device=x1.device)
    _sums(gradient, one, two, sums.unbind(), silu)
    return sums


def rep_bn_silu_backward_apply(
    dz: Tensor,
    x1: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    mean1: Tensor,
    rstd1: Tensor,
    x2: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    mean2: Tensor,
    rstd2: Tensor,
    mean_dy: Tensor,
    mean_dy_xhat1: Tensor,
    mean_dy_xhat2: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """dx1 and dx2 from given means of dy, dy·x̂1 and dy·x̂2 (zeros where the statistics are constants)."""
    first, second, gradient = views(x1, x2, dz)
    one, two = given(first, weight1, bias1, mean1, rstd1), given(second, weight2, bias2, mean2, rstd2)
    dx1, dx2 = dense_like(first), dense_like(second)
    _dx(gradient, one, two, dx1, dx2, parameters(mean_dy, mean_dy_xhat1, mean_dy_xhat2), 1.0, silu)
    return dx1.data, dx2.data


def _apply(one: Norm, two: Norm, extra: View | None, target: View, silu: bool) -> None:
    vector = vector_of(one.x, two.x, extra, target)
    shared, grid = per_tile("rep_bn_silu_apply_kernel", one.x, vector)
    rep_bn_silu_apply_kernel(
        grid,
        one.x.data,
        two.x.data,
        extra.data if extra else None,
        target.data,
        *one.vectors,
        *two.vectors,
        *strides(vector, one.x, two.x, extra, target),
        *extent(one.x, vector),
        shared.blocks,
        SILU=silu,
        **shared.constants(one.x, vector),
    )


def _sums(gradient: View, one: Norm, two: Norm, out: Sequence[Tensor], silu: bool) -> None:
    vector = vector_of(gradient, one.x, two.x)
    shared = plan("rep_bn_silu_sums_kernel", one.x, vector)
    partial = torch.empty((3, shared.partials, one.x.channels), dtype=torch.float32, device=one.x.data.device)
    rep_bn_silu_sums_kernel(
        (shared.partials, shared.columns),
        gradient.data,
        one.x.data,
        two.x.data,
        *one.vectors,
        *two.vectors,
        partial,
        *strides(vector, gradient, one.x, two.x),
        *extent(one.x, vector),
        shared.blocks,
        shared.tiles,
        SILU=silu,
        **shared.constants(one.x, vector),
    )
    column_sums(partial, *out)


def _dx(
    gradient: View,
    one: Norm,
    two: Norm,
    dx1: View,
    dx2: View,
    means: Sequence[Tensor | None],
    scale: float,
    silu: bool,
) -> None:
    vector = vector_of(gradient, one.x, two.x, dx1, dx2)
    shared, grid = per_tile("rep_bn_silu_dx_kernel", one.x, vector)
    rep_bn_silu_dx_kernel(
        grid,
        gradient.data,
        one.x.data,
        two.x.data,
        dx1.data,
        dx2.data,
        *one.vectors,
        *two.vectors,
        *means,
        scale,
        *strides(vector, gradient, one.x, two.x, dx1, dx2),
        *extent(one.x, vector),
        shared.blocks,
        SILU=silu,
        **shared.constants(one.x, vector),
    )
