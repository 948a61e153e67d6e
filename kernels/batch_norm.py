"""Batch statistics and sums over all pixels of a channel, in two stages of fixed order: the same bits on every run.

Stage one leaves for each block of pixels the mean and M2 = Σ (x − mean)² of its own pixels, each lane by Welford's
update, lanes joined by Chan's formula; stage two joins the blocks by the same formula. No E[x²] − E[x]² anywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from yolov9_fast.kernels.config import Tile, tile
from yolov9_fast.kernels.launch import (
    View,
    affine,
    as_stored,
    kernel,
    origin,
    parameters,
    tile_offsets,
    vector_of,
    views,
)

PROGRAMS = 1024
"""Programs of a first stage: about eight for each of 132 multiprocessors; fixed: every GPU gives the same bits."""
WHOLE_VALUES, WHOLE_VALUES_APART, WHOLE_WARPS = 32, 16, 16
"""What a thread of the one-launch form holds of all tensors, in float32, and the most warps of its program.

16 warps leave 128 registers a thread. 32 of them are the values, as many again what is computed from them while those
are still needed (deviations, exponentials, the residual), the rest addresses, one of 64 bits and a mask per 16-byte
access, and the vectors of the channels. 64 values a thread spill in most variants. Where no 16-byte access is possible
every value has an address of its own: two registers more for each, so half as many."""
FINISH_BLOCKS, FINISH_CHANNELS = 64, 16


@dataclass(frozen=True)
class Plan:
    """How the pixels of a tensor are shared out: `blocks` programs an image, each going over `tiles` tiles."""

    shape: Tile
    blocks: int
    tiles: int
    partials: int
    columns: int

    def constants(self, view: View, vector: int) -> dict[str, Any]:
        shape = self.shape
        blocks = {"BLOCK_P": shape.pixels, "BLOCK_C": shape.channels}
        return {"LAST": view.last, "VEC": vector, "warps": shape.warps} | blocks


@dataclass(frozen=True)
class Norm:
    """A tensor and the vectors that normalise it."""

    x: View
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    rstd: Tensor

    @property
    def vectors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.mean, self.rstd


def given(x: View, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor) -> Norm:
    """`Norm` with all vectors as the kernels read them."""
    return Norm(x, *affine(weight, bias, x.channels, x.data.device), *parameters(mean, rstd))


def forward_views(inputs: Sequence[Tensor], residual: Tensor | None, out: Tensor) -> list[Any]:
    """Views of the inputs, of the residual (or None) and of the output, in one layout."""
    seen: list[Any] = views(*inputs, *([] if residual is None else [residual]), written=[out])
    return seen if residual is not None else [*seen[:-1], None, seen[-1]]


def channel_vectors(x: View, count: int) -> list[Tensor]:
    return [torch.empty(x.channels, dtype=torch.float32, device=x.data.device) for _ in range(count)]


def strides(vector: int, *all_views: View | None) -> list[int]:
    """Image stride and stride of each view in units of `vector`, 0 for a view left out."""
    return [s // vector for view in all_views for s in ((view.image_stride, view.stride) if view else (0, 0))]


def extent(view: View, vector: int) -> tuple[int, int]:
    """Pixels and channels as the kernels take them: the contiguous one in units of `vector`."""
    return (view.pixels, view.channels // vector) if view.last else (view.pixels // vector, view.channels)


def plan(name: str, view: View, vector: int) -> Plan:
    """For a first stage: about PROGRAMS programs, each over several tiles of one image."""
    shape = tile(name, view, vector)
    columns = triton.cdiv(view.channels, shape.channels)
    per_image = triton.cdiv(view.pixels, shape.pixels)
    wanted = max(1, PROGRAMS // max(columns, 1))
    tiles = min(per_image, max(1, triton.cdiv(view.images * per_image, wanted)))
    blocks = triton.cdiv(per_image, max(tiles, 1))
    return Plan(shape, blocks, tiles, view.images * blocks, columns)


def per_tile(name: str, view: View, vector: int) -> tuple[Plan, tuple[int, int]]:
    """A plan of one tile a program, and its grid."""
    shape = tile(name, view, vector)
    blocks = triton.cdiv(view.pixels, shape.pixels)
    columns = triton.cdiv(view.channels, shape.channels)
    return Plan(shape, blocks, 1, view.images * blocks, columns), (view.images * blocks, columns)


def whole_tile(view: View, vector: int, tensors: int) -> Tile | None:
    """The tile of a program that holds all rows of `tensors` tensors like `view`; None if they are too many."""
    rows = view.images * view.pixels
    channels = 16 // view.data.element_size()
    held = max(triton.next_power_of_2(rows), 256)
    values = WHOLE_VALUES if vector > 1 else WHOLE_VALUES_APART
    warps = max(4, triton.next_power_of_2(triton.cdiv(held * channels * tensors, 32 * values)))
    return Tile(held, channels, warps) if rows > 0 and warps <= WHOLE_WARPS else None


def whole_constants(view: View, vector: int, shape: Tile) -> dict[str, Any]:
    """Constants of a one-launch kernel."""
    blocks = {"BLOCK_P": shape.pixels, "BLOCK_C": shape.channels}
    return {"LAST": view.last, "VEC": vector, "warps": shape.warps} | blocks


@triton.jit
def load_channel(ptr, c, inside, absent: tl.constexpr):
    """A per-channel vector as [1, C], or the value that stands for a vector left out."""
    if ptr is None:
        return absent
    else:
        return tl.load(ptr + c, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def silu_of(y):
    return y / (1.0 + tl.exp(-y))


@triton.jit
def silu_gradient(dz, y):
    s = 1.0 / (1.0 + tl.exp(-y))
    return dz * s * (1.0 + y * (1.0 - s))


@triton.jit
def whole_offsets(rows, c, pixels, image_stride, stride, LAST: tl.constexpr):
    """Offsets of all rows of a small tensor (row = pixel of the batch) × channels c."""
    if LAST:
        return rows[:, None].to(tl.int64) * stride + c[None, :]
    else:
        image = (rows // pixels).to(tl.int64)
        return (image * image_stride + rows % pixels)[:, None] + c[None, :].to(tl.int64) * stride


@triton.jit
def whole_statistics(x, valid, count):
    """Mean and M2 of each column of a tile that holds all rows."""
    mean = tl.sum(x.to(tl.float32), axis=0) / count
    off = tl.where(valid, x.to(tl.float32) - mean[None, :], 0.0)
    # The mean of the deviations is the rounding error of the mean itself; put right, it costs no read.
    error = tl.sum(off, axis=0) / count
    return mean + error, tl.sum(off * off, axis=0) - count * error * error


# Reads x once; writes 8 bytes per channel and block of pixels. Grid: blocks of pixels × blocks of channels.
@kernel()
def bn_statistics_kernel(
    x_ptr,
    partial_ptr,
    image_stride,
    stride,
    pixels,
    channels,
    blocks,
    tiles,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image_stride = image_stride * VEC
    stride = stride * VEC
    if LAST:
        channels = channels * VEC
    else:
        pixels = pixels * VEC
    block = tl.program_id(0)
    start = (block % blocks) * (tiles * BLOCK_P)
    first = tl.program_id(1) * BLOCK_C
    x_ptr += origin(block // blocks, start, first, image_stride, stride, LAST)
    p = tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    inside = (first + c < channels)[None, :]
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for t in range(tiles):
        valid = (start + t * BLOCK_P + p < pixels)[:, None] & inside
        x = tl.load(x_ptr + tile_offsets(t * BLOCK_P + p, c, stride, LAST), mask=valid, other=0).to(tl.float32)
        delta = tl.where(valid, x - mean, 0.0)
        mean += delta * (1.0 / (t + 1))
        m2 += delta * tl.where(valid, x - mean, 0.0)
    # How many values each lane has seen: the last tile of an image may be short.
    seen = tl.minimum(tl.maximum((pixels - start - p + BLOCK_P - 1) // BLOCK_P, 0), tiles).to(tl.float32)[:, None]
    n = tl.minimum(pixels - start, tiles * BLOCK_P).to(tl.float32)
    # Relative to one of the lanes: a weighted sum of means far from zero would lose what the lanes have kept.
    anchor = tl.max(tl.where((seen > 0) & inside, mean, float("-inf")), axis=0)
    block_mean = anchor + tl.sum(tl.where(seen > 0, (mean - anchor[None, :]) * seen, 0.0), axis=0) / n
    off = mean - block_mean[None, :]
    block_m2 = tl.sum(m2 + seen * off * off, axis=0)
    channels_i64 = tl.cast(channels, tl.int64)
    place = block * channels_i64 + first + c
    tl.store(partial_ptr + place, block_mean, mask=first + c < channels)
    tl.store(partial_ptr + tl.num_programs(0) * channels_i64 + place, block_m2, mask=first + c < channels)


# Reads 8 bytes per channel and block, twice; writes 8 (16 with running statistics) per channel. Grid: channels.
@kernel(streams=False)
def bn_finish_kernel(
    partial_ptr,
    mean_ptr,
    spread_ptr,
    running_mean_ptr,
    running_var_ptr,
    momentum,
    eps,
    partials,
    channels,
    blocks,
    span,
    pixels,
    total,
    RSTD: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    g = tl.arange(0, BLOCK_G)
    m2_ptr = partial_ptr + partials * tl.cast(channels, tl.int64)
    anchor = tl.load(partial_ptr + c, mask=c < channels, other=0.0)
    acc = tl.zeros([BLOCK_G, BLOCK_C], tl.float32)
    for start in range(0, partials, BLOCK_G):
        rows = start + g
        valid = (rows < partials)[:, None] & (c < channels)[None, :]
        n = tl.minimum(span, pixels - (rows % blocks) * span).to(tl.float32)[:, None]
        partial = tl.load(partial_ptr + rows[:, None].to(tl.int64) * channels + c[None, :], mask=valid, other=0.0)
        acc += tl.where(valid, n * (partial - anchor[None, :]), 0.0)
    count = tl.cast(total, tl.float32)
    mean = anchor + tl.sum(acc, axis=0) / count
    acc = tl.zeros([BLOCK_G, BLOCK_C], tl.float32)
    for start in range(0, partials, BLOCK_G):
        rows = start + g
        valid = (rows < partials)[:, None] & (c < channels)[None, :]
        place = rows[:, None].to(tl.int64) * channels + c[None, :]
        n = tl.minimum(span, pixels - (rows % blocks) * span).to(tl.float32)[:, None]
        off = tl.load(partial_ptr + place, mask=valid, other=0.0) - mean[None, :]
        m2 = tl.load(m2_ptr + place, mask=valid, other=0.0)
        acc += tl.where(valid, m2 + n * off * off, 0.0)
    m2 = tl.sum(acc, axis=0)
    keep_statistics(
        mean, m2, count, c, channels, mean_ptr, spread_ptr, running_mean_ptr, running_var_ptr, momentum, eps, RSTD
    )


@triton.jit
def keep_statistics(
    mean,
    m2,
    count,
    c,
    channels,
    mean_ptr,
    spread_ptr,
    running_mean_ptr,
    running_var_ptr,
    momentum,
    eps,
    RSTD: tl.constexpr,
):
    """Store mean and rstd (or M2), update the running statistics with the unbiased variance; returns rstd (or M2)."""
    inside = c < channels
    spread = m2
    if RSTD:
        spread = 1.0 / tl.sqrt(m2 / count + tl.cast(eps, tl.float32))
    tl.store(mean_ptr + c, mean, mask=inside)
    tl.store(spread_ptr + c, spread, mask=inside)
    if running_mean_ptr is not None:
        rate = tl.cast(momentum, tl.float32)
        kept = tl.load(running_mean_ptr + c, mask=inside, other=0.0).to(tl.float32)
        new = (1.0 - rate) * kept + rate * mean
        tl.store(running_mean_ptr + c, as_stored(new, running_mean_ptr), mask=inside)
    if running_var_ptr is not None:
        rate = tl.cast(momentum, tl.float32)
        kept = tl.load(running_var_ptr + c, mask=inside, other=0.0).to(tl.float32)
        new = (1.0 - rate) * kept + rate * (m2 / tl.maximum(count - 1.0, 1.0))
        tl.store(running_var_ptr + c, as_stored(new, running_var_ptr), mask=inside)
    return spread


# Second stage of up to three sums: reads 4 bytes per column and block, writes a value a column. Grid: columns × sums.
@kernel(streams=False)
def column_sums_kernel(
    partial_ptr,
    out0_ptr,
    out1_ptr,
    out2_ptr,
    partials,
    columns,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns_i64 = tl.cast(columns, tl.int64)
    which = tl.program_id(1)
    partial_ptr += which * columns_i64 * partials
    acc = tl.zeros([BLOCK_G, BLOCK_C], tl.float32)
    for start in range(0, partials, BLOCK_G):
        rows = start + tl.arange(0, BLOCK_G)
        valid = (rows < partials)[:, None] & (c < columns)[None, :]
        acc += tl.load(partial_ptr + rows[:, None] * columns_i64 + c[None, :], mask=valid, other=0.0)
    total = tl.sum(acc, axis=0)
    total = as_stored(total, out0_ptr)
    if which == 0:
        tl.store(out0_ptr + c, total, mask=c < columns)
    if out1_ptr is not None:
        if which == 1:
            tl.store(out1_ptr + c, total, mask=c < columns)
    if out2_ptr is not None:
        if which == 2:
            tl.store(out2_ptr + c, total, mask=c < columns)


def column_sums(partial: Tensor, *out: Tensor) -> None:
    """`partial` [K, G, C] float32 summed over G in a fixed order, into K tensors of C elements of one dtype."""
    sums, partials, columns = partial.shape
    grid = (triton.cdiv(columns, FINISH_CHANNELS), sums)
    targets = [*out, None, None][:3]
    column_sums_kernel(
        grid, partial, *targets, partials, columns, warps=4, BLOCK_G=FINISH_BLOCKS, BLOCK_C=FINISH_CHANNELS
    )


def statistics(
    x: View,
    rstd: bool,
    eps: float = 0.0,
    momentum: float = 0.0,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and rstd (or M2) of each channel, float32; updates the running statistics."""
    vector = vector_of(x)
    if x.images * x.pixels == 0:
        return tuple(torch.zeros(x.channels, dtype=torch.float32, device=x.data.device) for _ in range(2))
    shared = plan("bn_statistics_kernel", x, vector)
    workspace = torch.empty((2, shared.partials, x.channels), dtype=torch.float32, device=x.data.device)
    bn_statistics_kernel(
        (shared.partials, shared.columns),
        x.data,
        workspace,
        *strides(vector, x),
        *extent(x, vector),
        shared.blocks,
        shared.tiles,
        **shared.constants(x, vector),
    )
    mean, spread = channel_vectors(x, 2)
    bn_finish_kernel(
        (triton.cdiv(x.channels, FINISH_CHANNELS),),
        workspace,
        mean,
        spread,
        running_mean,
        running_var,
        float(momentum),
        float(eps),
        shared.partials,
        x.channels,
        shared.blocks,
        shared.tiles * shared.shape.pixels,
        x.pixels,
        x.images * x.pixels,
        warps=4,
        RSTD=rstd,
        BLOCK_G=FINISH_BLOCKS,
        BLOCK_C=FINISH_CHANNELS,
    )
    return mean, spread


def bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and M2 = Σ (x − mean)² of each channel of x [N, C, H, W]: float32 [C] each."""
    return statistics(views(x)[0], rstd=False)
