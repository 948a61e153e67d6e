"""CBFuse: every input resized to the target's height and width, their sum in the listed order, plus the target.

Nearest as torch has it: source row = min(floor(row · (h / H)), h − 1) in float32. Backward gathers, for each source
pixel, the target pixels that read it: no atomics.
"""

from collections.abc import Sequence

import triton.language as tl
from torch import Tensor
from yolov9_fast.kernels.launch import as_stored, data_of, dense_like, jit, kernel, strides_of, views
from yolov9_fast.kernels.replay import replayed
from yolov9_fast.kernels.spatial import at, dense, spatial, tile_of_batch

MOST = 5
"""Inputs of one launch in addition to the target: as many as yolov9-e needs. More inputs take several launches."""


@jit
def nearest(position: tl.tensor, scale: tl.tensor, size: tl.tensor) -> tl.tensor:
    return tl.minimum((position.to(tl.float32) * tl.cast(scale, tl.float32)).to(tl.int32), size - 1)


@jit
def resized(
    x_ptr: tl.tensor,
    n: tl.tensor,
    y: tl.tensor,
    x: tl.tensor,
    c: tl.tensor,
    mask: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    scale_y: tl.tensor,
    scale_x: tl.tensor,
    image_stride: tl.tensor,
    stride: tl.tensor,
    LAST: tl.constexpr,
) -> tl.tensor:
    place = at(n, nearest(y, scale_y, height), nearest(x, scale_x, width), c, height, width, image_stride, stride, LAST)
    return tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)


