"""Mosaic: four images around a random point of a canvas of twice the image size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from yolov9_fast.data.augment import LabelledImage
from yolov9_fast.data.geometry import Floats, clip
from yolov9_fast.data.images import GREY


def mosaic4(tiles: Sequence[LabelledImage], size: int, rng: Generator) -> LabelledImage:
    """Canvas [2 · size, 2 · size, 3] of four images: upper left, upper right, lower left, lower right of a point
    drawn uniformly from its middle half. Boxes and polygons move with their image and are clipped to the canvas.
    """
    side = 2 * size
    centre_y, centre_x = (int(value) for value in rng.uniform(size / 2, 3 * size / 2, 2))
    canvas = np.full((side, side, 3), GREY, dtype=np.uint8)
    boxes, polygons = [], []
    with_polygons = any(tile.polygons for tile in tiles)
    for position, tile in enumerate(tiles):
        height, width = tile.size
        left = centre_x if position % 2 else centre_x - width
        top = centre_y if position // 2 else centre_y - height
        x1, y1 = max(left, 0), max(top, 0)
        x2, y2 = min(left + width, side), min(top + height, side)
        canvas[y1:y2, x1:x2] = tile.image[y1 - top : y2 - top, x1 - left : x2 - left]
        offset = np.array([left, top], dtype=np.float32)
        boxes.append(clip(tile.boxes + np.tile(offset, 2), side, side))
        if with_polygons:
            polygons += _shift(tile, offset, side)
    classes = np.concatenate([tile.classes for tile in tiles])
    return LabelledImage(canvas, classes, np.concatenate(boxes), polygons)


def _shift(tile: LabelledImage, offset: Floats, side: int) -> list[Floats | None]:
    polygons = tile.polygons or [None] * len(tile.boxes)
    return [None if polygon is None else np.clip(polygon + offset, 0, side) for polygon in polygons]
