"""BatchNorm + SiLU of one input or of two in tiles: apply, sums of the backward pass, dx.

out = silu(BN1(x1) + BN2(x2)) (+ residual), without BN2(x2) in `bn_silu`. Each body serves both: where x2_ptr is None
Triton compiles all of the second input away. Bytes below are those of an element of bfloat16.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from yolov9_fast.kernels.batch_norm import (
    Norm,
    column_sums,
    extent,
    load_bias,
    load_channel,
    load_norm,
    per_tile,
    plan,
    silu_gradient,
    silu_of,
    vectors_of,
)
from yolov9_fast.kernels.launch import (
    Kernel,
    View,
    as_stored,
    data_of,
    jit,
    origin,
    strides_of,
    tile_offsets,
    vector_of,
)


def of_one_or_two(name: str, roomy: tuple[int, int]) -> Callable[[Callable[..., Any]], tuple[Kernel, Kernel]]:
    """Decorator: the kernels `bn_silu_NAME_kernel` and `rep_bn_silu_NAME_kernel`, of one input and of two.

    `roomy` of each differs: two inputs need more registers, and not every variant is better for a limit of its own.
    """

    def made(body: Callable[..., Any]) -> tuple[Kernel, Kernel]:
        one, two = (
            Kernel(body, f"{prefix}bn_silu_{name}_kernel", True, warps)
            for prefix, warps in zip(("", "rep_"), roomy, strict=True)
        )
        return one, two

    return made


@jit
def load_tile(
    ptr: tl.tensor,
    image: tl.tensor,
    start: tl.tensor,
    first: tl.tensor,
    p: tl.tensor,
    c: tl.tensor,
    valid: tl.tensor,
    image_stride: tl.tensor,
    stride: tl.tensor,
    LAST: tl.constexpr,
) -> tl.tensor:
    """Pixels start + p of channels first + c in float32, 0 where not `valid`."""
    ptr += origin(image, start, first, image_stride, stride, LAST)
    return tl.load(ptr + tile_offsets(p, c, stride, LAST), mask=valid, other=0).to(tl.float32)


@jit
def store_tile(
    ptr: tl.tensor,
    value: tl.tensor,
    image: tl.tensor,
    start: tl.tensor,
    first: tl.tensor,
    p: tl.tensor,
    c: tl.tensor,
    valid: tl.tensor,
    image_stride: tl.tensor,
    stride: tl.tensor,
    LAST: tl.constexpr,
) -> None:
    ptr += origin(image, start, first, image_stride, stride, LAST)
    tl.store(ptr + tile_offsets(p, c, stride, LAST), as_stored(value, ptr), mask=valid)


# Reads the inputs (and residual), writes out: 4 bytes for one input, 6 for two, 2 more with a residual.
# Grid: tiles of pixels × blocks of channels.
@of_one_or_two("apply", roomy=(8, 0))
def _apply_kernels(
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
    blocks: tl.tensor,
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
    image = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks) * BLOCK_P
    first = tl.program_id(1) * BLOCK_C
    p = tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    inside = first + c < channels
    valid = (start + p < pixels)[:, None] & inside[None, :]
    x1 = load_tile(x1_ptr, image, start, first, p, c, valid, x1_image * VEC, x1_stride * VEC, LAST)
    if x2_ptr is not None:
        x2 = load_tile(x2_ptr, image, start, first, p, c, valid, x2_image * VEC, x2_stride * VEC, LAST)
    mean1, rstd1, weight1 = load_norm(mean1_ptr, rstd1_ptr, weight1_ptr, first + c, inside)
    y = (x1 - mean1) * (rstd1 * weight1)
    if x2_ptr is not None:
        mean2, rstd2, weight2 = load_norm(mean2_ptr, rstd2_ptr, weight2_ptr, first + c, inside)
        y += (x2 - mean2) * (rstd2 * weight2)
    y += load_bias(bias1_ptr, bias2_ptr, first + c, inside)
    if SILU:
        y = silu_of(y, x1_ptr)
    if residual_ptr is not None:
        y += load_tile(
            residual_ptr, image, start, first, p, c, valid, residual_image * VEC, residual_stride * VEC, LAST
        )
    store_tile(out_ptr, y, image, start, first, p, c, valid, out_image * VEC, out_stride * VEC, LAST)


# Reads dz and the inputs: 4 bytes for one, 6 for two. Writes a float32 per sum, channel and block: Σ dy and Σ dy·x̂ of
# each input. Grid: blocks of pixels × blocks of channels.
@of_one_or_two("sums", roomy=(8, 8))
def _sums_kernels(
    dz_ptr: tl.tensor,
    x1_ptr: tl.tensor,
    x2_ptr: tl.tensor,
    weight1_ptr: tl.tensor,
    bias1_ptr: tl.tensor,
    mean1_ptr: tl.tensor,
    rstd1_ptr: tl.tensor,
    weight2_ptr: tl.tensor,
    bias2_ptr: tl.tensor,
    mean2_ptr: tl.tensor,
    rstd2_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    dz_image: tl.tensor,
    dz_stride: tl.tensor,
    x1_image: tl.tensor,
    x1_stride: tl.tensor,
    x2_image: tl.tensor,
    x2_stride: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    blocks: tl.tensor,
    tiles: tl.tensor,
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
    image = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks) * (tiles * BLOCK_P)
    first = tl.program_id(1) * BLOCK_C
    p = tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    inside = first + c < channels
    dz_ptr += origin(image, start, first, dz_image * VEC, dz_stride * VEC, LAST)
    x1_ptr += origin(image, start, first, x1_image * VEC, x1_stride * VEC, LAST)
    if x2_ptr is not None:
        x2_ptr += origin(image, start, first, x2_image * VEC, x2_stride * VEC, LAST)
    mean1, rstd1, weight1 = load_norm(mean1_ptr, rstd1_ptr, weight1_ptr, first + c, inside)
    if x2_ptr is not None:
        mean2, rstd2, weight2 = load_norm(mean2_ptr, rstd2_ptr, weight2_ptr, first + c, inside)
    bias = load_bias(bias1_ptr, bias2_ptr, first + c, inside)
    sum_dy = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_dy_xhat1 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    if x2_ptr is not None:
        sum_dy_xhat2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for t in range(tiles):
        valid = (start + t * BLOCK_P + p < pixels)[:, None] & inside[None, :]
        dy = tl.load(dz_ptr + tile_offsets(t * BLOCK_P + p, c, dz_stride * VEC, LAST), mask=valid, other=0)
        x1 = tl.load(x1_ptr + tile_offsets(t * BLOCK_P + p, c, x1_stride * VEC, LAST), mask=valid, other=0)
        if x2_ptr is not None:
            x2 = tl.load(x2_ptr + tile_offsets(t * BLOCK_P + p, c, x2_stride * VEC, LAST), mask=valid, other=0)
        dy = dy.to(tl.float32)
        xhat1 = (x1.to(tl.float32) - mean1) * rstd1
        if x2_ptr is not None:
            xhat2 = (x2.to(tl.float32) - mean2) * rstd2
            y = xhat1 * weight1 + xhat2 * weight2 + bias
        else:
            y = xhat1 * weight1 + bias
        if SILU:
            dy = silu_gradient(dy, y, x1_ptr)
        # A masked value's dz is 0, but a weight or statistic of infinity would still make it NaN.
        sum_dy += tl.where(valid, dy, 0.0)
        sum_dy_xhat1 += tl.where(valid, dy * xhat1, 0.0)
        if x2_ptr is not None:
            sum_dy_xhat2 += tl.where(valid, dy * xhat2, 0.0)
    channels_i64 = tl.cast(channels, tl.int64)
    step = tl.num_programs(0) * channels_i64
    place = tl.program_id(0) * channels_i64 + first + c
    tl.store(partial_ptr + place, tl.sum(sum_dy, axis=0), mask=inside)
    tl.store(partial_ptr + step + place, tl.sum(sum_dy_xhat1, axis=0), mask=inside)
    if x2_ptr is not None:
        tl.store(partial_ptr + 2 * step + place, tl.sum(sum_dy_xhat2, axis=0), mask=inside)


# Reads dz and the inputs, writes dx of each: 6 bytes for one input, 10 for two.
# Grid: tiles of pixels × blocks of channels.
@of_one_or_two("dx", roomy=(8, 0))
def _dx_kernels(
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
    mean_dy_ptr: tl.tensor,
    mean_dy_xhat1_ptr: tl.tensor,
    mean_dy_xhat2_ptr: tl.tensor,
    scale: tl.tensor,
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
    blocks: tl.tensor,
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
    image = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks) * BLOCK_P
    first = tl.program_id(1) * BLOCK_C
    p = tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    inside = first + c < channels
    valid = (start + p < pixels)[:, None] & inside[None, :]
    dy = load_tile(dz_ptr, image, start, first, p, c, valid, dz_image * VEC, dz_stride * VEC, LAST)
    x1 = load_tile(x1_ptr, image, start, first, p, c, valid, x1_image * VEC, x1_stride * VEC, LAST)
    if x2_ptr is not None:
        x2 = load_tile(x2_ptr, image, start, first, p, c, valid, x2_image * VEC, x2_stride * VEC, LAST)
    mean1, rstd1, weight1 = load_norm(mean1_ptr, rstd1_ptr, weight1_ptr, first + c, inside)
    if x2_ptr is not None:
        mean2, rstd2, weight2 = load_norm(mean2_ptr, rstd2_ptr, weight2_ptr, first + c, inside)
    bias = load_bias(bias1_ptr, bias2_ptr, first + c, inside)
    xhat1 = (x1 - mean1) * rstd1
    y = xhat1 * weight1
    if x2_ptr is not None:
        xhat2 = (x2 - mean2) * rstd2
        y += xhat2 * weight2
    if SILU:
        dy = silu_gradient(dy, y + bias, x1_ptr)
    part = tl.cast(scale, tl.float32)
    dy -= load_channel(mean_dy_ptr, first + c, inside, 0.0) * part
    dx1 = (weight1 * rstd1) * (dy - xhat1 * (load_channel(mean_dy_xhat1_ptr, first + c, inside, 0.0) * part))
    if x2_ptr is not None:
        dx2 = (weight2 * rstd2) * (dy - xhat2 * (load_channel(mean_dy_xhat2_ptr, first + c, inside, 0.0) * part))
    store_tile(dx1_ptr, dx1, image, start, first, p, c, valid, dx1_image * VEC, dx1_stride * VEC, LAST)
    if x2_ptr is not None:
        store_tile(dx2_ptr, dx2, image, start, first, p, c, valid, dx2_image * VEC, dx2_stride * VEC, LAST)


def apply(one: Norm, two: Norm | None, extra: View | None, target: View, silu: bool) -> None:
    """`target` from given statistics; `extra` is the residual."""
    maps = (one.x, two.x if two else None, extra, target)
    vector = vector_of(*maps)
    kernel = _apply_kernels[two is not None]
    shared, grid = per_tile(kernel.name, one.x, vector)
    kernel(
        grid,
        *data_of(*maps),
        *vectors_of(one, two),
        *strides_of(vector, *maps),
        *extent(one.x, vector),
        shared.blocks,
        SILU=silu,
        **shared.constants(one.x, vector),
    )


def sums(gradient: View, one: Norm, two: Norm | None, out: Sequence[Tensor], silu: bool) -> None:
    """Into `out`: Σ dy and, for each input, Σ dy·x̂, float32 [C] each."""
    maps = (gradient, one.x, two.x if two else None)
    vector = vector_of(*maps)
    kernel = _sums_kernels[two is not None]
    shared = plan(kernel.name, one.x, vector)
    partial = torch.empty((len(out), shared.partials, one.x.channels), dtype=torch.float32, device=one.x.data.device)
    kernel(
        (shared.partials, shared.columns),
        *data_of(*maps),
        *vectors_of(one, two),
        partial,
        *strides_of(vector, *maps),
        *extent(one.x, vector),
        shared.blocks,
        shared.tiles,
        SILU=silu,
        **shared.constants(one.x, vector),
    )
    column_sums(partial, *out)


def dx(
    gradient: View,
    one: Norm,
    two: Norm | None,
    targets: tuple[View, View | None],
    means: Sequence[Tensor],
    scale: float,
    silu: bool,
) -> None:
    """Into `targets`: dx of each input, from `means` times `scale`: the means of dy and of dy·x̂ of each input."""
    maps = (gradient, one.x, two.x if two else None, *targets)
    vector = vector_of(*maps)
    kernel = _dx_kernels[two is not None]
    shared, grid = per_tile(kernel.name, one.x, vector)
    kernel(
        grid,
        *data_of(*maps),
        *vectors_of(one, two),
        *means,
        *([] if two else [None]),
        scale,
        *strides_of(vector, *maps),
        *extent(one.x, vector),
        shared.blocks,
        SILU=silu,
        **shared.constants(one.x, vector),
    )
