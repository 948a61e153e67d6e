"""ADown's and AConv's pools: average 2×2 stride 1, then for ADown the second half of the channels max 3×3 stride 2.

The maximum is taken of averages rounded to the tensor's dtype, so that its place, which decides the gradient's way, is
that of torch's two pools. Backward stores that position in a byte, then gathers for each pixel of x, without atomics.
"""

import torch
import triton.language as tl
from torch import Tensor
from yolov9_fast.kernels.launch import View, as_stored, data_of, dense_like, jit, kernel, strides_of, views
from yolov9_fast.kernels.replay import replayed
from yolov9_fast.kernels.spatial import at, dense, spatial, tile_of_batch, within


@jit
def average_at(
    x_ptr: tl.tensor,
    n: tl.tensor,
    y: tl.tensor,
    x: tl.tensor,
    c: tl.tensor,
    real: tl.tensor,
    inside: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    image_stride: tl.tensor,
    stride: tl.tensor,
    LAST: tl.constexpr,
) -> tl.tensor:
    """Mean of the 2×2 pixels from (y, x) on, rounded to the dtype of x, as float32; 0 under the mask."""
    sum = tl.zeros([y.shape[0], c.shape[0]], tl.float32)
    for k in tl.static_range(4):
        place = at(n, y + k // 2, x + k % 2, c, height, width, image_stride, stride, LAST)
        sum += tl.load(x_ptr + place, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return as_stored(sum * 0.25, x_ptr).to(tl.float32)


# Reads x (4 neighbours), writes the average: 4 bytes an element of bf16. Grid: tiles of averages × blocks of channels.
@kernel()
def adown_average_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_image: tl.tensor,
    x_stride: tl.tensor,
    out_image: tl.tensor,
    out_stride: tl.tensor,
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
    n, y, x, c, real, inside = tile_of_batch(height - 1, width - 1, batch, channels, BLOCK_P, BLOCK_C)
    mean = average_at(x_ptr, n, y, x, c, real, inside, height, width, x_image * VEC, x_stride * VEC, LAST)
    place = at(n, y, x, c, height - 1, width - 1, out_image * VEC, out_stride * VEC, LAST)
    tl.store(out_ptr + place, as_stored(mean, out_ptr), mask=real[:, None] & inside[None, :])


# Reads x (36 neighbours a result, from the L1), writes a quarter as many maxima, or their places: 2.5 (2.25) bytes an
# element of bf16. Grid: tiles of results × blocks of channels.
@kernel()
def adown_max_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    place_ptr: tl.tensor,
    x_image: tl.tensor,
    x_stride: tl.tensor,
    out_image: tl.tensor,
    out_stride: tl.tensor,
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
    out_height = (height - 2) // 2 + 1
    out_width = (width - 2) // 2 + 1
    n, y, x, c, real, inside = tile_of_batch(out_height, out_width, batch, channels, BLOCK_P, BLOCK_C)
    best = tl.full([BLOCK_P, BLOCK_C], float("-inf"), tl.float32)
    # A window of nothing but -inf gives its gradient to its first average.
    first = tl.where(y == 0, 3, 0) + tl.where(x == 0, 1, 0)
    where = tl.zeros([BLOCK_P, BLOCK_C], tl.int32) + first[:, None]
    for code in tl.static_range(9):
        ay = 2 * y + (code // 3 - 1)
        ax = 2 * x + (code % 3 - 1)
        valid = real & within(ay, ax, height - 1, width - 1)
        v = average_at(x_ptr, n, ay, ax, c, valid, inside, height, width, x_image * VEC, x_stride * VEC, LAST)
        better = ((v > best) | (v != v)) & valid[:, None]
        best = tl.where(better, v, best)
        where = tl.where(better, code, where)
    place = at(n, y, x, c, out_height, out_width, out_image * VEC, out_stride * VEC, LAST)
    mask = real[:, None] & inside[None, :]
    if out_ptr is not None:
        tl.store(out_ptr + place, as_stored(best, out_ptr), mask=mask)
    if place_ptr is not None:
        tl.store(place_ptr + place, where.to(tl.uint8), mask=mask)


# Reads the averages' gradient (4 neighbours), writes dx: 4 bytes an element of bf16. Grid: tiles of x × channels.
@kernel()
def adown_average_gradient_kernel(
    dy_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    dy_image: tl.tensor,
    dy_stride: tl.tensor,
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
    for k in tl.static_range(4):
        ay = y - 1 + k // 2
        ax = x - 1 + k % 2
        mask = (real & within(ay, ax, height - 1, width - 1))[:, None] & inside[None, :]
        place = at(n, ay, ax, c, height - 1, width - 1, dy_image * VEC, dy_stride * VEC, LAST)
        sum += tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
    place = at(n, y, x, c, height, width, dx_image * VEC, dx_stride * VEC, LAST)
    tl.store(dx_ptr + place, as_stored(sum * 0.25, dx_ptr), mask=real[:, None] & inside[None, :])


# Reads places and gradients of the four windows that can reach a pixel, writes dx: 2.75 bytes an element of bf16.
# Grid: tiles of x × blocks of channels.
@kernel()
def adown_max_gradient_kernel(
    place_ptr: tl.tensor,
    dy_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    place_image: tl.tensor,
    place_stride: tl.tensor,
    dy_image: tl.tensor,
    dy_stride: tl.tensor,
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
    out_height = (height - 2) // 2 + 1
    out_width = (width - 2) // 2 + 1
    n, y, x, c, real, inside = tile_of_batch(height, width, batch, channels, BLOCK_P, BLOCK_C)
    sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for k in tl.static_range(4):
        oy = (y + 1) // 2 - 1 + k // 2
        ox = (x + 1) // 2 - 1 + k % 2
        mask = (real & within(oy, ox, out_height, out_width))[:, None] & inside[None, :]
        place = at(n, oy, ox, c, out_height, out_width, place_image * VEC, place_stride * VEC, LAST)
        where = tl.load(place_ptr + place, mask=mask, other=0).to(tl.int32)
        place = at(n, oy, ox, c, out_height, out_width, dy_image * VEC, dy_stride * VEC, LAST)
        dy = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
        # From the pixel to the average that won: 0 or -1 in both directions where the pixel is part of it.
        off_y = (2 * oy - 1 - y)[:, None] + where // 3
        off_x = (2 * ox - 1 - x)[:, None] + where % 3
        won = (off_y >= -1) & (off_y <= 0) & (off_x >= -1) & (off_x <= 0)
        sum += tl.where(won, dy, 0.0)
    place = at(n, y, x, c, height, width, dx_image * VEC, dx_stride * VEC, LAST)
    tl.store(dx_ptr + place, as_stored(sum * 0.25, dx_ptr), mask=real[:, None] & inside[None, :])


@replayed()
def adown_pool_forward(x: Tensor, split: bool) -> tuple[Tensor, Tensor]:
    """Averages of the first half of the channels and maxima of the second; (all averages, empty) without `split`."""
    _n, channels, h, w = x.shape
    source = views(x)[0]
    if not split:
        return _average(source, source).data, x.new_empty((0,))
    first, second = views(*torch.split(source.data, [channels // 2, channels - channels // 2], 1))
    pooled = dense_like(source, second.channels, (h // 2, w // 2))
    _maximum(second, pooled, pooled, None)
    return _average(first, source).data, pooled.data


@replayed()
def adown_pool_backward(d_first: Tensor | None, d_second: Tensor | None, x: Tensor, split: bool) -> Tensor:
    """Gradient of x; an output without gradient counts as zeros."""
    n, channels, h, w = x.shape
    source = views(x)[0]
    dx = dense_like(source)
    size = [channels // 2, channels - channels // 2] if split else [channels]
    halves = torch.split(dx.data, size, 1)
    if d_first is None:
        halves[0].zero_()
    else:
        gradient, target = views(d_first, written=[halves[0]])
        grid, vector, constants = spatial(target, (n, size[0], h, w), gradient)
        extent = (n, h, w, target.channels // vector)
        adown_average_gradient_kernel(
            grid, gradient.data, target.data, *strides_of(vector, gradient, target), *extent, **constants
        )
    if split and d_second is None:
        halves[1].zero_()
    elif split and d_second is not None:
        second, gradient, target = views(torch.split(source.data, size, 1)[1], d_second, written=[halves[1]])
        places = dense(second, (h - 2) // 2 + 1, (w - 2) // 2 + 1, torch.uint8)
        _maximum(second, places, None, places)
        grid, vector, constants = spatial(target, (n, size[1], h, w), gradient)
        parts = (places, gradient, target)
        extent = (n, h, w, target.channels // vector)
        adown_max_gradient_kernel(grid, *data_of(*parts), *strides_of(vector, *parts), *extent, **constants)
    return dx.data


def _average(source: View, like: View) -> View:
    n, c, h, w = source.data.shape
    out = dense_like(like, c, (h - 1, w - 1))
    grid, vector, constants = spatial(source, (n, c, h - 1, w - 1), out)
    extent = (n, h, w, c // vector)
    adown_average_kernel(grid, source.data, out.data, *strides_of(vector, source, out), *extent, **constants)
    return out


def _maximum(source: View, like: View, out: View | None, places: View | None) -> None:
    n, c, h, w = source.data.shape
    grid, vector, constants = spatial(source, like.data.shape, out)
    extent = (n, h, w, c // vector)
    targets = data_of(out, places)
    adown_max_kernel(grid, source.data, *targets, *strides_of(vector, source, like), *extent, **constants)
