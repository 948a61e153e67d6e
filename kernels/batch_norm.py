"""Batch statistics and sums over all pixels of a channel, in two stages of fixed order: the same bits on every run.

Stage one writes for each block of pixels the mean and M2 = Σ (x − mean)² of its pixels: Welford's update in each lane,
then Chan's formula over the lanes. Stage two combines the blocks by Chan's formula. E[x²] − E[x]² is never used: it
cancels where the mean is large.
"""

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
    jit,
    kernel,
    origin,
    strides_of,
    tile_offsets,
    vector_in_float,
    vector_of,
    views,
)
from yolov9_fast.kernels.replay import replayed

PROGRAMS = 1024
"""Programs of a first stage: about eight for each of 132 multiprocessors; fixed: every GPU gives the same bits."""
FINISH_BLOCKS, FINISH_CHANNELS = (64, 256, PROGRAMS), 16
"""Partials that a program of a second stage loads at once, and its channels."""


@dataclass(frozen=True)
class Plan:
    """How the pixels of a tensor are split: `blocks` programs per image, `tiles` tiles per program."""

    shape: Tile
    blocks: int
    tiles: int
    partials: int
    columns: int

    def constants(self, view: View, vector: int) -> dict[str, Any]:
        return constants(view, vector, self.shape)


@dataclass(frozen=True)
class Norm:
    """A tensor and the vectors that normalise it."""

    x: View
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    rstd: Tensor


def vectors_of(*norms: Norm | None) -> list[Tensor | None]:
    """Weight, bias, mean and rstd of each, None for those of an absent one."""
    vectors: list[Tensor | None] = []
    for norm in norms:
        vectors += (norm.weight, norm.bias, norm.mean, norm.rstd) if norm else (None,) * 4
    return vectors


def given(x: View, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor) -> Norm:
    """`Norm` with all vectors as the kernels read them."""
    return Norm(x, *affine(weight, bias, x), vector_in_float(mean), vector_in_float(rstd))


def channel_vectors(x: View, count: int) -> list[Tensor]:
    return [torch.empty(x.channels, dtype=torch.float32, device=x.data.device) for _ in range(count)]


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


