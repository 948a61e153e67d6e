"""The pixels of augmented training images: mosaic, affine or perspective map, mixup, colours, flips."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yolov9_fast._lazy import require
from yolov9_fast.ops._checks import check_like, check_one_device, described
from yolov9_fast.ops._operator import Compiled, Kernel, Operator, Python
from yolov9_fast.ops._supports import not_for_compiled, not_for_triton

GREY = 114
LARGEST_SIDE = 32_766
"""Of a canvas and of the result, in pixels: OpenCV takes no larger ones."""
_LARGEST_PLACE = 2**30
_COLUMNS = 32
"""OpenCV's vector code makes whole groups of this many columns; it rounds the rest of a row otherwise, which is not
part of the definition."""
_LEAST_SIDE = 3
"""OpenCV reads beyond images of fewer rows."""


def augment(
    pixels: Tensor,
    tiles: Tensor,
    canvases: Tensor,
    matrices: Tensor,
    tables: Tensor | None,
    flips: Tensor,
    shares: Tensor,
    size: int,
    perspective: bool = False,
) -> Tensor:
    """Augmented images, uint8 [B, 3, size, size] RGB, from one or two views each; no canvas is made.

    A view is a grey canvas (level 114) with T images on it, seen through a matrix: each pixel of the result is
    interpolated bilinearly between four pixels of the canvas, across the seams of its tiles too; outside the canvas it
    is grey. The second view, where there is one, is blended in; then colours change, then the image is flipped. OpenCV
    defines every step (warpAffine or warpPerspective, addWeighted, cvtColor, LUT). No gradient.

    Args:
        pixels: uint8 [n]; images BGR [h, w, 3], each dense at an offset of its own.
        tiles: int64 [B, V, T, 5]; V 1 or 2; rows (offset in `pixels`, height, width, left, top): an image with its
            upper left pixel at (left, top) of the canvas, which cuts it. Height 0: none. Those of one view must not
            overlap.
        canvases: int64 [B, V, 2]; (height, width) in pixels. (0, 0): the sample has no second view.
        matrices: float64 [B, V, 3, 3]; from indices of a pixel of the result (x, y, 1) to those of a pixel of the
            canvas.
        tables: uint8 [B, 3, 256]; new hue, saturation and value by the old one, in OpenCV's units of 8 bits (hue
            0..179); None: colours do not change.
        flips: bool [B, 2]; vertical, horizontal.
        shares: float64 [B]; share of the first view where there is a second one.
        size: side of the result in pixels.
        perspective: whether the last row of a matrix may be other than (0, 0, 1).

    Raises:
        TypeError: a tensor of another dtype, size or perspective of another type.
        ValueError: another shape, tensors on different devices, size out of range; on a CPU also a tile outside
            `pixels`, a canvas without pixels or too large, and a matrix that is not finite.
    """
    _check(pixels, tiles, canvases, matrices, tables, flips, shares, size)
    if not isinstance(perspective, bool):
        raise TypeError(f"perspective: expected a bool, got {described(perspective)}")
    tensors = [each.contiguous() for each in (pixels, tiles, canvases, matrices)]
    tables = None if tables is None else tables.contiguous()
    result: Tensor = OPERATOR(*tensors, tables, flips.contiguous(), shares.contiguous(), size, perspective)
    return result


def _check(
    pixels: Tensor,
    tiles: Tensor,
    canvases: Tensor,
    matrices: Tensor,
    tables: Tensor | None,
    flips: Tensor,
    shares: Tensor,
    size: int,
) -> None:
    named = {"pixels": pixels, "tiles": tiles, "canvases": canvases, "matrices": matrices, "flips": flips}
    named |= {"shares": shares} if tables is None else {"shares": shares, "tables": tables}
    for name, tensor in named.items():
        dtype = _DTYPES[name]
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
            raise TypeError(f"{name}: expected a tensor of {str(dtype)[6:]}, got {described(tensor)}")
    if pixels.ndim != 1:
        raise ValueError(f"pixels: expected [n], got {list(pixels.shape)}")
    if tiles.ndim != 4 or tiles.shape[1] not in (1, 2) or tiles.shape[2] < 1 or tiles.shape[3] != 5:
        raise ValueError(f"tiles: expected [B, 1 or 2, T, 5] with T of at least 1, got {list(tiles.shape)}")
    check_one_device(**named)
    batch, views = tiles.shape[:2]
    shapes = {"canvases": (batch, views, 2), "matrices": (batch, views, 3, 3), "flips": (batch, 2), "shares": (batch,)}
    for name, shape in {**shapes, "tables": (batch, 3, 256)}.items():
        if name in named:
            check_like(name, named[name], shape, pixels.device)
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"size: expected an int, got {described(size)}")
    if not 1 <= size <= LARGEST_SIDE:
        raise ValueError(f"size: expected 1..{LARGEST_SIDE}, got {size}")
    if pixels.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(pixels.shape[0], *(each.detach().numpy() for each in (tiles, canvases, matrices)))


_DTYPES = {
    **{"pixels": torch.uint8, "tiles": torch.int64, "canvases": torch.int64, "matrices": torch.float64},
    **{"flips": torch.bool, "shares": torch.float64, "tables": torch.uint8},
}


def _check_values(count: int, tiles: NDArray[Any], canvases: NDArray[Any], matrices: NDArray[Any]) -> None:
    sides, places = tiles[..., 1:3], tiles[..., 3:]
    if tiles.size and (sides.min() < 0 or sides.max() > LARGEST_SIDE):
        wrong = sides[(sides < 0) | (sides > LARGEST_SIDE)]
        raise ValueError(f"tiles: expected heights and widths of 0..{LARGEST_SIDE}, got {wrong[0]}")
    if tiles.size and (places.min() < -_LARGEST_PLACE or places.max() > _LARGEST_PLACE):
        raise ValueError(f"tiles: expected places within 2^30 pixels, got {np.abs(places).max()}")
    start, length = tiles[..., 0], sides[..., 0] * sides[..., 1] * 3
    outside = (length > 0) & ((start < 0) | (start > count - length))
    if outside.any():
        found = f"{length[outside][0]} at {start[outside][0]}"
        raise ValueError(f"tiles: expected images inside the {count} bytes of pixels, got {found}")
    height, width = canvases[..., 0], canvases[..., 1]
    wrong = (height < 1) | (width < 1) | (height > LARGEST_SIDE) | (width > LARGEST_SIDE)
    wrong[:, 1:] &= (height[:, 1:] != 0) | (width[:, 1:] != 0)
    if wrong.any():
        raise ValueError(f"canvases: expected sides of 1..{LARGEST_SIDE}, got {height[wrong][0]}x{width[wrong][0]}")
    if not np.isfinite(matrices).all():
        raise ValueError("matrices: expected finite numbers, got NaN or infinity")


def augment_reference(
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
    """`augment` on OpenCV and NumPy, one image after the other, on the host."""
    cv2 = require("cv2")
    source, placed, sides, maps, mirrored, parts = (
        each.cpu().numpy() for each in (pixels, tiles, canvases, matrices, flips, shares)
    )
    colours = None if tables is None else tables.cpu().numpy()
    result = torch.empty((len(placed), 3, size, size), dtype=torch.uint8)
    made = result.numpy()
    for sample in range(len(placed)):
        views = [
            _warped(_canvas(source, *view), matrix, size, perspective)
            for *view, matrix in zip(placed[sample], sides[sample], maps[sample], strict=True)
            if view[1].any()
        ]
        image = views[0]
        if len(views) == 2:
            share = float(parts[sample])
            image = cv2.addWeighted(views[0], share, views[1], 1 - share, 0)
        if colours is not None:
            changed = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_BGR2HSV), np.ascontiguousarray(colours[sample].T)[None])
            image = cv2.cvtColor(changed, cv2.COLOR_HSV2BGR)
        vertical, horizontal = mirrored[sample]
        image = image[:: -1 if vertical else 1, :size][:, :: -1 if horizontal else 1]
        made[sample] = image[:, :, ::-1].transpose(2, 0, 1)
    return result.to(pixels.device)


def _canvas(pixels: NDArray[np.uint8], tiles: NDArray[np.int64], sides: NDArray[np.int64]) -> NDArray[np.uint8]:
    images = (
        (pixels[start : start + height * width * 3].reshape(height, width, 3), (left, top))
        for start, height, width, left, top in tiles.tolist()
        if height * width
    )
    height, width = sides.tolist()
    return canvas_of(images, (height, width))


def canvas_of(images: Iterable[tuple[NDArray[np.uint8], tuple[int, int]]], sides: tuple[int, int]) -> NDArray[np.uint8]:
    """Grey canvas uint8 [*sides, 3] of images [h, w, 3] at places (left, top), cut by the canvas."""
    height, width = sides
    canvas = np.full((height, width, 3), GREY, dtype=np.uint8)
    for image, (left, top) in images:
        rows, columns = image.shape[:2]
        x1, y1 = max(left, 0), max(top, 0)
        x2, y2 = min(left + columns, width), min(top + rows, height)
        if x1 < x2 and y1 < y2:
            canvas[y1:y2, x1:x2] = image[y1 - top : y2 - top, x1 - left : x2 - left]
    return canvas


def _warped(canvas: NDArray[np.uint8], matrix: NDArray[np.float64], size: int, perspective: bool) -> NDArray[np.uint8]:
    cv2 = require("cv2")
    function, matrix = (cv2.warpPerspective, matrix) if perspective else (cv2.warpAffine, matrix[:2])
    if min(canvas.shape[:2]) < _LEAST_SIDE:
        canvas = np.pad(canvas, ((0, _LEAST_SIDE), (0, _LEAST_SIDE), (0, 0)), constant_values=GREY)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    width = -(-size // _COLUMNS) * _COLUMNS
    result: NDArray[np.uint8] = function(canvas, matrix, dsize=(width, size), flags=flags, borderValue=[GREY] * 3)
    return result


# ---- kernels


def _fake(pixels: Tensor, tiles: Tensor, *rest: Any) -> Tensor:
    size = rest[-2]
    return pixels.new_empty((tiles.shape[0], 3, size, size))


class _Kernels(NamedTuple):
    forward: Callable[..., Any]


KERNELS = _Kernels(
    Kernel(
        "augment(Tensor pixels, Tensor tiles, Tensor canvases, Tensor matrices, Tensor? tables, Tensor flips, "
        "Tensor shares, int size, bool perspective) -> Tensor",
        augment_reference,
        _fake,
    )
)


# ---- backends


def _supports(device: str, pixels: Tensor, *rest: Any) -> str | None:
    return not_for_compiled(device, pixels)


def _supports_triton(pixels: Tensor, *rest: Any) -> str | None:
    return not_for_triton("augment", pixels)


def _triton() -> _Kernels:
    from yolov9_fast.kernels.augment import augment

    return _Kernels(augment)


OPERATOR = Operator(
    "augment",
    "augmented training images from their sources",
    reference=augment_reference,
    kernels=KERNELS,
    backends={"cpu": Compiled(functools.partial(_supports, "cpu")), "triton": Python(_triton, _supports_triton)},
)
