"""BatchNorm and SiLU on batch or given statistics: out = silu((x − mean)·rstd·weight + bias) (+ residual), and gradients.

Tensor passes: forward 3 (statistics read x; apply reads x, writes out), backward 5 (sums read dz, x; dx reads dz, x and
writes dx). A tensor small enough to stay in registers between the two goes through one launch: 2 and 3 passes.
With s = sigmoid(y): d silu/dy = s·(1 + y·(1 − s)); dx = weight·rstd·(dy − mean(dy) − x̂·mean(dy·x̂)).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from yolov9_fast.kernels.batch_norm import (
    Plan,
    bn_stats,
    column_sums,
    extent,
    keep_statistics,
    plan,
    statistics,
    whole_block,
)
from yolov9_fast.kernels.config import tile
from yolov9_fast.kernels.launch import (
    View,
    affine,
    empty_like_view,
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


@triton.jit
def load_channel(ptr, c, inside, absent: tl.constexpr):
    """A per-channel vector as [1, C], or the value that stands for a vector left out."""
    if ptr is None:
        return absent
    else:
        return tl.load(ptr + c, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def silu(y):
    return y / (1.0 + tl.exp(-y))


@triton.jit
def silu_gradient(dz, y):
    s = 1.0 / (1.0 + tl.exp(-y))
    return dz * s * (1.0 + y * (1.0 - s))


# Reads x (and residual), writes out: 4 (6) bytes an element of bf16. Grid: tiles of pixels × blocks of channels.
@kernel()
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
        y = silu(y)
    if residual_ptr is not None:
        residual_ptr += origin(image, start, first, residual_image * VEC, residual_stride * VEC, LAST)
        y += tl.load(residual_ptr + tile_offsets(p, c, residual_stride * VEC, LAST), mask=valid, other=0).to(tl.float32)
    out_ptr += origin(image, start, first, out_image * VEC, out_stride * VEC, LAST)
    tl.store(out_ptr + tile_offsets(p, c, out_stride * VEC, LAST), y.to(out_ptr.dtype.element_ty), mask=valid)


# Reads dz and x (4 bytes an element of bf16), writes 8 bytes per channel and block. Grid: blocks of pixels × channels.
@kernel()
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
@kernel()
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
    tl.store(dx_ptr + tile_offsets(p, c, dx_stride * VEC, LAST), dx.to(dx_ptr.dtype.element_ty), mask=valid)


@triton.jit
def whole_offsets(rows, c, pixels, image_stride, stride, LAST: tl.constexpr):
    """Offsets of all rows of a small tensor (row = pixel of the batch) × channels c."""
    if LAST:
        return rows[:, None].to(tl.int64) * stride + c[None, :]
    else:
        image = (rows // pixels).to(tl.int64)
        return (image * image_stride + rows % pixels)[:, None] + c[None, :].to(tl.int64) * stride


# Statistics and apply in one: reads x (and residual) once, writes out. Grid: blocks of channels; a program holds all rows.
@kernel()
def bn_silu_whole_kernel(
    x_ptr,
    residual_ptr,
    out_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    mean_ptr,
    rstd_ptr,
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
    mean = tl.sum(x.to(tl.float32), axis=0) / count
    off = tl.where(valid, x.to(tl.float32) - mean[None, :], 0.0)
    # The mean of the deviations is the rounding error of the mean itself; put right, it costs no read.
    error = tl.sum(off, axis=0) / count
    m2 = tl.sum(off * off, axis=0) - count * error * error
    mean += error
    rstd = keep_statistics(
        mean, m2, count, c, channels, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, momentum, eps, True
    )
    y = (x.to(tl.float32) - mean[None, :]) * (rstd[None, :] * load_channel(weight_ptr, c, inside, 1.0))
    y += load_channel(bias_ptr, c, inside, 0.0)
    if SILU:
        y = silu(y)
    if residual_ptr is not None:
        place = whole_offsets(rows, c, pixels, residual_image * VEC, residual_stride * VEC, LAST)
        y += tl.load(residual_ptr + place, mask=valid, other=0).to(tl.float32)
    place = whole_offsets(rows, c, pixels, out_image * VEC, out_stride * VEC, LAST)
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=valid)


# Sums and dx in one: reads dz and x once, writes dx. Grid: blocks of channels; a program holds all rows.
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
    tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=valid)


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
    weight, bias = affine(weight, bias, x.shape[1], x.device)
    seen = views(*_present(x, residual), written=[out])
    source, target = seen[0], seen[-1]
    rows = source.images * source.pixels
    block = whole_block(source.last, rows, x.element_size(), 1)
    if block is None or rows == 0:
        mean, rstd = statistics(source, True, eps, momentum, running_mean, running_var)
        _apply(seen, weight, bias, mean, rstd, residual is not None, silu)
        return mean, rstd
    vector = vector_of(*seen)
    mean, rstd = (torch.empty(source.channels, dtype=torch.float32, device=x.device) for _ in range(2))
    extra = seen[1] if residual is not None else None
    bn_silu_whole_kernel(
        (triton.cdiv(source.channels, block[1]),),
        source.data,
        extra.data if extra else None,
        target.data,
        weight,
        bias,
        running_mean,
        running_var,
        mean,
        rstd,
        float(momentum),
        float(eps),
        *strides(vector, source, extra, target),
        *extent(source, vector),
        rows,
        warps=whole_warps(block),
        SILU=silu,
        LAST=source.last,
        VEC=vector,
        BLOCK_P=block[0],
        BLOCK_C=block[1],
    )
    return mean, rstd


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
    """`out` from given statistics."""
    weight, bias = affine(weight, bias, x.shape[1], x.device)
    mean, rstd = parameters(mean, rstd)
    _apply(views(*_present(x, residual), written=[out]), weight, bias, mean, rstd, residual is not None, silu)


def bn_silu_backward(
    dz: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (like x), weight and bias (float32 [C]) through the batch statistics."""
    weight, bias = affine(weight, bias, x.shape[1], x.device)
    mean, rstd = parameters(mean, rstd)
    source, gradient = views(x, dz)
    rows = source.images * source.pixels
    dx = empty_like_view(source)
    target = views(x, written=[dx])[1]
    dweight, dbias = (torch.empty(source.channels, dtype=torch.float32, device=x.device) for _ in range(2))
    block = whole_block(source.last, rows, x.element_size(), 2)
    if block is None or rows == 0:
        _sums(gradient, source, weight, bias, mean, rstd, (dbias, dweight), silu)
        scale = 1.0 / max(rows, 1)
        _dx(gradient, source, target, weight, bias, mean, rstd, dbias, dweight, scale, silu)
        return dx, dweight, dbias
    vector = vector_of(gradient, source, target)
    bn_silu_whole_backward_kernel(
        (triton.cdiv(source.channels, block[1]),),
        gradient.data,
        source.data,
        dx,
        weight,
        bias,
        mean,
        rstd,
        dweight,
        dbias,
        *strides(vector, gradient, source, target),
        *extent(source, vector),
        rows,
        warps=whole_warps(block, 2),
        SILU=silu,
        LAST=source.last,
        VEC=vector,
        BLOCK_P=block[0],
        BLOCK_C=block[1],
    )
    return dx, dweight, dbias


