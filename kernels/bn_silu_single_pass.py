"""BatchNorm + SiLU of one input or of two in a single pass, for maps that stay in registers.

A program holds all pixels of a block of channels: forward computes statistics and output, backward sums and dx, and
each reads its tensors once. As in `bn_silu_tiled` a body serves one input and two. Bytes below are those of an element
of bfloat16.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from yolov9_fast.kernels.batch_norm import (
    Norm,
    constants,
    extent,
    load_bias,
    load_channel,
    load_norm,
    silu_gradient,
    silu_of,
    store_statistics,
    vectors_of,
)
from yolov9_fast.kernels.bn_silu_tiled import of_one_or_two
from yolov9_fast.kernels.config import Tile
from yolov9_fast.kernels.launch import View, as_stored, data_of, jit, strides_of, vector_of

VALUES, VALUES_UNALIGNED, MOST_WARPS = 32, 16, 16
"""Float32 values that a thread holds of all tensors, and the most warps of a program.

16 warps leave 128 registers a thread: 32 for the values, as many for what is computed from them while those are still
needed (deviations, exponentials, the residual), the rest for a 64-bit address and a mask per 16-byte access and for the
vectors of the channels. 64 values a thread spill in most variants. Without 16-byte accesses every value has an address
of its own, two more registers each: then half as many."""


def tile_of(view: View, vector: int, tensors: int) -> Tile | None:
    """The tile of a program that holds all pixels of `tensors` maps like `view`; None where they are too many."""
    rows = view.images * view.pixels
    channels = 16 // view.data.element_size()
    held = max(triton.next_power_of_2(rows), 256)
    values = VALUES if vector > 1 else VALUES_UNALIGNED
    warps = max(4, triton.next_power_of_2(triton.cdiv(held * channels * tensors, 32 * values)))
    return Tile(held, channels, warps) if rows > 0 and warps <= MOST_WARPS else None


@jit
def row_offsets(
    rows: tl.tensor,
    c: tl.tensor,
    pixels: tl.tensor,
    image_stride: tl.tensor,
    stride: tl.tensor,
    LAST: tl.constexpr,
) -> tl.tensor:
    """64-bit offsets [rows, channels]; a row is a pixel of the batch."""
    if LAST:
        return rows[:, None].to(tl.int64) * stride + c[None, :]
    else:
        image = (rows // pixels).to(tl.int64)
        return (image * image_stride + rows % pixels)[:, None] + c[None, :].to(tl.int64) * stride


@jit
def load_rows(
    ptr: tl.tensor,
    rows: tl.tensor,
    c: tl.tensor,
    valid: tl.tensor,
    pixels: tl.tensor,
    image_stride: tl.tensor,
    stride: tl.tensor,
    LAST: tl.constexpr,
) -> tl.tensor:
    """In the dtype of the map, which takes fewer registers than float32; 0 where not `valid`."""
    return tl.load(ptr + row_offsets(rows, c, pixels, image_stride, stride, LAST), mask=valid, other=0)


@jit
def store_rows(
    ptr: tl.tensor,
    value: tl.tensor,
    rows: tl.tensor,
    c: tl.tensor,
    valid: tl.tensor,
    pixels: tl.tensor,
    image_stride: tl.tensor,
    stride: tl.tensor,
    LAST: tl.constexpr,
) -> None:
    place = row_offsets(rows, c, pixels, image_stride, stride, LAST)
    tl.store(ptr + place, as_stored(value, ptr), mask=valid)


@jit
def statistics_of(x: tl.tensor, valid: tl.tensor, count: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Mean and M2 of each column of a tile that holds all rows."""
    mean = tl.div_rn(tl.sum(x.to(tl.float32), axis=0), count)
    off = tl.where(valid, x.to(tl.float32) - mean[None, :], 0.0)
    # The mean of the deviations is the rounding error of the mean itself; to correct it costs no read.
    error = tl.div_rn(tl.sum(off, axis=0), count)
    squares = tl.sum(off * off, axis=0)
    return mean + error, tl.where(squares == float("inf"), squares, squares - count * error * error)


