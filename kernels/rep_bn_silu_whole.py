"""`rep_bn_silu` in one launch for tensors that stay in registers: statistics and apply, sums and both dx."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from yolov9_fast.kernels.batch_norm import (
    Norm,
    extent,
    keep_statistics,
    load_channel,
    silu_gradient,
    silu_of,
    strides,
    whole_constants,
    whole_offsets,
    whole_statistics,
)
from yolov9_fast.kernels.config import Tile
from yolov9_fast.kernels.launch import View, as_stored, kernel, vector_of


# Reads x1, x2 (and residual) once, writes out. Grid: blocks of channels, all rows in one program.
@kernel(roomy=8)
def rep_bn_silu_whole_kernel(
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
    running_mean1_ptr,
    running_var1_ptr,
    running_mean2_ptr,
    running_var2_ptr,
    momentum,
    eps,
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
    total,
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
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.arange(0, BLOCK_P)
    inside = c < channels
    valid = (rows < total)[:, None] & inside[None, :]
    place = whole_offsets(rows, c, pixels, x1_image * VEC, x1_stride * VEC, LAST)
    x1 = tl.load(x1_ptr + place, mask=valid, other=0)
    place = whole_offsets(rows, c, pixels, x2_image * VEC, x2_stride * VEC, LAST)
    x2 = tl.load(x2_ptr + place, mask=valid, other=0)
    count = tl.cast(total, tl.float32)
    mean1, m2 = whole_statistics(x1, valid, count)
    rstd1 = keep_statistics(
        mean1,
        m2,
        count,
        c,
        channels,
        mean1_ptr,
        rstd1_ptr,
        running_mean1_ptr,
        running_var1_ptr,
        momentum,
        eps,
        True,
    )
    weight1 = load_channel(weight1_ptr, c, inside, 1.0)
    mean2, m2 = whole_statistics(x2, valid, count)
    rstd2 = keep_statistics(
        mean2,
        m2,
        count,
        c,
        channels,
        mean2_ptr,
        rstd2_ptr,
        running_mean2_ptr,
        running_var2_ptr,
        momentum,
        eps,
        True,
    )
    weight2 = load_channel(weight2_ptr, c, inside, 1.0)
    bias = load_channel(bias1_ptr, c, inside, 0.0) + load_channel(bias2_ptr, c, inside, 0.0)
    y = (x1.to(tl.float32) - mean1[None, :]) * (rstd1[None, :] * weight1)
    y += (x2.to(tl.float32) - mean2[None, :]) * (rstd2[None, :] * weight2) + bias
    if SILU:
        y = silu_of(y)
    if residual_ptr is not None:
        place = whole_offsets(rows, c, pixels, residual_image * VEC, residual_stride * VEC, LAST)
        y += tl.load(residual_ptr + place, mask=valid, other=0).to(tl.float32)
    place = whole_offsets(rows, c, pixels, out_image * VEC, out_stride * VEC, LAST)
    tl.store(out_ptr + place, as_stored(y, out_ptr), mask=valid)


# Reads dz, x1 and x2 once, writes dx1 and dx2. Grid: blocks of channels, all rows in one program.
@kernel(roomy=16)
def rep_bn_silu_whole_backward_kernel(
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
    dbias_ptr,
    dweight1_ptr,
    dweight2_ptr,
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
    total,
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
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.arange(0, BLOCK_P)
    inside = c < channels
    valid = (rows < total)[:, None] & inside[None, :]
    place = whole_offsets(rows, c, pixels, dz_image * VEC, dz_stride * VEC, LAST)
    dz = tl.load(dz_ptr + place, mask=valid, other=0)
    place = whole_offsets(rows, c, pixels, x1_image * VEC, x1_stride * VEC, LAST)
    x1 = tl.load(x1_ptr + place, mask=valid, other=0)
    place = whole_offsets(rows, c, pixels, x2_image * VEC, x2_stride * VEC, LAST)
    x2 = tl.load(x2_ptr + place, mask=valid, other=0)
    mean1 = load_channel(mean1_ptr, c, inside, 0.0)
    rstd1 = load_channel(rstd1_ptr, c, inside, 1.0)
    weight1 = load_channel(weight1_ptr, c, inside, 1.0)
    mean2 = load_channel(mean2_ptr, c, inside, 0.0)
    rstd2 = load_channel(rstd2_ptr, c, inside, 1.0)
    weight2 = load_channel(weight2_ptr, c, inside, 1.0)
    bias = load_channel(bias1_ptr, c, inside, 0.0) + load_channel(bias2_ptr, c, inside, 0.0)
    dy = dz.to(tl.float32)
    xhat1 = (x1.to(tl.float32) - mean1) * rstd1
    xhat2 = (x2.to(tl.float32) - mean2) * rstd2
    if SILU:
        dy = silu_gradient(dy, xhat1 * weight1 + xhat2 * weight2 + bias)
    dbias = tl.sum(tl.where(valid, dy, 0.0), axis=0)
    dweight1 = tl.sum(tl.where(valid, dy * xhat1, 0.0), axis=0)
    dweight2 = tl.sum(tl.where(valid, dy * xhat2, 0.0), axis=0)
    tl.store(dbias_ptr + c, dbias, mask=inside)
    tl.store(dweight1_ptr + c, dweight1, mask=inside)
    tl.store(dweight2_ptr + c, dweight2, mask=inside)
    count = tl.cast(total, tl.float32)
    dy -= (dbias / count)[None, :]
    dx1 = (weight1 * rstd1) * (dy - xhat1 * (dweight1 / count)[None, :])
    dx2 = (weight2 * rstd2) * (dy - xhat2 * (dweight2 / count)[None, :])
    place = whole_offsets(rows, c, pixels, dx1_image * VEC, dx1_stride * VEC, LAST)
    tl.store(dx1_ptr + place, as_stored(dx1, dx1_ptr), mask=valid)
    place = whole_offsets(rows, c, pixels, dx2_image * VEC, dx2_stride * VEC, LAST)
    tl.store(dx2_ptr + place, as_stored(dx2, dx2_ptr), mask=valid)


def whole_forward(
    one: Norm,
    two: Norm,
    extra: View | None,
    target: View,
    running: Sequence[Tensor | None],
    momentum: float,
    eps: float,
    silu: bool,
    block: Tile,
) -> None:
    """Batch statistics into `mean` and `rstd` of both, and the output."""
    vector = vector_of(one.x, two.x, extra, target)
    rep_bn_silu_whole_kernel(
        (triton.cdiv(one.x.channels, block.channels),),
        one.x.data,
        two.x.data,
        extra.data if extra else None,
        target.data,
        *one.vectors,
        *two.vectors,
        *running,
        float(momentum),
        float(eps),
        *strides(vector, one.x, two.x, extra, target),
        *extent(one.x, vector),
        one.x.images * one.x.pixels,
        SILU=silu,
        **whole_constants(one.x, vector, block),
    )


def whole_backward(
    gradient: View,
    one: Norm,
    two: Norm,
    dx1: View,
    dx2: View,
    sums: Sequence[Tensor],
    silu: bool,
    block: Tile,
) -> None:
    """Both dx, and into `sums`: dbias, dweight1, dweight2."""
    vector = vector_of(gradient, one.x, two.x, dx1, dx2)
    rep_bn_silu_whole_backward_kernel(
        (triton.cdiv(one.x.channels, block.channels),),
        gradient.data,
        one.x.data,
        two.x.data,
        dx1.data,
        dx2.data,
        *one.vectors,
        *two.vectors,
        *sums,
        *strides(vector, gradient, one.x, two.x, dx1, dx2),
        *extent(one.x, vector),
        one.x.images * one.x.pixels,
        SILU=silu,
        **whole_constants(one.x, vector, block),
    )