# Reads the target and every input once, writes the sum: 2 (2 + Σ (h·w)/(H·W)) bytes an element of bf16. Grid: tiles of
# the target's pixels × blocks of channels.
@kernel()
def cbfuse_kernel(
    x0_ptr: tl.tensor,
    x1_ptr: tl.tensor,
    x2_ptr: tl.tensor,
    x3_ptr: tl.tensor,
    x4_ptr: tl.tensor,
    target_ptr: tl.tensor,
    out_ptr: tl.tensor,
    h0: tl.tensor,
    w0: tl.tensor,
    scale_y0: tl.tensor,
    scale_x0: tl.tensor,
    x0_image: tl.tensor,
    x0_stride: tl.tensor,
    h1: tl.tensor,
    w1: tl.tensor,
    scale_y1: tl.tensor,
    scale_x1: tl.tensor,
    x1_image: tl.tensor,
    x1_stride: tl.tensor,
    h2: tl.tensor,
    w2: tl.tensor,
    scale_y2: tl.tensor,
    scale_x2: tl.tensor,
    x2_image: tl.tensor,
    x2_stride: tl.tensor,
    h3: tl.tensor,
    w3: tl.tensor,
    scale_y3: tl.tensor,
    scale_x3: tl.tensor,
    x3_image: tl.tensor,
    x3_stride: tl.tensor,
    h4: tl.tensor,
    w4: tl.tensor,
    scale_y4: tl.tensor,
    scale_x4: tl.tensor,
    x4_image: tl.tensor,
    x4_stride: tl.tensor,
    target_image: tl.tensor,
    target_stride: tl.tensor,
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
    n, y, x, c, real, inside = tile_of_batch(height, width, batch, channels, BLOCK_P, BLOCK_C)
    mask = real[:, None] & inside[None, :]
    sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum += resized(x0_ptr, n, y, x, c, mask, h0, w0, scale_y0, scale_x0, x0_image * VEC, x0_stride * VEC, LAST)
    if x1_ptr is not None:
        sum += resized(x1_ptr, n, y, x, c, mask, h1, w1, scale_y1, scale_x1, x1_image * VEC, x1_stride * VEC, LAST)
    if x2_ptr is not None:
        sum += resized(x2_ptr, n, y, x, c, mask, h2, w2, scale_y2, scale_x2, x2_image * VEC, x2_stride * VEC, LAST)
    if x3_ptr is not None:
        sum += resized(x3_ptr, n, y, x, c, mask, h3, w3, scale_y3, scale_x3, x3_image * VEC, x3_stride * VEC, LAST)
    if x4_ptr is not None:
        sum += resized(x4_ptr, n, y, x, c, mask, h4, w4, scale_y4, scale_x4, x4_image * VEC, x4_stride * VEC, LAST)
    place = at(n, y, x, c, height, width, target_image * VEC, target_stride * VEC, LAST)
    sum += tl.load(target_ptr + place, mask=mask, other=0.0).to(tl.float32)
    place = at(n, y, x, c, height, width, out_image * VEC, out_stride * VEC, LAST)
    tl.store(out_ptr + place, as_stored(sum, out_ptr), mask=mask)


# Reads dz once (each source pixel a part of it), writes dx: 2 (H·W + h·w) bytes a channel of bf16. Grid: tiles of the
# source's pixels × blocks of channels. span_y × span_x covers every target pixel that may read one source pixel.
@kernel()
def cbfuse_gradient_kernel(
    dz_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    scale_y: tl.tensor,
    scale_x: tl.tensor,
    dz_image: tl.tensor,
    dz_stride: tl.tensor,
    dx_image: tl.tensor,
    dx_stride: tl.tensor,
    span_y: tl.tensor,
    span_x: tl.tensor,
    batch: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    target_height: tl.tensor,
    target_width: tl.tensor,
    channels: tl.tensor,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    channels = channels * VEC
    n, y, x, c, real, inside = tile_of_batch(height, width, batch, channels, BLOCK_P, BLOCK_C)
    # One before the exact bound: forward rounds in float32, and the loop compares with its result.
    from_y = (y.to(tl.int64) * target_height // height).to(tl.int32) - 1
    from_x = (x.to(tl.int64) * target_width // width).to(tl.int32) - 1
    sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for k in range(span_y * span_x):
        yy = from_y + k // span_x
        xx = from_x + k % span_x
        reads = (nearest(yy, scale_y, height) == y) & (nearest(xx, scale_x, width) == x)
        reads = reads & (yy >= 0) & (yy < target_height) & (xx >= 0) & (xx < target_width) & real
        place = at(n, yy, xx, c, target_height, target_width, dz_image * VEC, dz_stride * VEC, LAST)
        sum += tl.load(dz_ptr + place, mask=reads[:, None] & inside[None, :], other=0.0).to(tl.float32)
    place = at(n, y, x, c, height, width, dx_image * VEC, dx_stride * VEC, LAST)
    tl.store(dx_ptr + place, as_stored(sum, dx_ptr), mask=real[:, None] & inside[None, :])


@replayed()
def cbfuse_forward(inputs: Sequence[Tensor], target: Tensor) -> Tensor:
    """Sum of the inputs resized to `target`, and `target`; dense, in the layout of `target`."""
    inputs = list(inputs)
    if not inputs:
        return target.clone()
    if len(inputs) > MOST:
        target = cbfuse_forward(inputs[MOST:], target)
    last, *sources = views(target, *inputs[:MOST])
    out = dense_like(last)
    n, _, height, width = target.shape
    grid, vector, constants = spatial(last, target.shape, out, *sources)
    slots = [*sources, *[None] * MOST][:MOST]
    sizes: list[float | None] = []
    for view in slots:
        h, w = view.data.shape[2:] if view else (1, 1)
        sizes += [h, w, h / max(height, 1), w / max(width, 1), *strides_of(vector, view)]
    cbfuse_kernel(
        grid,
        *data_of(*slots),
        last.data,
        out.data,
        *sizes,
        *strides_of(vector, last, out),
        n,
        height,
        width,
        last.channels // vector,
        **constants,
    )
    return out.data


@replayed()
def cbfuse_backward(dz: Tensor, heights: Sequence[int], widths: Sequence[int]) -> list[Tensor]:
    """Gradient of every resized input (heights[i] × widths[i]); that of the target is dz itself."""
    gradient = views(dz)[0]
    n, _, height, width = dz.shape
    results = []
    for h, w in zip(heights, widths, strict=True):
        dx = dense(gradient, h, w)
        grid, vector, constants = spatial(dx, dx.data.shape, gradient)
        cbfuse_gradient_kernel(
            grid,
            gradient.data,
            dx.data,
            h / max(height, 1),
            w / max(width, 1),
            *strides_of(vector, gradient, dx),
            height // max(h, 1) + 3,
            width // max(w, 1) + 3,
            n,
            h,
            w,
            height,
            width,
            dx.channels // vector,
            **constants,
        )
        results.append(dx.data)
    return results