# Reads the inputs (and residual), writes out: 4 bytes for one input, 6 for two, 2 more with a residual.
# Grid: blocks of channels.
@of_one_or_two("single_pass", roomy=(8, 8))
def _forward_kernels(
    x1_ptr: tl.tensor,
    x2_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    weight1_ptr: tl.tensor,
    bias1_ptr: tl.tensor,
    mean1_ptr: tl.tensor,
    rstd1_ptr: tl.tensor,
    weight2_ptr: tl.tensor,
    bias2_ptr: tl.tensor,
    mean2_ptr: tl.tensor,
    rstd2_ptr: tl.tensor,
    running_mean1_ptr: tl.tensor,
    running_var1_ptr: tl.tensor,
    running_mean2_ptr: tl.tensor,
    running_var2_ptr: tl.tensor,
    momentum: tl.tensor,
    eps: tl.tensor,
    x1_image: tl.tensor,
    x1_stride: tl.tensor,
    x2_image: tl.tensor,
    x2_stride: tl.tensor,
    residual_image: tl.tensor,
    residual_stride: tl.tensor,
    out_image: tl.tensor,
    out_stride: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    total: tl.tensor,
    SILU: tl.constexpr,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    if LAST:
        channels = channels * VEC
    else:
        pixels = pixels * VEC
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.arange(0, BLOCK_P)
    inside = c < channels
    valid = (rows < total)[:, None] & inside[None, :]
    x1 = load_rows(x1_ptr, rows, c, valid, pixels, x1_image * VEC, x1_stride * VEC, LAST)
    if x2_ptr is not None:
        x2 = load_rows(x2_ptr, rows, c, valid, pixels, x2_image * VEC, x2_stride * VEC, LAST)
    count = tl.cast(total, tl.float32)
    mean, m2 = statistics_of(x1, valid, count)
    rstd = store_statistics(
        mean, m2, count, c, channels, mean1_ptr, rstd1_ptr, running_mean1_ptr, running_var1_ptr, momentum, eps, True
    )
    y = (x1.to(tl.float32) - mean[None, :]) * (rstd[None, :] * load_channel(weight1_ptr, c, inside, 1.0))
    if x2_ptr is not None:
        mean, m2 = statistics_of(x2, valid, count)
        rstd = store_statistics(
            mean, m2, count, c, channels, mean2_ptr, rstd2_ptr, running_mean2_ptr, running_var2_ptr, momentum, eps, True
        )
        scale = rstd[None, :] * load_channel(weight2_ptr, c, inside, 1.0)
        y += (x2.to(tl.float32) - mean[None, :]) * scale + load_bias(bias1_ptr, bias2_ptr, c, inside)
    else:
        y += load_channel(bias1_ptr, c, inside, 0.0)
    if SILU:
        y = silu_of(y, x1_ptr)
    if residual_ptr is not None:
        y += load_rows(residual_ptr, rows, c, valid, pixels, residual_image * VEC, residual_stride * VEC, LAST).to(
            tl.float32
        )
    store_rows(out_ptr, y, rows, c, valid, pixels, out_image * VEC, out_stride * VEC, LAST)


# Reads dz and the inputs, writes dx of each: 6 bytes for one input, 10 for two. Grid: blocks of channels.
@of_one_or_two("single_pass_backward", roomy=(0, 16))
def _backward_kernels(
    dz_ptr: tl.tensor,
    x1_ptr: tl.tensor,
    x2_ptr: tl.tensor,
    dx1_ptr: tl.tensor,
    dx2_ptr: tl.tensor,
    weight1_ptr: tl.tensor,
    bias1_ptr: tl.tensor,
    mean1_ptr: tl.tensor,
    rstd1_ptr: tl.tensor,
    weight2_ptr: tl.tensor,
    bias2_ptr: tl.tensor,
    mean2_ptr: tl.tensor,
    rstd2_ptr: tl.tensor,
    dbias_ptr: tl.tensor,
    dweight1_ptr: tl.tensor,
    dweight2_ptr: tl.tensor,
    dz_image: tl.tensor,
    dz_stride: tl.tensor,
    x1_image: tl.tensor,
    x1_stride: tl.tensor,
    x2_image: tl.tensor,
    x2_stride: tl.tensor,
    dx1_image: tl.tensor,
    dx1_stride: tl.tensor,
    dx2_image: tl.tensor,
    dx2_stride: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    total: tl.tensor,
    SILU: tl.constexpr,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    if LAST:
        channels = channels * VEC
    else:
        pixels = pixels * VEC
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.arange(0, BLOCK_P)
    inside = c < channels
    valid = (rows < total)[:, None] & inside[None, :]
    dz = load_rows(dz_ptr, rows, c, valid, pixels, dz_image * VEC, dz_stride * VEC, LAST)
    x1 = load_rows(x1_ptr, rows, c, valid, pixels, x1_image * VEC, x1_stride * VEC, LAST)
    if x2_ptr is not None:
        x2 = load_rows(x2_ptr, rows, c, valid, pixels, x2_image * VEC, x2_stride * VEC, LAST)
    mean1, rstd1, weight1 = load_norm(mean1_ptr, rstd1_ptr, weight1_ptr, c, inside)
    if x2_ptr is not None:
        mean2, rstd2, weight2 = load_norm(mean2_ptr, rstd2_ptr, weight2_ptr, c, inside)
    bias = load_bias(bias1_ptr, bias2_ptr, c, inside)
    dy = dz.to(tl.float32)
    xhat1 = (x1.to(tl.float32) - mean1) * rstd1
    y = xhat1 * weight1
    if x2_ptr is not None:
        xhat2 = (x2.to(tl.float32) - mean2) * rstd2
        y += xhat2 * weight2
    if SILU:
        dy = silu_gradient(dy, y + bias, x1_ptr)
    dbias = tl.sum(tl.where(valid, dy, 0.0), axis=0)
    dweight1 = tl.sum(tl.where(valid, dy * xhat1, 0.0), axis=0)
    if x2_ptr is not None:
        dweight2 = tl.sum(tl.where(valid, dy * xhat2, 0.0), axis=0)
    tl.store(dbias_ptr + c, dbias, mask=inside)
    tl.store(dweight1_ptr + c, dweight1, mask=inside)
    if x2_ptr is not None:
        tl.store(dweight2_ptr + c, dweight2, mask=inside)
    count = tl.cast(total, tl.float32)
    mean_dy = tl.div_rn(dbias, count)[None, :]
    dx1 = (weight1 * rstd1) * (dy - mean_dy - xhat1 * tl.div_rn(dweight1, count)[None, :])
    if x2_ptr is not None:
        dx2 = (weight2 * rstd2) * (dy - mean_dy - xhat2 * tl.div_rn(dweight2, count)[None, :])
    store_rows(dx1_ptr, dx1, rows, c, valid, pixels, dx1_image * VEC, dx1_stride * VEC, LAST)
    if x2_ptr is not None:
        store_rows(dx2_ptr, dx2, rows, c, valid, pixels, dx2_image * VEC, dx2_stride * VEC, LAST)


def forward(
    one: Norm,
    two: Norm | None,
    extra: View | None,
    target: View,
    running: Sequence[Tensor | None],
    momentum: float,
    eps: float,
    silu: bool,
    tile: Tile,
) -> None:
    """Batch statistics into `mean` and `rstd` of each input, the output into `target`; `extra` is the residual.

    `running`: the running mean and variance of the first input, then of the second, updated where not None.
    """
    maps = (one.x, two.x if two else None, extra, target)
    vector = vector_of(*maps)
    _forward_kernels[two is not None](
        (triton.cdiv(one.x.channels, tile.channels),),
        *data_of(*maps),
        *vectors_of(one, two),
        *running,
        *([] if two else [None, None]),
        float(momentum),
        float(eps),
        *strides_of(vector, *maps),
        *extent(one.x, vector),
        one.x.images * one.x.pixels,
        SILU=silu,
        **constants(one.x, vector, tile),
    )


def backward(
    gradient: View,
    one: Norm,
    two: Norm | None,
    targets: tuple[View, View | None],
    sums: Sequence[Tensor],
    silu: bool,
    tile: Tile,
) -> None:
    """dx of each input into `targets`; dbias and dweight of each into `sums`."""
    maps = (gradient, one.x, two.x if two else None, *targets)
    vector = vector_of(*maps)
    _backward_kernels[two is not None](
        (triton.cdiv(one.x.channels, tile.channels),),
        *data_of(*maps),
        *vectors_of(one, two),
        *sums,
        *([] if two else [None]),
        *strides_of(vector, *maps),
        *extent(one.x, vector),
        one.x.images * one.x.pixels,
        SILU=silu,
        **constants(one.x, vector, tile),
    )
