"""The Triton kernels of the 1×1 convolution: products over pixels of several maps, with sums in float32.

`yolov9_fast.kernels.conv1x1` launches them.
"""

import triton.language as tl
from yolov9_fast.kernels.launch import as_stored, dot, jit, kernel, origin, tile_offsets


@jit
def multiply(
    acc: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    image: tl.tensor,
    start: tl.tensor,
    pixels: tl.tensor,
    x_image: tl.tensor,
    x_stride: tl.tensor,
    channels: tl.tensor,
    column: tl.tensor,
    outputs: tl.tensor,
    output: tl.tensor,
    weight_stride: tl.tensor,
    ROW_MAJOR: tl.constexpr,
    PRECISION: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """acc [pixels, outputs] += x · weightᵀ for one input, whose first channel is `column` of the weight."""
    p = tl.arange(0, BLOCK_P)
    k = tl.arange(0, BLOCK_K)
    o = output + tl.arange(0, acc.shape[1])
    for first in range(0, channels, BLOCK_K):
        some = first + k < channels
        base = x_ptr + origin(image, start, tl.cast(first, tl.int32), x_image, x_stride, LAST)
        mask = (start + p < pixels)[:, None] & some[None, :]
        x = tl.load(base + tile_offsets(p, k, x_stride, LAST), mask=mask, other=0.0)
        if ROW_MAJOR:
            place = (column + first + k)[:, None] + o[None, :] * weight_stride
        else:
            place = (column + first + k)[:, None] * weight_stride + o[None, :]
        w = tl.load(weight_ptr + place, mask=some[:, None] & (o < outputs)[None, :], other=0.0)
        acc = dot(x, w, acc, PRECISION)
    return acc


# Reads every input once per block of outputs (from the L2 but once), writes out: 2 (Σ C + O) bytes a pixel of bf16.
# Grid: tiles of pixels × blocks of outputs, the latter fastest, so that adjacent programs share their inputs.
@kernel(roomy=8)
def conv1x1_kernel(
    x0_ptr: tl.tensor,
    x1_ptr: tl.tensor,
    x2_ptr: tl.tensor,
    x3_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x0_image: tl.tensor,
    x0_stride: tl.tensor,
    x1_image: tl.tensor,
    x1_stride: tl.tensor,
    x2_image: tl.tensor,
    x2_stride: tl.tensor,
    x3_image: tl.tensor,
    x3_stride: tl.tensor,
    out_image: tl.tensor,
    out_stride: tl.tensor,
    channels0: tl.tensor,
    channels1: tl.tensor,
    channels2: tl.tensor,
    channels3: tl.tensor,
    outputs: tl.tensor,
    weight_stride: tl.tensor,
    pixels: tl.tensor,
    blocks: tl.tensor,
    ROW_MAJOR: tl.constexpr,
    PRECISION: tl.constexpr,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> None:
    if not LAST:
        pixels = pixels * VEC
    outputs = outputs * VEC
    wide = tl.cdiv(outputs, BLOCK_O)
    tile = tl.program_id(0) // wide
    image = tile // blocks
    start = (tile % blocks) * BLOCK_P
    output = (tl.program_id(0) % wide) * BLOCK_O
    acc = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    acc = multiply(
        acc,
        x0_ptr,
        weight_ptr,
        image,
        start,
        pixels,
        x0_image * VEC,
        x0_stride * VEC,
        channels0 * VEC,
        0,
        outputs,
        output,
        weight_stride * VEC,
        ROW_MAJOR,
        PRECISION,
        LAST,
        BLOCK_P,
        BLOCK_K,
    )
    if x1_ptr is not None:
        acc = multiply(
            acc,
            x1_ptr,
            weight_ptr,
            image,
            start,
            pixels,
            x1_image * VEC,
            x1_stride * VEC,
            channels1 * VEC,
            (channels0) * VEC,
            outputs,
            output,
            weight_stride * VEC,
            ROW_MAJOR,
            PRECISION,
            LAST,
            BLOCK_P,
            BLOCK_K,
        )
    if x2_ptr is not None:
        acc = multiply(
            acc,
            x2_ptr,
            weight_ptr,
            image,
            start,
            pixels,
            x2_image * VEC,
            x2_stride * VEC,
            channels2 * VEC,
            (channels0 + channels1) * VEC,
            outputs,
            output,
            weight_stride * VEC,
            ROW_MAJOR,
            PRECISION,
            LAST,
            BLOCK_P,
            BLOCK_K,
        )
    if x3_ptr is not None:
        acc = multiply(
            acc,
            x3_ptr,
            weight_ptr,
            image,
            start,
            pixels,
            x3_image * VEC,
            x3_stride * VEC,
            channels3 * VEC,
            (channels0 + channels1 + channels2) * VEC,
            outputs,
            output,
            weight_stride * VEC,
            ROW_MAJOR,
            PRECISION,
            LAST,
            BLOCK_P,
            BLOCK_K,
        )
    o = output + tl.arange(0, BLOCK_O)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o, mask=o < outputs, other=0.0).to(tl.float32)[None, :]
    p = tl.arange(0, BLOCK_P)
    out_ptr += origin(image, start, output, out_image * VEC, out_stride * VEC, LAST)
    place = tile_offsets(p, tl.arange(0, BLOCK_O), out_stride * VEC, LAST)
    tl.store(out_ptr + place, as_stored(acc, out_ptr), mask=(start + p < pixels)[:, None] & (o < outputs)[None, :])


# Reads dy once per block of channels (from the L2 but once), writes every gradient: 2 (O + Σ C) bytes a pixel of bf16.
# Grid: tiles of pixels × blocks of channels of all inputs, the latter fastest.
@kernel(roomy=8)
def conv1x1_input_gradient_kernel(
    dy_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    dx0_ptr: tl.tensor,
    dx1_ptr: tl.tensor,
    dx2_ptr: tl.tensor,
    dx3_ptr: tl.tensor,
    dy_image: tl.tensor,
    dy_stride: tl.tensor,
    channels0: tl.tensor,
    channels1: tl.tensor,
    channels2: tl.tensor,
    channels3: tl.tensor,
    outputs: tl.tensor,
    weight_stride: tl.tensor,
    pixels: tl.tensor,
    blocks: tl.tensor,
    ROW_MAJOR: tl.constexpr,
    PRECISION: tl.constexpr,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> None:
    if not LAST:
        pixels = pixels * VEC
    until0 = tl.cdiv(channels0 * VEC, BLOCK_O)
    until1 = until0 + tl.cdiv(channels1 * VEC, BLOCK_O)
    until2 = until1 + tl.cdiv(channels2 * VEC, BLOCK_O)
    wide = until2 + tl.cdiv(channels3 * VEC, BLOCK_O)
    tile = tl.program_id(0) // wide
    column = tl.program_id(0) % wide
    image = tile // blocks
    start = (tile % blocks) * BLOCK_P
    which = (column >= until0).to(tl.int32) + (column >= until1).to(tl.int32) + (column >= until2).to(tl.int32)
    from_tile = tl.where(which == 0, 0, tl.where(which == 1, until0, tl.where(which == 2, until1, until2)))
    before = tl.where(which > 0, channels0, 0) + tl.where(which > 1, channels1, 0) + tl.where(which > 2, channels2, 0)
    mine = tl.where(which == 0, channels0, tl.where(which == 1, channels1, tl.where(which == 2, channels2, channels3)))
    before = before * VEC
    mine = mine * VEC
    first = (column - from_tile) * BLOCK_O
    acc = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    # The columns of this input's channels as outputs, dy's channels as what is summed over.
    if ROW_MAJOR:
        weight_ptr += before
    else:
        weight_ptr += before.to(tl.int64) * (weight_stride * VEC)
    acc = multiply(
        acc,
        dy_ptr,
        weight_ptr,
        image,
        start,
        pixels,
        dy_image * VEC,
        dy_stride * VEC,
        outputs * VEC,
        0,
        mine,
        first,
        weight_stride * VEC,
        not ROW_MAJOR,
        PRECISION,
        LAST,
        BLOCK_P,
        BLOCK_K,
    )
    p = tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_O)
    mask = (start + p < pixels)[:, None] & (first + c < mine)[None, :]
    # Gradients are dense: their strides follow from their channels.
    stride = pixels
    if LAST:
        stride = mine
    place = origin(image, start, first, mine.to(tl.int64) * pixels, stride, LAST) + tile_offsets(p, c, stride, LAST)
    if which == 0:
        tl.store(dx0_ptr + place, as_stored(acc, dx0_ptr), mask=mask)
    if dx1_ptr is not None:
        if which == 1:
            tl.store(dx1_ptr + place, as_stored(acc, dx1_ptr), mask=mask)
    if dx2_ptr is not None:
        if which == 2:
            tl.store(dx2_ptr + place, as_stored(acc, dx2_ptr), mask=mask)
    if dx3_ptr is not None:
        if which == 3:
            tl.store(dx3_ptr + place, as_stored(acc, dx3_ptr), mask=mask)


# Reads dy and one input once per block of the other's channels, writes 4 bytes per weight and split.
# Grid: blocks of outputs × blocks of channels × splits of the pixels.
@kernel(roomy=8)
def conv1x1_weight_gradient_kernel(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    dy_image: tl.tensor,
    dy_stride: tl.tensor,
    x_image: tl.tensor,
    x_stride: tl.tensor,
    outputs: tl.tensor,
    channels: tl.tensor,
    column: tl.tensor,
    columns: tl.tensor,
    pixels: tl.tensor,
    blocks: tl.tensor,
    tiles: tl.tensor,
    PRECISION: tl.constexpr,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> None:
    if not LAST:
        pixels = pixels * VEC
    outputs = outputs * VEC
    channels = channels * VEC
    split = tl.program_id(2)
    image = split // blocks
    start = (split % blocks) * (tiles * BLOCK_P)
    output = tl.program_id(0) * BLOCK_O
    first = tl.program_id(1) * BLOCK_K
    dy_ptr += origin(image, start, output, dy_image * VEC, dy_stride * VEC, LAST)
    x_ptr += origin(image, start, first, x_image * VEC, x_stride * VEC, LAST)
    o = tl.arange(0, BLOCK_O)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_O, BLOCK_K], tl.float32)
    for t in range(tiles):
        p = t * BLOCK_P + tl.arange(0, BLOCK_P)
        real = (start + p < pixels)[:, None]
        dy = tl.load(
            dy_ptr + tile_offsets(p, o, dy_stride * VEC, LAST), mask=real & (output + o < outputs)[None, :], other=0.0
        )
        x = tl.load(
            x_ptr + tile_offsets(p, k, x_stride * VEC, LAST), mask=real & (first + k < channels)[None, :], other=0.0
        )
        acc = dot(tl.trans(dy), x, acc, PRECISION)
    row = split.to(tl.int64) * outputs + output + o
    place = row[:, None] * (columns * VEC) + (column * VEC + first + k)[None, :]
    tl.store(partial_ptr + place, acc, mask=(output + o < outputs)[:, None] & (first + k < channels)[None, :])
