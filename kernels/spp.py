"""Three successive max pools 5×5 (stride 1, padding 2) of SPP-ELAN, and their gradient, equal to torch's max_pool2d.

Together they are pools of 5, 9 and 13 pixels, each a maximum along rows, then along columns: 13 + 27 reads of
neighbours instead of 75, in two launches. The gradient goes to the first maximum of each window in row-major order. One
launch per pool stores its position in a byte, another gathers, for each pixel, from the 25 windows that contain it,
without atomics.
"""

import torch
import triton.language as tl
from torch import Tensor
from yolov9_fast.kernels.launch import View, as_stored, data_of, kernel, strides_of, views
from yolov9_fast.kernels.replay import replayed
from yolov9_fast.kernels.spatial import at, dense, larger, spatial, tile_of_batch, within


# Reads x, writes three maps: 8 bytes an element of bf16 (13 reads of neighbours, from the L1). Grid: tiles × channels.
@kernel()
def spp_rows_kernel(
    x_ptr: tl.tensor,
    r5_ptr: tl.tensor,
    r9_ptr: tl.tensor,
    r13_ptr: tl.tensor,
    x_image: tl.tensor,
    x_stride: tl.tensor,
    r_image: tl.tensor,
    r_stride: tl.tensor,
    batch: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    channels: tl.tensor,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    channels = channels * VEC
    n, y, x, c, real, inside = tile_of_batch(height, width, batch, channels, BLOCK_P, BLOCK_C)
    m5 = tl.full([BLOCK_P, BLOCK_C], float("-inf"), tl.float32)
    m9 = m5
    m13 = m5
    for d in tl.static_range(-6, 7):
        mask = (real & within(y, x + d, height, width))[:, None] & inside[None, :]
        place = at(n, y, x + d, c, height, width, x_image * VEC, x_stride * VEC, LAST)
        v = tl.load(x_ptr + place, mask=mask, other=float("-inf")).to(tl.float32)
        m13 = larger(m13, v)
        if d >= -4 and d <= 4:
            m9 = larger(m9, v)
        if d >= -2 and d <= 2:
            m5 = larger(m5, v)
    place = at(n, y, x, c, height, width, r_image * VEC, r_stride * VEC, LAST)
    mask = real[:, None] & inside[None, :]
    tl.store(r5_ptr + place, as_stored(m5, r5_ptr), mask=mask)
    tl.store(r9_ptr + place, as_stored(m9, r9_ptr), mask=mask)
    tl.store(r13_ptr + place, as_stored(m13, r13_ptr), mask=mask)


# Reads three maps, writes three: 12 bytes an element of bf16 (27 reads of neighbours). Grid: tiles × channels.
@kernel()
def spp_columns_kernel(
    r5_ptr: tl.tensor,
    r9_ptr: tl.tensor,
    r13_ptr: tl.tensor,
    y1_ptr: tl.tensor,
    y2_ptr: tl.tensor,
    y3_ptr: tl.tensor,
    r_image: tl.tensor,
    r_stride: tl.tensor,
    y1_image: tl.tensor,
    y1_stride: tl.tensor,
    y2_image: tl.tensor,
    y2_stride: tl.tensor,
    y3_image: tl.tensor,
    y3_stride: tl.tensor,
    batch: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    channels: tl.tensor,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    channels = channels * VEC
    n, y, x, c, real, inside = tile_of_batch(height, width, batch, channels, BLOCK_P, BLOCK_C)
    m5 = tl.full([BLOCK_P, BLOCK_C], float("-inf"), tl.float32)
    m9 = m5
    m13 = m5
    for d in tl.static_range(-6, 7):
        mask = (real & within(y + d, x, height, width))[:, None] & inside[None, :]
        place = at(n, y + d, x, c, height, width, r_image * VEC, r_stride * VEC, LAST)
        m13 = larger(m13, tl.load(r13_ptr + place, mask=mask, other=float("-inf")).to(tl.float32))
        if d >= -4 and d <= 4:
            m9 = larger(m9, tl.load(r9_ptr + place, mask=mask, other=float("-inf")).to(tl.float32))
        if d >= -2 and d <= 2:
            m5 = larger(m5, tl.load(r5_ptr + place, mask=mask, other=float("-inf")).to(tl.float32))
    mask = real[:, None] & inside[None, :]
    place = at(n, y, x, c, height, width, y1_image * VEC, y1_stride * VEC, LAST)
    tl.store(y1_ptr + place, as_stored(m5, y1_ptr), mask=mask)
    place = at(n, y, x, c, height, width, y2_image * VEC, y2_stride * VEC, LAST)
    tl.store(y2_ptr + place, as_stored(m9, y2_ptr), mask=mask)
    place = at(n, y, x, c, height, width, y3_image * VEC, y3_stride * VEC, LAST)
    tl.store(y3_ptr + place, as_stored(m13, y3_ptr), mask=mask)


# Reads the input of one pool, writes the position of each window's maximum: 3 bytes an element of bf16.
# Not streaming: it gathers 25 neighbours, in accesses of 8 bytes, as Triton spreads the tile for the bytes it stores.
# Grid: tiles of pixels × blocks of channels.
@kernel(streams=False)
def spp_places_kernel(
    x_ptr: tl.tensor,
    place_ptr: tl.tensor,
    x_image: tl.tensor,
    x_stride: tl.tensor,
    place_image: tl.tensor,
    place_stride: tl.tensor,
    batch: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    channels: tl.tensor,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    channels = channels * VEC
    n, y, x, c, real, inside = tile_of_batch(height, width, batch, channels, BLOCK_P, BLOCK_C)
    best = tl.full([BLOCK_P, BLOCK_C], float("-inf"), tl.float32)
    # A window of nothing but -inf gives its gradient to its first pixel.
    first = tl.maximum(2 - y, 0) * 5 + tl.maximum(2 - x, 0)
    where = tl.zeros([BLOCK_P, BLOCK_C], tl.int32) + first[:, None]
    # Rows in a loop, columns unrolled: all 25 at once need more registers than there are.
    for row in range(5):
        yy = y + (row - 2)
        for column in tl.static_range(5):
            xx = x + (column - 2)
            mask = (real & within(yy, xx, height, width))[:, None] & inside[None, :]
            place = at(n, yy, xx, c, height, width, x_image * VEC, x_stride * VEC, LAST)
            v = tl.load(x_ptr + place, mask=mask, other=float("-inf")).to(tl.float32)
            better = (v > best) | (v != v)
            best = tl.where(better, v, best)
            where = tl.where(better, row * 5 + column, where)
    place = at(n, y, x, c, height, width, place_image * VEC, place_stride * VEC, LAST)
    tl.store(place_ptr + place, where.to(tl.uint8), mask=real[:, None] & inside[None, :])


# Reads positions and the output's gradient (25 neighbours each) and the input's own, writes their sum: 7 to 11 bytes an
# element of bf16. Grid: tiles of pixels × blocks of channels.
@kernel()
def spp_gather_kernel(
    place_ptr: tl.tensor,
    dy_ptr: tl.tensor,
    own_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    place_image: tl.tensor,
    place_stride: tl.tensor,
    dy_image: tl.tensor,
    dy_stride: tl.tensor,
    own_image: tl.tensor,
    own_stride: tl.tensor,
    dx_image: tl.tensor,
    dx_stride: tl.tensor,
    batch: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    channels: tl.tensor,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    channels = channels * VEC
    n, y, x, c, real, inside = tile_of_batch(height, width, batch, channels, BLOCK_P, BLOCK_C)
    sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    # Rows in a loop, columns unrolled: all 25 at once need more registers than there are.
    for row in range(5):
        yy = y + (2 - row)
        for column in tl.static_range(5):
            xx = x + (2 - column)
            mask = (real & within(yy, xx, height, width))[:, None] & inside[None, :]
            place = at(n, yy, xx, c, height, width, place_image * VEC, place_stride * VEC, LAST)
            where = tl.load(place_ptr + place, mask=mask, other=255)
            place = at(n, yy, xx, c, height, width, dy_image * VEC, dy_stride * VEC, LAST)
            dy = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
            sum += tl.where(where.to(tl.int32) == row * 5 + column, dy, 0.0)
    mask = real[:, None] & inside[None, :]
    own = tl.load(
        own_ptr + at(n, y, x, c, height, width, own_image * VEC, own_stride * VEC, LAST), mask=mask, other=0.0
    )
    sum += own.to(tl.float32)
    place = at(n, y, x, c, height, width, dx_image * VEC, dx_stride * VEC, LAST)
    tl.store(dx_ptr + place, as_stored(sum, dx_ptr), mask=mask)


@replayed()
def spp_forward(x: Tensor, y1: Tensor, y2: Tensor, y3: Tensor) -> None:
    """The three pools of x into y1, y2 and y3."""
    source, *targets = views(x, written=[y1, y2, y3])
    n, _, h, w = x.shape
    rows = [dense(source, h, w) for _ in range(3)]
    grid, vector, constants = spatial(source, x.shape, *rows, *targets)
    size = (n, h, w, source.channels // vector)
    spp_rows_kernel(grid, source.data, *data_of(*rows), *strides_of(vector, source, rows[0]), *size, **constants)
    spp_columns_kernel(
        grid,
        *data_of(*rows, *targets),
        *strides_of(vector, rows[0], *targets),
        *size,
        **constants,
    )


@replayed()
def spp_backward(x: Tensor, y1: Tensor, y2: Tensor, d0: Tensor, d1: Tensor, d2: Tensor, d3: Tensor) -> Tensor:
    """Gradient of x, from those of x itself (d0) and of the three pools."""
    *inputs, own0, own1, own2, last = views(x, y1, y2, d0, d1, d2, d3)
    _, _, h, w = x.shape
    gradient = last
    for pooled, own in ((inputs[2], own2), (inputs[1], own1), (inputs[0], own0)):
        # Between the pools in float32, as one sum; only the result is rounded.
        target = dense(inputs[0], h, w, None if own is own0 else torch.float32)
        _unpool(pooled, gradient, own, target)
        gradient = target
    return gradient.data


def _unpool(pooled: View, gradient: View, own: View, target: View) -> None:
    n, _, h, w = pooled.data.shape
    places = dense(pooled, h, w, torch.uint8)
    grid, vector, constants = spatial(pooled, pooled.data.shape, gradient, own, target)
    size = (n, h, w, pooled.channels // vector)
    spp_places_kernel(grid, pooled.data, places.data, *strides_of(vector, pooled, places), *size, **constants)
    parts = (places, gradient, own, target)
    spp_gather_kernel(grid, *data_of(*parts), *strides_of(vector, *parts), *size, **constants)
