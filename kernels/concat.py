"""The gradient of a map that two consumers read, one of them a slice of its channels: the whole's plus the slice's."""

import triton.language as tl
from torch import Tensor
from yolov9_fast.kernels.launch import as_stored, data_of, dense_like, kernel, strides_of, views
from yolov9_fast.kernels.replay import replayed
from yolov9_fast.kernels.spatial import at, spatial, tile_of_batch


# Reads whole and part once, writes the sum: 2 (2 + part / whole) bytes an element of bf16. Grid: tiles of pixels ×
# blocks of channels.
@kernel()
def tap_gradient_kernel(
    whole_ptr: tl.tensor,
    part_ptr: tl.tensor,
    out_ptr: tl.tensor,
    whole_image: tl.tensor,
    whole_stride: tl.tensor,
    part_image: tl.tensor,
    part_stride: tl.tensor,
    out_image: tl.tensor,
    out_stride: tl.tensor,
    batch: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    channels: tl.tensor,
    start: tl.tensor,
    count: tl.tensor,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    channels = channels * VEC
    start = start * VEC
    n, y, x, c, real, inside = tile_of_batch(height, width, batch, channels, BLOCK_P, BLOCK_C)
    mask = real[:, None] & inside[None, :]
    place = at(n, y, x, c, height, width, whole_image * VEC, whole_stride * VEC, LAST)
    value = tl.load(whole_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tapped = (c >= start) & (c < start + count * VEC)
    place = at(n, y, x, c - start, height, width, part_image * VEC, part_stride * VEC, LAST)
    part = tl.load(part_ptr + place, mask=real[:, None] & tapped[None, :], other=0.0).to(tl.float32)
    value = tl.where(tapped[None, :], value + part, value)  # not + 0: that of -0 is 0
    place = at(n, y, x, c, height, width, out_image * VEC, out_stride * VEC, LAST)
    tl.store(out_ptr + place, as_stored(value, out_ptr), mask=mask)


@replayed()
def tap_backward(whole: Tensor, part: Tensor, start: int) -> Tensor:
    """`whole` [N, C, H, W] with `part` added to the channels from `start` on; dense, in the layout of `whole`."""
    n, _, h, w = whole.shape
    source, added = views(whole, part)
    out = dense_like(source)
    # Of the target too: a slice that begins between two 16-byte accesses is read and written one by one.
    (target,) = views(added.data, written=[out.data.narrow(1, start, added.channels)])[1:]
    grid, vector, constants = spatial(source, whole.shape, added, out, target)
    tap_gradient_kernel(
        grid,
        *data_of(source, added, out),
        *strides_of(vector, source, added, out),
        n,
        h,
        w,
        source.channels // vector,
        start // vector,
        added.channels // vector,
        **constants,
    )
    return out.data