def finishing(partials: int) -> dict[str, int]:
    """Tile and warps of a second stage: all `partials` (up to PROGRAMS) at once, 16 values a thread, added as a tree.

    A loop over them would wait for the memory once a turn. Rows in 32 bytes: what the memory moves at least.
    """
    rows = next((block for block in FINISH_BLOCKS if partials <= block), FINISH_BLOCKS[-1])
    channels = min(FINISH_CHANNELS, 8192 // rows)
    return {"BLOCK_G": rows, "BLOCK_C": channels, "warps": max(4, rows * channels // (32 * 16))}


def per_tile(name: str, view: View, vector: int) -> tuple[Plan, tuple[int, int]]:
    """A plan of one tile a program, and its grid."""
    shape = tile(name, view, vector)
    blocks = triton.cdiv(view.pixels, shape.pixels)
    columns = triton.cdiv(view.channels, shape.channels)
    return Plan(shape, blocks, 1, view.images * blocks, columns), (view.images * blocks, columns)


def constants(view: View, vector: int, shape: Tile) -> dict[str, Any]:
    """Warps and compile-time constants of a launch on tiles of this shape."""
    blocks = {"BLOCK_P": shape.pixels, "BLOCK_C": shape.channels}
    return {"LAST": view.last, "VEC": vector, "warps": shape.warps} | blocks


@jit
def load_channel(ptr: tl.tensor, c: tl.tensor, inside: tl.tensor, absent: tl.constexpr) -> tl.tensor:
    """A per-channel vector as [1, C] in float32; the constant `absent` where there is none."""
    if ptr is None:
        return absent
    else:
        return tl.load(ptr + c, mask=inside, other=0.0).to(tl.float32)[None, :]


@jit
def load_norm(
    mean_ptr: tl.tensor, rstd_ptr: tl.tensor, weight_ptr: tl.tensor, c: tl.tensor, inside: tl.tensor
) -> tuple[tl.tensor, ...]:
    """Mean, rstd and weight of channels c as [1, C]; the weight is 1 where there is none."""
    mean = load_channel(mean_ptr, c, inside, 0.0)
    rstd = load_channel(rstd_ptr, c, inside, 1.0)
    return mean, rstd, load_channel(weight_ptr, c, inside, 1.0)


@jit
def load_bias(bias1_ptr: tl.tensor, bias2_ptr: tl.tensor, c: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """The sum of both biases as [1, C], 0 for an absent one."""
    bias = load_channel(bias1_ptr, c, inside, 0.0)
    if bias2_ptr is not None:  # not `+ 0.0` where it is absent: the compiler must keep that addition
        bias += load_channel(bias2_ptr, c, inside, 0.0)
    return bias


@jit
def quotient(a: tl.tensor, b: tl.tensor, ptr: tl.tensor) -> tl.tensor:
    """a / b for a map that `ptr` points to: correctly rounded where it is float32.

    Otherwise by `div.full`, within two units in the last place, which no 16-bit result shows: where a map of half the
    bytes is read, the instructions of the other division (about 20 more) would take longer than the memory.
    """
    if ptr.dtype.element_ty == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@jit
def silu_of(y: tl.tensor, ptr: tl.tensor) -> tl.tensor:
    return quotient(y, 1.0 + tl.exp(-y), ptr)


@jit
def silu_gradient(dz: tl.tensor, y: tl.tensor, ptr: tl.tensor) -> tl.tensor:
    s = quotient(1.0, 1.0 + tl.exp(-y), ptr)
    return dz * s * (1.0 + y * (1.0 - s))


# Reads x once; writes 8 bytes per channel and block of pixels. Grid: blocks of pixels × blocks of channels.
@kernel()
def bn_statistics_kernel(
    x_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    image_stride: tl.tensor,
    stride: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    blocks: tl.tensor,
    tiles: tl.tensor,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
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
    # Relative to one of the lanes: a weighted sum of means far from zero would cancel.
    anchor = tl.max(tl.where((seen > 0) & inside, mean, float("-inf")), axis=0)
    # Divisions per channel cost nothing: correctly rounded, for their errors are those of the whole channel.
    off = tl.sum(tl.where(seen > 0, (mean - anchor[None, :]) * seen, 0.0), axis=0)
    block_mean = anchor + tl.div_rn(off, n)
    off = mean - block_mean[None, :]
    block_m2 = tl.sum(m2 + seen * off * off, axis=0)
    channels_i64 = tl.cast(channels, tl.int64)
    place = block * channels_i64 + first + c
    tl.store(partial_ptr + place, block_mean, mask=first + c < channels)
    tl.store(partial_ptr + tl.num_programs(0) * channels_i64 + place, block_m2, mask=first + c < channels)


# Reads 8 bytes per channel and block, the means twice (the L1 has them).
# Writes 8 bytes (16 with running statistics) per channel. Grid: channels.
@kernel(streams=False)
def bn_finish_kernel(
    partial_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    spread_ptr: tl.tensor,
    running_mean_ptr: tl.tensor,
    running_var_ptr: tl.tensor,
    momentum: tl.tensor,
    eps: tl.tensor,
    partials: tl.tensor,
    channels: tl.tensor,
    blocks: tl.tensor,
    span: tl.tensor,
    pixels: tl.tensor,
    total: tl.tensor,
    RSTD: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
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
    mean = anchor + tl.div_rn(tl.sum(acc, axis=0), count)
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
    store_statistics(
        mean, m2, count, c, channels, mean_ptr, spread_ptr, running_mean_ptr, running_var_ptr, momentum, eps, RSTD
    )


@jit
def store_statistics(
    mean: tl.tensor,
    m2: tl.tensor,
    count: tl.tensor,
    c: tl.tensor,
    channels: tl.tensor,
    mean_ptr: tl.tensor,
    spread_ptr: tl.tensor,
    running_mean_ptr: tl.tensor,
    running_var_ptr: tl.tensor,
    momentum: tl.tensor,
    eps: tl.tensor,
    RSTD: tl.constexpr,
) -> tl.tensor:
    """Store mean and rstd (or M2), update the running statistics with the unbiased variance; returns rstd (or M2)."""
    inside = c < channels
    spread = m2
    if RSTD:
        spread = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(m2, count) + tl.cast(eps, tl.float32)))
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
        new = (1.0 - rate) * kept + rate * tl.div_rn(m2, tl.maximum(count - 1.0, 1.0))
        tl.store(running_var_ptr + c, as_stored(new, running_var_ptr), mask=inside)
    return spread


# Second stage of up to three sums: reads 4 bytes per column and block, writes a value a column. Grid: columns × sums.
@kernel(streams=False)
def column_sums_kernel(
    partial_ptr: tl.tensor,
    out0_ptr: tl.tensor,
    out1_ptr: tl.tensor,
    out2_ptr: tl.tensor,
    partials: tl.tensor,
    columns: tl.tensor,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
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
    last = finishing(partials)
    grid = (triton.cdiv(columns, last["BLOCK_C"]), sums)
    column_sums_kernel(grid, partial, *[*out, None, None][:3], partials, columns, **last)


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
        mean, spread = torch.zeros((2, x.channels), dtype=torch.float32, device=x.data.device).unbind()
        return mean, spread
    shared = plan("bn_statistics_kernel", x, vector)
    workspace = torch.empty((2, shared.partials, x.channels), dtype=torch.float32, device=x.data.device)
    bn_statistics_kernel(
        (shared.partials, shared.columns),
        x.data,
        workspace,
        *strides_of(vector, x),
        *extent(x, vector),
        shared.blocks,
        shared.tiles,
        **shared.constants(x, vector),
    )
    mean, spread = channel_vectors(x, 2)
    last = finishing(shared.partials)
    bn_finish_kernel(
        (triton.cdiv(x.channels, last["BLOCK_C"]),),
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
        RSTD=rstd,
        **last,
    )
    return mean, spread


@replayed()
def bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and M2 = Σ (x − mean)² of each channel of x [N, C, H, W]: float32 [C] each."""
    return statistics(views(x)[0], rstd=False)
