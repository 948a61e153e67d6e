"""Augmented images in one launch: mosaic, affine or perspective map, mixup, colours, flips, RGB planes.

Every step rounds as OpenCV 5 does on a CPU with FMA: coordinates are float32, fma(m0, x, m1 · y + m2); interpolation is
by FMA, rounded to the nearest even; colours go to HSV by tables of integers, and back in float32, truncated. Where a
product is rounded by itself, `product` keeps the compiler from contracting it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from yolov9_fast.kernels.launch import INTERPRETED, jit, kernel
from yolov9_fast.kernels.replay import replayed

_ROWS, _COLUMNS, _WARPS = 8, 64, 4
_INTERPRETED = tl.constexpr(INTERPRETED)
_GREY = tl.constexpr(114)
_NEAREST = tl.constexpr(12582912.0)
"""1.5 · 2^23: added to a float32 of 0..255 it leaves no bits for a fraction."""


@jit
def product(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a · b in float32, rounded by itself."""
    if _INTERPRETED:
        return a * b
    else:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )


@jit
def fused(a: tl.tensor, b: tl.tensor, c: tl.tensor) -> tl.tensor:
    """a · b + c in float32, rounded once."""
    if _INTERPRETED:
        # NumPy has no FMA. In float64 the product is exact; the sum is rounded twice, which one time in 2^29 differs.
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@jit
def mapped(row_ptr: tl.tensor, x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """A row of the matrix times (x, y, 1)."""
    m0 = tl.load(row_ptr) + tl.zeros_like(x)
    return fused(m0, x, product(tl.load(row_ptr + 1) + tl.zeros_like(y), y) + tl.load(row_ptr + 2))


@jit
def interpolated(
    pixels_ptr: tl.tensor,
    place00: tl.tensor,
    place01: tl.tensor,
    place10: tl.tensor,
    place11: tl.tensor,
    right: tl.tensor,
    down: tl.tensor,
) -> tl.tensor:
    """One channel between four pixels, an integer of float32; grey where a place is negative."""
    v00 = tl.load(pixels_ptr + place00, mask=place00 >= 0, other=_GREY).to(tl.float32)
    v01 = tl.load(pixels_ptr + place01, mask=place01 >= 0, other=_GREY).to(tl.float32)
    v10 = tl.load(pixels_ptr + place10, mask=place10 >= 0, other=_GREY).to(tl.float32)
    v11 = tl.load(pixels_ptr + place11, mask=place11 >= 0, other=_GREY).to(tl.float32)
    upper = fused(right, v01 - v00, v00)
    lower = fused(right, v11 - v10, v10)
    return (fused(down, lower - upper, upper) + _NEAREST) - _NEAREST


@jit
def view(
    pixels_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    matrix_ptr: tl.tensor,
    canvas_height: tl.tensor,
    canvas_width: tl.tensor,
    tiles: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    PERSPECTIVE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Blue, green and red of one view at pixels (x, y) of the result, integers of float32."""
    source_x = mapped(matrix_ptr, x, y)
    source_y = mapped(matrix_ptr + 3, x, y)
    if PERSPECTIVE:
        depth = mapped(matrix_ptr + 6, x, y)
        source_x = tl.div_rn(source_x, depth)
        source_y = tl.div_rn(source_y, depth)
    # Further out all four neighbours are grey too; NaN becomes -2.
    source_x = tl.minimum(tl.where(source_x > -2.0, source_x, -2.0), canvas_width.to(tl.float32))
    source_y = tl.minimum(tl.where(source_y > -2.0, source_y, -2.0), canvas_height.to(tl.float32))
    left, top = tl.floor(source_x), tl.floor(source_y)
    right, down = source_x - left, source_y - top
    column, row = left.to(tl.int32), top.to(tl.int32)
    column0 = (column >= 0) & (column < canvas_width)
    column1 = (column >= -1) & (column + 1 < canvas_width)
    row0 = (row >= 0) & (row < canvas_height)
    row1 = (row >= -1) & (row + 1 < canvas_height)
    nowhere = tl.full(x.shape, -1, tl.int64)
    place00, place01, place10, place11 = nowhere, nowhere, nowhere, nowhere
    for tile in range(0, tiles):
        tile_ptr = tiles_ptr + 5 * tile
        offset = tl.load(tile_ptr)
        height, width = tl.load(tile_ptr + 1).to(tl.int32), tl.load(tile_ptr + 2).to(tl.int32)
        i, j = column - tl.load(tile_ptr + 3).to(tl.int32), row - tl.load(tile_ptr + 4).to(tl.int32)
        in0, in1 = column0 & (i >= 0) & (i < width), column1 & (i >= -1) & (i + 1 < width)
        on0, on1 = row0 & (j >= 0) & (j < height), row1 & (j >= -1) & (j + 1 < height)
        place = offset + 3 * (j.to(tl.int64) * width + i)
        below = place + 3 * width
        place00 = tl.where(on0 & in0, place, place00)
        place01 = tl.where(on0 & in1, place + 3, place01)
        place10 = tl.where(on1 & in0, below, place10)
        place11 = tl.where(on1 & in1, below + 3, place11)
    blue = interpolated(pixels_ptr, place00, place01, place10, place11, right, down)
    green = interpolated(pixels_ptr + 1, place00, place01, place10, place11, right, down)
    red = interpolated(pixels_ptr + 2, place00, place01, place10, place11, right, down)
    return blue, green, red


@jit
def quotient(numerator: tl.constexpr, divisor: tl.tensor) -> tl.tensor:
    """numerator / divisor to the nearest integer, which is never halfway; 0 for a divisor of 0."""
    value = numerator / tl.maximum(divisor, 1).to(tl.float32) + 0.5
    return tl.where(divisor == 0, 0, value.to(tl.int32))


@jit
def recoloured(
    tables_ptr: tl.tensor, blue: tl.tensor, green: tl.tensor, red: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Through hue, saturation and value of 8 bits and their tables; integers of int32."""
    value = tl.maximum(tl.maximum(blue, green), red)
    spread = value - tl.minimum(tl.minimum(blue, green), red)
    saturation = (spread * quotient(1044480.0, value) + 2048) >> 12  # 255 · 2^12
    sector = tl.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    sector = tl.where(value == red, green - blue, sector)
    hue = (sector * quotient(122880.0, spread) + 2048) >> 12  # 30 · 2^12
    hue = tl.where(hue < 0, hue + 180, hue)
    hue = tl.load(tables_ptr + hue).to(tl.float32)
    saturation = tl.load(tables_ptr + 256 + saturation).to(tl.float32)
    value = tl.load(tables_ptr + 512 + value).to(tl.float32)

    ones = tl.full(hue.shape, 1.0, tl.float32)
    h = product(hue, ones * 0.03333333507180214)  # 6 / 180 as float32
    s = product(saturation, ones * 0.003921568859368563)  # 1 / 255
    v = product(value, ones * 0.003921568859368563)
    whole = tl.floor(h)
    h = h - whole
    sector = whole.to(tl.int32)
    low = product(v, 1.0 - s)
    falling = product(v, fused(-s, h, ones))
    rising = product(v, fused(-s, 1.0 - h, ones))
    red = tl.where((sector == 0) | (sector == 5), v, tl.where((sector == 2) | (sector == 3), low, falling))
    red = tl.where(sector == 4, rising, red)
    green = tl.where((sector == 1) | (sector == 2), v, tl.where((sector == 4) | (sector == 5), low, falling))
    green = tl.where(sector == 0, rising, green)
    blue = tl.where((sector == 3) | (sector == 4), v, tl.where((sector == 0) | (sector == 1), low, falling))
    blue = tl.where(sector == 2, rising, blue)
    return (blue * 255.0).to(tl.int32), (green * 255.0).to(tl.int32), (red * 255.0).to(tl.int32)


# Reads what the result shows of the sources, writes 3 bytes a pixel. Grid: blocks of columns, blocks of rows, samples.
# `numbers`: float32, for each sample 9 of each view's matrix, then the shares of both views.
@kernel(streams=False)
def augment_kernel(
    pixels_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    canvases_ptr: tl.tensor,
    numbers_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    flips_ptr: tl.tensor,
    out_ptr: tl.tensor,
    size: tl.tensor,
    tiles: tl.tensor,
    VIEWS: tl.constexpr,
    PERSPECTIVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    sample = tl.program_id(2).to(tl.int64)
    number = tl.arange(0, ROWS * COLUMNS)
    row = tl.program_id(1) * ROWS + number // COLUMNS
    column = tl.program_id(0) * COLUMNS + number % COLUMNS
    inside = (row < size) & (column < size)
    vertical, horizontal = tl.load(flips_ptr + 2 * sample) != 0, tl.load(flips_ptr + 2 * sample + 1) != 0
    x = tl.where(horizontal, size - 1 - column, column).to(tl.float32)
    y = tl.where(vertical, size - 1 - row, row).to(tl.float32)

    tiles_ptr += sample * (VIEWS * 5) * tiles
    canvases_ptr += sample * (VIEWS * 2)
    numbers_ptr += sample * (VIEWS * 9 + 2)
    height, width = tl.load(canvases_ptr).to(tl.int32), tl.load(canvases_ptr + 1).to(tl.int32)
    blue, green, red = view(pixels_ptr, tiles_ptr, numbers_ptr, height, width, tiles, x, y, PERSPECTIVE)
    if VIEWS == 2:
        height, width = tl.load(canvases_ptr + 2).to(tl.int32), tl.load(canvases_ptr + 3).to(tl.int32)
        if height > 0:
            share, rest = tl.load(numbers_ptr + 18), tl.load(numbers_ptr + 19)
            share, rest = share + tl.zeros_like(x), rest + tl.zeros_like(x)
            b, g, r = view(pixels_ptr, tiles_ptr + 5 * tiles, numbers_ptr + 9, height, width, tiles, x, y, PERSPECTIVE)
            blue = (fused(blue, share, product(b, rest)) + _NEAREST) - _NEAREST
            green = (fused(green, share, product(g, rest)) + _NEAREST) - _NEAREST
            red = (fused(red, share, product(r, rest)) + _NEAREST) - _NEAREST
    blue, green, red = blue.to(tl.int32), green.to(tl.int32), red.to(tl.int32)
    if tables_ptr is not None:
        blue, green, red = recoloured(tables_ptr + sample * 768, blue, green, red)

    out_ptr += sample * 3 * size * size + row * size + column
    tl.store(out_ptr, red.to(tl.uint8), mask=inside)
    out_ptr += size * size
    tl.store(out_ptr, green.to(tl.uint8), mask=inside)
    out_ptr += size * size
    tl.store(out_ptr, blue.to(tl.uint8), mask=inside)


@replayed()
def augment(
    pixels: Tensor,
    tiles: Tensor,
    canvases: Tensor,
    matrices: Tensor,
    tables: Tensor | None,
    flips: Tensor,
    shares: Tensor,
    size: int,
    perspective: bool,
) -> Tensor:
    """Kernel `augment` of `ops/_augment.py`."""
    batch, views, count = tiles.shape[:3]
    parts = (matrices.view(batch, 9 * views), shares[:, None], 1 - shares[:, None])
    numbers = torch.cat(parts, 1).float()
    out = pixels.new_empty((batch, 3, size, size))
    grid = triton.cdiv(size, _COLUMNS), triton.cdiv(size, _ROWS), batch
    augment_kernel(
        grid,
        pixels,
        tiles,
        canvases,
        numbers,
        tables,
        flips,
        out,
        size,
        count,
        warps=_WARPS,
        VIEWS=views,
        PERSPECTIVE=perspective,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )
    return out
