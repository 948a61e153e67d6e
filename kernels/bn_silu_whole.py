"""`bn_silu` in one launch for tensors that stay in registers: statistics and apply, sums and dx, each reading once."""

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


# Statistics and apply: reads x (and residual) once, writes out. Grid: blocks of channels, all rows in one program.
@kernel(roomy=8)
def bn_silu_whole_kernel(
    x_ptr,
    residual_ptr,
    out_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    momentum,
    eps,
    x_image,
    x_stride,
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
    x = tl.load(x_ptr + whole_offsets(rows, c, pixels, x_image * VEC, x_stride * VEC, LAST), mask=valid, other=0)
    count = tl.cast(total, tl.float32)
    mean, m2 = whole_statistics(x, valid, count)
    rstd = keep_statistics(
        mean, m2, count, c, channels, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, momentum, eps, True
    )
    y = (x.to(tl.float32) - mean[None, :]) * (rstd[None, :] * load_channel(weight_ptr, c, inside, 1.0))
    y += load_channel(bias_ptr, c, inside, 0.0)
    if SILU:
        y = silu_of(y)
    if residual_ptr is not None:
        place = whole_offsets(rows, c, pixels, residual_image * VEC, residual_stride * VEC, LAST)
        y += tl.load(residual_ptr + place, mask=valid, other=0).to(tl.float32)
    place = whole_offsets(rows, c, pixels, out_image * VEC, out_stride * VEC, LAST)
    tl.store(out_ptr + place, as_stored(y, out_ptr), mask=valid)


# Sums and dx: reads dz and x once, writes dx. Grid: blocks of channels, all rows in one program.
@kernel()
def bn_silu_whole_backward_kernel(
    dz_ptr,
    x_ptr,
    dx_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dweight_ptr,
    dbias_ptr,
    dz_image,
    dz_stride,
    x_image,
    x_stride,
    dx_image,
    dx_stride,
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
    dz = tl.load(dz_ptr + whole_offsets(rows, c, pixels, dz_image * VEC, dz_stride * VEC, LAST), mask=valid, other=0)
    x = tl.load(x_ptr + whole_offsets(rows, c, pixels, x_image * VEC, x_stride * VEC, LAST), mask=valid, other=0)
    rstd = load_channel(rstd_ptr, c, inside, 1.0)
    weight = load_channel(weight_ptr, c, inside, 1.0)
    dy = dz.to(tl.float32)
    xhat = (x.to(tl.float32) - load_channel(mean_ptr, c, inside, 0.0)) * rstd
    if SILU:
        dy = silu_gradient(dy, xhat * weight + load_channel(bias_ptr, c, inside, 0.0))
    dbias = tl.sum(tl.where(valid, dy, 0.0), axis=0)
    dweight = tl.sum(tl.where(valid, dy * xhat, 0.0), axis=0)
    tl.store(dbias_ptr + c, dbias, mask=inside)
    tl.store(dweight_ptr + c, dweight, mask=inside)
    count = tl.cast(total, tl.float32)
    dx = (weight * rstd) * (dy - (dbias / count)[None, :] - xhat * (dweight / count)[None, :])
    place = whole_offsets(rows, c, pixels, dx_image * VEC, dx_stride * VEC, LAST)
    tl.store(dx_ptr + place, as_stored(dx, dx_ptr), mask=valid)


def whole_forward(
    norm: Norm,
    extra: View | None,
    target: View,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    silu: bool,
    block: Tile,
) -> None:
    """Batch statistics into `norm.mean` and `norm.rstd`, and the output."""
    vector = vector_of(norm.x, extra, target)
    bn_silu_whole_kernel(
        (triton.cdiv(norm.x.channels, block.channels),),
        norm.x.data,
        extra.data if extra else None,
        target.data,
        *norm.vectors,
        running_mean,
        running_var,
        float(momentum),
        float(eps),
        *strides(vector, norm.x, extra, target),
        *extent(norm.x, vector),
        norm.x.images * norm.x.pixels,
        SILU=silu,
        **whole_constants(norm.x, vector, block),
    )


def whole_backward(
    gradient: View, norm: Norm, dx: View, dweight: Tensor, dbias: Tensor, silu: bool, block: Tile
) -> None:
    vector = vector_of(gradient, norm.x, dx)
    bn_silu_whole_backward_kernel(
        (triton.cdiv(norm.x.channels, block.channels),),
        gradient.data,
        norm.x.data,
        dx.data,
        *norm.vectors,
        dweight,
        dbias,
        *strides(vector, gradient, norm.x, dx),
        *extent(norm.x, vector),
        norm.x.images * norm.x.pixels,
        SILU=silu,
        **whole_constants(norm.x, vector, block),
    )
