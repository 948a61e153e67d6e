"""The plan of a training sample: all that is drawn for it, and its objects, before any image is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from yolov9_fast._lazy import require
from yolov9_fast.data.augment import (
    AugmentConfig,
    Objects,
    copy_paste,
    mixup,
    mosaic,
    random_affine,
    random_flips,
    random_hsv,
)
from yolov9_fast.data.geometry import Floats, scaled_corners
from yolov9_fast.data.images import Image, scaled_size
from yolov9_fast.data.packed import PackedRecords


@dataclass
class View:
    """A canvas with images, and the map from it to the sample.

    `members`: the record of each image; `tiles`: (height, width, left, top) of each, at the size of the network's
    input; `canvas`: (height, width); `matrix`: float64 [3, 3], as in `ops.augment`; `pasted`: polygons float32 [k, 2]
    on the canvas that show what is at their mirrored positions; `images`: uint8 BGR, those of the members where they
    are not the records' own.
    """

    members: list[int]
    tiles: list[tuple[int, int, int, int]]
    canvas: tuple[int, int]
    matrix: NDArray[np.float64]
    pasted: list[Floats]
    images: list[Image] = field(default_factory=list)


@dataclass
class Plan:
    """How a training sample is made.

    `views`: one, or two with mixup, then `share` is that of the first; `tables`: uint8 [3, 256] as in `ops.augment`,
    or None; `flips`: (vertical, horizontal); `objects`: those of the sample; `pad`: (left, top) of a single image on
    its canvas; `rng`: for draws that follow.
    """

    views: list[View]
    share: float
    tables: NDArray[np.uint8] | None
    flips: tuple[bool, bool]
    objects: Objects
    pad: tuple[int, int]
    rng: Generator


class Arrays(NamedTuple):
    """Plans as the arguments of `ops.augment`, with V and T of the largest; `members`: int64 [B, V, T], −1: no image.

    The offsets in `tiles` are 0: whoever has the pixels sets them.
    """

    members: NDArray[np.int64]
    tiles: NDArray[np.int64]
    canvases: NDArray[np.int64]
    matrices: NDArray[np.float64]
    tables: NDArray[np.uint8] | None
    flips: NDArray[np.bool_]
    shares: NDArray[np.float64]


Source = Callable[[int, tuple[int, int]], tuple[Objects, Image]]
"""`source(index, shape)`: the objects of a record's image of that (height, width), and an image in place of it."""


def plan_sample(
    records: PackedRecords,
    index: int,
    size: int,
    config: AugmentConfig,
    rng: Generator,
    *,
    with_mosaic: bool,
    source: Source | None = None,
) -> Plan:
    """Draw the sample of record `index` at `size` pixels; without mosaic there is no mixup or copy-paste either."""
    share, pad = 1.0, (0, 0)
    if with_mosaic and rng.random() < config.mosaic:
        view, objects = _mosaic_view(records, index, size, config, rng, source)
        views = [view]
        if rng.random() < config.mixup:
            view, others = _mosaic_view(records, int(rng.integers(len(records))), size, config, rng, source)
            views.append(view)
            share, objects = mixup(objects, others, rng)
    else:
        view, objects = _single_view(records, index, size, config, rng, source)
        views, pad = [view], view.tiles[0][2:]
    tables = random_hsv(config, rng)
    flips, objects = random_flips(objects, (size, size), config, rng)
    return Plan(views, share, tables, flips, objects, pad, rng)


def _single_view(
    records: PackedRecords, index: int, size: int, config: AugmentConfig, rng: Generator, source: Source | None
) -> tuple[View, Objects]:
    height, width = scaled_size(*records.size(index), size)
    left, top = round((size - width) / 2 - 0.1), round((size - height) / 2 - 0.1)
    [objects], images = _sources(records, [index], [(height, width)], source)
    moved = Objects(objects.classes, objects.boxes + np.array([left, top, left, top], dtype=np.float32))
    matrix, objects = random_affine(moved, (size, size), (size, size), config, rng)
    place = (height, width, left, top)
    back = map_to_canvas(matrix, config.perspective > 0)
    return View([index], [place], (size, size), back, [], images), objects


def _mosaic_view(
    records: PackedRecords, index: int, size: int, config: AugmentConfig, rng: Generator, source: Source | None
) -> tuple[View, Objects]:
    members = rng.permutation([index, *rng.integers(len(records), size=3)]).tolist()
    sizes = [scaled_size(*records.size(member), size) for member in members]
    parts, images = _sources(records, members, sizes, source)
    places, objects = mosaic(parts, sizes, size, rng)
    pasted, objects = copy_paste(objects, 2 * size, config.copy_paste, rng)
    matrix, objects = random_affine(objects, (2 * size, 2 * size), (size, size), config, rng)
    tiles = [(*shape, *place) for shape, place in zip(sizes, places, strict=True)]
    back = map_to_canvas(matrix, config.perspective > 0)
    return View(members, tiles, (2 * size, 2 * size), back, pasted, images), objects


def _sources(
    records: PackedRecords, members: Sequence[int], shapes: Sequence[tuple[int, int]], source: Source | None
) -> tuple[list[Objects], list[Image]]:
    """The objects of these records' images of (height, width) `shapes`, and the images that replace them, if any."""
    if source is None:
        return record_objects(records, members, shapes), []
    parts = [source(member, shape) for member, shape in zip(members, shapes, strict=True)]
    return [objects for objects, _ in parts], [image for _, image in parts]


