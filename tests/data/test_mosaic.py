"""Mosaic: four images around one point, and their boxes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.drawing import box_of_colour, paint
from yolov9_fast.data.augment import LabelledImage, Objects, mosaic
from yolov9_fast.ops._augment import canvas_of


def tile(height: int, width: int, *objects: tuple[int, int, int, int, int], polygons: bool = False) -> LabelledImage:
    boxes = np.array([item[1:] for item in objects], np.float32).reshape(-1, 4)
    corners = [np.array([[a, b], [c, b], [c, d], [a, d]], np.float32) for a, b, c, d in boxes]
    classes = np.array([item[0] for item in objects], np.float32)
    return LabelledImage(paint(height, width, list(objects)), classes, boxes, list(corners) if polygons else [])


def mosaic4(tiles: list[LabelledImage], size: int, rng: np.random.Generator) -> LabelledImage:
    parts = [Objects(tile.classes, tile.boxes, tile.polygons) for tile in tiles]
    places, objects = mosaic(parts, [tile.size for tile in tiles], size, rng)
    canvas = canvas_of(zip((tile.image for tile in tiles), places, strict=True), (2 * size, 2 * size))
    return LabelledImage(canvas, objects.classes, objects.boxes, objects.polygons)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("position", range(4))
def test_boxes_follow_their_tile(seed: int, position: int) -> None:
    tiles = [tile(64, 48) for _ in range(4)]
    tiles[position] = tile(40, 64, (0, 5, 10, 50, 35), polygons=True)
    result = mosaic4(tiles, 64, np.random.default_rng(seed))
    assert result.image.shape == (128, 128, 3)
    seen = box_of_colour(result.image, 0)
    visible = result.boxes[(result.boxes[:, 2:] > result.boxes[:, :2]).all(1)]
    if seen is None:
        assert len(visible) == 0
    else:
        np.testing.assert_array_equal(visible, [seen])
        assert result.polygons[0] is not None
        assert (*result.polygons[0].min(0), *result.polygons[0].max(0)) == seen


def test_centre_is_in_the_middle_half_and_the_background_is_grey() -> None:
    black = tile(64, 64)
    for seed in range(50):
        canvas = mosaic4([black] * 4, 64, np.random.default_rng(seed)).image
        covered = np.argwhere((canvas == 0).all(-1))
        low, high = covered.min(0), covered.max(0) + 1
        # Tiles of full size meet at the centre and reach 64 px from it, as far as the canvas goes.
        assert (low <= 32).all()
        assert (high >= 96).all()
        assert set(np.unique(canvas)) <= {0, 114}


def test_images_with_and_without_polygons_share_a_mosaic() -> None:
    tiles = [
        tile(32, 32, (0, 4, 4, 20, 20)),
        tile(32, 32, (1, 4, 4, 20, 20), polygons=True),
        tile(32, 32),
        tile(32, 32),
    ]
    result = mosaic4(tiles, 32, np.random.default_rng(0))
    assert result.polygons[0] is None
    assert result.polygons[1] is not None
    assert len(result.polygons) == 2
