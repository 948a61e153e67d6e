"""What the kernels share whose pixels look at neighbours: tiles over all pixels of a batch, neighbours, maxima."""

from typing import Any

import torch
import triton
import triton.language as tl
from yolov9_fast.kernels.config import tile
from yolov9_fast.kernels.launch import View, dense_like, jit, vector_of


def spatial(view: View, shape: tuple[int, ...], *others: View | None) -> tuple[tuple[int, int], int, dict[str, Any]]:
    """Grid, elements of an access, and constants of a kernel with a program per tile of the pixels of `shape`.

    Contiguous maps take one element at a time: only channels_last has aligned vectors of channels.
    """
    vector = vector_of(view, *others) if view.last else 1
    block = tile("spatial", view, vector)
    grid = (triton.cdiv(shape[0] * shape[2] * shape[3], block.pixels), triton.cdiv(view.channels, block.channels))
    constants = {"LAST": view.last, "VEC": vector, "BLOCK_P": block.pixels, "BLOCK_C": block.channels}
    return grid, vector, constants | {"warps": block.warps}


def dense(view: View, height: int, width: int, dtype: torch.dtype | None = None) -> View:
    """A new dense map of the batch and channels of `view`, in its layout."""
    return dense_like(view, size=(height, width), dtype=dtype)


@jit
def tile_of_batch(
    height: tl.tensor,
    width: tl.tensor,
    batch: tl.tensor,
    channels: tl.tensor,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """This program's pixels (n, y, x), channels and which of them exist."""
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (p // (height * width)).to(tl.int32)
    rest = (p - n.to(tl.int64) * (height * width)).to(tl.int32)
    return n, rest // width, rest % width, c, n < batch, c < channels


@jit
def at(
    n: tl.tensor,
    y: tl.tensor,
    x: tl.tensor,
    c: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    image_stride: tl.tensor,
    stride: tl.tensor,
    LAST: tl.constexpr,
) -> tl.tensor:
    """64-bit offsets [pixels, channels]; y and x may be outside where masked."""
    if LAST:
        return (((n * height + y) * width + x).to(tl.int64) * stride)[:, None] + c[None, :]
    else:
        return (n.to(tl.int64) * image_stride + (y * width + x))[:, None] + c[None, :].to(tl.int64) * stride


@jit
def within(y: tl.tensor, x: tl.tensor, height: tl.tensor, width: tl.tensor) -> tl.tensor:
    return (y >= 0) & (y < height) & (x >= 0) & (x < width)


@jit
def larger(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Maximum that a NaN wins, as in torch's max pool."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