def bn_silu_backward_sums(
    dz: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, silu: bool
) -> Tensor:
    """Σ dy and Σ dy·x̂ over all pixels: float32 [2, C]."""
    weight, bias = affine(weight, bias, x.shape[1], x.device)
    mean, rstd = parameters(mean, rstd)
    source, gradient = views(x, dz)
    sums = torch.empty((2, source.channels), dtype=torch.float32, device=x.device)
    _sums(gradient, source, weight, bias, mean, rstd, (sums[0], sums[1]), silu)
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
    weight, bias = affine(weight, bias, x.shape[1], x.device)
    mean, rstd, mean_dy, mean_dy_xhat = parameters(mean, rstd, mean_dy, mean_dy_xhat)
    source, gradient = views(x, dz)
    dx = empty_like_view(source)
    target = views(x, written=[dx])[1]
    _dx(gradient, source, target, weight, bias, mean, rstd, mean_dy, mean_dy_xhat, 1.0, silu)
    return dx


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def strides(vector: int, *all_views: View | None) -> list[int]:
    """Image stride and stride of each view in units of `vector`, 0 for a view left out."""
    return [s // vector for view in all_views for s in ((view.image_stride, view.stride) if view else (0, 0))]


def whole_warps(block: tuple[int, int], tensors: int = 1) -> int:
    """Warps of a program that holds a block of each of `tensors` tensors: up to 16, from 32 values a thread on."""
    return max(4, min(16, block[0] * block[1] * tensors // (32 * 32)))


def per_tile(name: str, view: View, vector: int) -> tuple[Plan, tuple[int, int]]:
    """A plan of one tile a program, and its grid."""
    shape = tile(name, view, vector)
    blocks = triton.cdiv(view.pixels, shape.pixels)
    columns = triton.cdiv(view.channels, shape.channels)
    return Plan(shape, blocks, 1, view.images * blocks, columns), (view.images * blocks, columns)


def _apply(
    seen: list[View],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    has_residual: bool,
    silu: bool,
) -> None:
    source, target = seen[0], seen[-1]
    extra = seen[1] if has_residual else None
    vector = vector_of(*seen)
    shared, grid = per_tile("bn_silu_apply_kernel", source, vector)
    bn_silu_apply_kernel(
        grid,
        source.data,
        extra.data if extra else None,
        target.data,
        weight,
        bias,
        mean,
        rstd,
        *strides(vector, source, extra, target),
        *extent(source, vector),
        shared.blocks,
        warps=shared.shape.warps,
        SILU=silu,
        LAST=source.last,
        VEC=vector,
        BLOCK_P=shared.shape.pixels,
        BLOCK_C=shared.shape.channels,
    )


def _sums(
    gradient: View,
    source: View,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    out: tuple[Tensor, Tensor],
    silu: bool,
) -> None:
    vector = vector_of(gradient, source)
    shared = plan("bn_silu_sums_kernel", source, vector)
    partial = torch.empty((2, shared.partials, source.channels), dtype=torch.float32, device=source.data.device)
    bn_silu_sums_kernel(
        (shared.partials, shared.columns),
        gradient.data,
        source.data,
        weight,
        bias,
        mean,
        rstd,
        partial,
        *strides(vector, gradient, source),
        *extent(source, vector),
        shared.blocks,
        shared.tiles,
        warps=shared.shape.warps,
        SILU=silu,
        LAST=source.last,
        VEC=vector,
        BLOCK_P=shared.shape.pixels,
        BLOCK_C=shared.shape.channels,
    )
    column_sums(partial, *out)


def _dx(
    gradient: View,
    source: View,
    target: View,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    mean_dy: Tensor | None,
    mean_dy_xhat: Tensor | None,
    scale: float,
    silu: bool,
) -> None:
    vector = vector_of(gradient, source, target)
    shared, grid = per_tile("bn_silu_dx_kernel", source, vector)
    bn_silu_dx_kernel(
        grid,
        gradient.data,
        source.data,
        target.data,
        weight,
        bias,
        mean,
        rstd,
        mean_dy,
        mean_dy_xhat,
        scale,
        *strides(vector, gradient, source, target),
        *extent(source, vector),
        shared.blocks,
        warps=shared.shape.warps,
        SILU=silu,
        LAST=source.last,
        VEC=vector,
        BLOCK_P=shared.shape.pixels,
        BLOCK_C=shared.shape.channels,
    )