def record_objects(records: PackedRecords, members: Sequence[int], shapes: Sequence[tuple[int, int]]) -> list[Objects]:
    """The objects of each of these records, on its image of (height, width) `shapes`; computed together."""
    parts = [records.boxes(member) for member in members]
    rows, scales = np.concatenate(parts), np.array(shapes, dtype=np.float32)[:, ::-1]
    boxes = scaled_corners(rows[:, 1:], scales.repeat([len(part) for part in parts], axis=0))
    found, end = [], 0
    for member, part, scale in zip(members, parts, scales, strict=True):
        start, end = end, end + len(part)
        polygons = [None if polygon is None else polygon * scale for polygon in records.polygons(member)]
        found.append(Objects(part[:, 0], boxes[start:end], polygons))
    return found


# Pixel centres have coordinates n + 0.5 in labels and n in OpenCV.
_TO_LABELS = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
_TO_INDICES = np.array([[1.0, 0.0, -0.5], [0.0, 1.0, -0.5], [0.0, 0.0, 1.0]])


def map_to_canvas(matrix: NDArray[np.float64], perspective: bool) -> NDArray[np.float64]:
    """From indices of a pixel of the sample to those of the canvas: the inverse, rounded as in OpenCV's warpAffine."""
    matrix = _TO_INDICES @ matrix @ _TO_LABELS
    if perspective:
        return np.linalg.inv(matrix).astype(np.float64, copy=False)
    (a, b, x), (c, d, y), _ = matrix.tolist()
    determinant = a * d - b * c
    factor = 1 / determinant if determinant else 0.0
    a, b, c, d = d * factor, -b * factor, -c * factor, a * factor
    return np.array([[a, b, -a * x - b * y], [c, d, -c * x - d * y], [0.0, 0.0, 1.0]])


def stack(plans: Sequence[Plan], views: int = 1, tiles: int = 1) -> Arrays:
    """Plans of one configuration as arrays; V and T are at least `views` and `tiles`."""
    batch, count = len(plans), max(views, *(len(plan.views) for plan in plans))
    most = max(tiles, *(len(view.tiles) for plan in plans for view in plan.views))
    members = np.full((batch, count, most), -1)
    placed = np.zeros((batch, count, most, 5), dtype=np.int64)
    canvases = np.zeros((batch, count, 2), dtype=np.int64)
    matrices = np.zeros((batch, count, 3, 3))
    for number, plan in enumerate(plans):
        for which, view in enumerate(plan.views):
            members[number, which, : len(view.members)] = view.members
            placed[number, which, : len(view.tiles), 1:] = view.tiles
            canvases[number, which] = view.canvas
            matrices[number, which] = view.matrix
    tables = [plan.tables for plan in plans if plan.tables is not None]
    flips, shares = np.array([plan.flips for plan in plans]), np.array([plan.share for plan in plans])
    return Arrays(members, placed, canvases, matrices, np.array(tables) if tables else None, flips, shares)


def hide_unseen(arrays: Arrays, size: int) -> None:
    """Remove the tiles of which no pixel of a sample of `size` pixels is made: their images need not be read."""
    last = size - 1
    corners = ((0, 0), (last, 0), (0, last), (last, last))
    # Of numbers as few as those of one sample Python is faster than NumPy.
    views = arrays.tiles.reshape(-1, *arrays.tiles.shape[2:])
    for matrix, tiles in zip(arrays.matrices.reshape(-1, 9).tolist(), views, strict=True):
        a, b, c, d, e, f, g, h, i = matrix
        depths = [g * x + h * y + i for x, y in corners]
        if min(depths) <= 0:  # Beyond a horizon the corners are no bounds.
            continue
        xs = [(a * x + b * y + c) / depth for (x, y), depth in zip(corners, depths, strict=True)]
        ys = [(d * x + e * y + f) / depth for (x, y), depth in zip(corners, depths, strict=True)]
        # Bilinear weights reach one pixel further, and coordinates are rounded.
        x1, y1, x2, y2 = min(xs) - 2, min(ys) - 2, max(xs) + 2, max(ys) + 2
        for number, (_, height, width, left, top) in enumerate(tiles.tolist()):
            if left > x2 or top > y2 or left + width < x1 or top + height < y1:
                tiles[number] = 0


def paste(canvas: Image, polygons: Sequence[Floats]) -> None:
    """Copy what is at the mirrored position into each polygon of a canvas uint8 [H, W, 3]."""
    # Cut all patches before pasting any, so that no patch contains another.
    for left, top, patch, mask in [_mirrored_patch(canvas, polygon) for polygon in polygons]:
        np.copyto(canvas[top : top + patch.shape[0], left : left + patch.shape[1]], patch, where=mask)


def _mirrored_patch(image: Image, polygon: Floats) -> tuple[int, int, Image, NDArray[np.bool_]]:
    """(left, top, pixels [h, w, 3], mask [h, w, 1]) of the mirrored image inside `polygon`."""
    height, width = image.shape[:2]
    left, top = (int(value) for value in np.maximum(np.floor(polygon.min(0)), 0))
    right, bottom = (int(value) for value in np.minimum(np.ceil(polygon.max(0)) + 1, (width, height)))
    # Pixel centres have coordinates n + 0.5 in labels and n in fillPoly.
    points = np.round(polygon - (left + 0.5, top + 0.5)).astype(np.int32)
    mask = np.zeros((max(bottom - top, 0), max(right - left, 0)), dtype=np.uint8)
    if mask.size:
        require("cv2").fillPoly(mask, [points], 1)
    patch = image[top:bottom, width - right : width - left][:, ::-1].copy()
    return left, top, patch, mask[:, :, None].astype(bool)
