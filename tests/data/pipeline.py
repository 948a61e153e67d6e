"""The training pipeline image by image: what plan and `ops.augment` together have to give.

Each augmentation takes an image with its objects and returns both; canvases, warps and colours are OpenCV's.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from yolov9_fast.data.augment import AugmentConfig, LabelledImage
from yolov9_fast.data.dataset import DetectionDataset, SampleKey
from yolov9_fast.data.geometry import Floats, clip, corners_from_normalised, covered_share, resample, transform
from yolov9_fast.data.images import GREY, Image, pad_to

_LARGEST_REACH = 0.8


def training_sample(dataset: DetectionDataset, key: SampleKey) -> LabelledImage:
    """BGR image and objects of a sample, without augmentations from outside."""
    assert dataset.augment is not None
    return _Pipeline(dataset, dataset.augment).sample(key)


class _Pipeline:
    def __init__(self, dataset: DetectionDataset, config: AugmentConfig) -> None:
        self.dataset, self.config = dataset, config

    def sample(self, key: SampleKey) -> LabelledImage:
        augment = self.config
        rng = np.random.default_rng((self.dataset.seed, key.epoch, key.index))
        size = self.dataset.image_size
        if key.mosaic and rng.random() < augment.mosaic:
            labelled = self._mosaic(key.index, augment, rng)
            if rng.random() < augment.mixup:
                labelled = mixup(labelled, self._mosaic(int(rng.integers(len(self.dataset))), augment, rng), rng)
        else:
            plain = self._labelled(key.index)
            canvas, pad = pad_to(plain.image, (size, size))
            moved = plain.boxes + np.array([*pad, *pad], dtype=np.float32)
            labelled = random_affine(LabelledImage(canvas, plain.classes, moved), (size, size), augment, rng)
        image = random_hsv(labelled.image, augment, rng)
        return random_flips(LabelledImage(image, labelled.classes, labelled.boxes), augment, rng)

    def _mosaic(self, index: int, augment: AugmentConfig, rng: Generator) -> LabelledImage:
        members = rng.permutation([index, *rng.integers(len(self.dataset), size=3)])
        canvas = mosaic4([self._labelled(int(member)) for member in members], self.dataset.image_size, rng)
        canvas = copy_paste(canvas, augment.copy_paste, rng)
        return random_affine(canvas, (self.dataset.image_size, self.dataset.image_size), augment, rng)

    def _labelled(self, index: int) -> LabelledImage:
        image = self.dataset._store.get(index)
        height, width = image.shape[:2]
        rows = self.dataset._packed.boxes(index)
        scale = np.array([width, height], dtype=np.float32)
        polygons = [None if polygon is None else polygon * scale for polygon in self.dataset._packed.polygons(index)]
        return LabelledImage(image, rows[:, 0], corners_from_normalised(rows[:, 1:], width, height), polygons)


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


def random_hsv(image: Image, config: AugmentConfig, rng: Generator) -> Image:
    """Scale hue, saturation and value of uint8 BGR by 1 + U(−1, 1) · strength; hue wraps around."""
    strengths = np.array([config.hsv_h, config.hsv_s, config.hsv_v])
    if not strengths.any():
        return image
    gains = 1 + rng.uniform(-1, 1, 3) * strengths
    ramp = np.arange(256, dtype=np.float64)
    tables = np.stack(
        (ramp * gains[0] % 180, np.clip(ramp * gains[1], 0, 255), np.clip(ramp * gains[2], 0, 255)), axis=1
    )
    changed = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_BGR2HSV), tables.astype(np.uint8)[None])
    result: Image = cv2.cvtColor(changed, cv2.COLOR_HSV2BGR)
    return result


def random_flips(labelled: LabelledImage, config: AugmentConfig, rng: Generator) -> LabelledImage:
    """Mirror vertically and horizontally with their probabilities; polygons are dropped."""
    height, width = labelled.size
    image, boxes = labelled.image, labelled.boxes
    if rng.random() < config.flipud:
        image = cv2.flip(image, 0)
        boxes = np.stack((boxes[:, 0], height - boxes[:, 3], boxes[:, 2], height - boxes[:, 1]), axis=1)
    if rng.random() < config.fliplr:
        image = cv2.flip(image, 1)
        boxes = np.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), axis=1)
    return LabelledImage(image, labelled.classes, boxes)


def random_affine(
    labelled: LabelledImage, shape: tuple[int, int], config: AugmentConfig, rng: Generator
) -> LabelledImage:
    """Scale, rotate, shear and translate around the centre, onto a grey canvas of `shape` (height, width).

    Boxes come from the polygons where there are any (a rotated box would be too large) and are clipped to the canvas.
    A box is kept if both sides are longer than 2 px, the ratio of its sides is below 100, and more than 10 % of its
    area is visible (1 % of a polygon's box).
    """
    matrix, scale = _random_matrix(labelled.size, shape, config, rng)
    image = _warp(labelled.image, matrix, shape, perspective=config.perspective > 0)
    if not len(labelled.boxes):
        return LabelledImage(image, labelled.classes, labelled.boxes)
    boxes = _transform_boxes(labelled.boxes, matrix)
    least = np.full(len(boxes), 0.10)
    for index, polygon in enumerate(labelled.polygons):
        if polygon is not None:
            boxes[index] = _polygon_box(transform(resample(polygon), matrix), shape)
            least[index] = 0.01
    boxes = clip(boxes, shape[1], shape[0])
    keep = _still_visible(labelled.boxes * scale, boxes, least)
    return LabelledImage(image, labelled.classes[keep], boxes[keep])


def mixup(first: LabelledImage, second: LabelledImage, rng: Generator) -> LabelledImage:
    """Blend two images of the same size by a share from Beta(32, 32); keep the objects of both (Zhang et al., 2018)."""
    share = float(rng.beta(32.0, 32.0))
    image = cv2.addWeighted(first.image, share, second.image, 1 - share, 0)
    return LabelledImage(
        image, np.concatenate((first.classes, second.classes)), np.concatenate((first.boxes, second.boxes))
    )


def copy_paste(labelled: LabelledImage, share: float, rng: Generator) -> LabelledImage:
    """Paste mirrored copies of round(share · n) objects with a polygon at their mirrored positions.

    A copy is omitted if its box would cover 30 % or more of another box. Changes `labelled.image` in place.
    """
    eligible = [index for index, polygon in enumerate(labelled.polygons) if polygon is not None]
    chosen = rng.permutation(eligible)[: round(share * len(eligible))]
    if not len(chosen):
        return labelled
    width = labelled.size[1]
    boxes, classes, polygons = [*labelled.boxes], [*labelled.classes], list(labelled.polygons)
    # Cut all patches before pasting any, so that no patch contains another.
    patches = []
    for index in chosen:
        x1, y1, x2, y2 = labelled.boxes[index]
        box = np.array([width - x2, y1, width - x1, y2], dtype=np.float32)
        if (covered_share(box, np.stack(boxes)) >= 0.30).any():
            continue
        polygon = labelled.polygons[index]
        assert polygon is not None
        mirrored = polygon * np.array([-1, 1], dtype=np.float32) + np.array([width, 0], dtype=np.float32)
        patches.append(_mirrored_patch(labelled.image, mirrored))
        boxes.append(box)
        classes.append(labelled.classes[index])
        polygons.append(mirrored)
    for left, top, patch, mask in patches:
        region = labelled.image[top : top + patch.shape[0], left : left + patch.shape[1]]
        np.copyto(region, patch, where=mask)
    return LabelledImage(labelled.image, np.asarray(classes, np.float32), np.stack(boxes), polygons)


def _mirrored_patch(image: Image, polygon: Floats) -> tuple[int, int, Image, NDArray[np.bool_]]:
    """(left, top, pixels [h, w, 3], mask [h, w, 1]) of the mirrored image inside `polygon`."""
    height, width = image.shape[:2]
    left, top = (int(value) for value in np.maximum(np.floor(polygon.min(0)), 0))
    right, bottom = (int(value) for value in np.minimum(np.ceil(polygon.max(0)) + 1, (width, height)))
    # Pixel centres have coordinates n + 0.5 in labels and n in fillPoly.
    points = np.round(polygon - (left + 0.5, top + 0.5)).astype(np.int32)
    mask = np.zeros((max(bottom - top, 0), max(right - left, 0)), dtype=np.uint8)
    if mask.size:
        cv2.fillPoly(mask, [points], 1)
    patch = image[top:bottom, width - right : width - left][:, ::-1].copy()
    return left, top, patch, mask[:, :, None].astype(bool)


def _random_matrix(
    size: tuple[int, int], shape: tuple[int, int], config: AugmentConfig, rng: Generator
) -> tuple[NDArray[np.float64], float]:
    centre, perspective, rotation, shear, translation = (np.eye(3) for _ in range(5))
    centre[0, 2], centre[1, 2] = -size[1] / 2, -size[0] / 2
    slope = rng.uniform(-config.perspective, config.perspective, 2)
    # How far a corner comes towards the horizon, where 1 + slope · point is 0; behind it a point appears mirrored.
    reach = float(np.abs(slope) @ (size[1] / 2, size[0] / 2))
    perspective[2, :2] = slope * min(1.0, _LARGEST_REACH / max(reach, 1e-12))
    angle = np.deg2rad(rng.uniform(-config.degrees, config.degrees))
    scale = float(rng.uniform(1 - config.scale, 1 + config.scale))
    rotation[:2, :2] = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    shear[0, 1], shear[1, 0] = np.tan(np.deg2rad(rng.uniform(-config.shear, config.shear, 2)))
    translation[0, 2], translation[1, 2] = rng.uniform(0.5 - config.translate, 0.5 + config.translate, 2) * (
        shape[1],
        shape[0],
    )
    return translation @ shear @ rotation @ perspective @ centre, scale


def _warp(image: Image, matrix: NDArray[np.float64], shape: tuple[int, int], *, perspective: bool) -> Image:
    if image.shape[:2] == shape and np.array_equal(matrix, np.eye(3)):
        return image
    # Pixel centres have coordinates n + 0.5 in labels and n in warpAffine.
    half = np.eye(3)
    half[:2, 2] = 0.5
    matrix = np.linalg.inv(half) @ matrix @ half
    function, matrix = (cv2.warpPerspective, matrix) if perspective else (cv2.warpAffine, matrix[:2])
    result: Image = function(image, matrix, dsize=(shape[1], shape[0]), borderValue=(GREY, GREY, GREY))
    return result


def _transform_boxes(boxes: Floats, matrix: NDArray[np.float64]) -> Floats:
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2)
    points = transform(corners, matrix).reshape(-1, 4, 2)
    return np.concatenate((points.min(1), points.max(1)), axis=1)


def _polygon_box(points: Floats, shape: tuple[int, int]) -> Floats:
    """Box of the points of a polygon inside the canvas; zeros if there are none."""
    inside = points[((points >= 0) & (points <= (shape[1], shape[0]))).all(1)]
    return np.concatenate((inside.min(0), inside.max(0))) if len(inside) else np.zeros(4, np.float32)


def _still_visible(before: Floats, after: Floats, least: NDArray[np.float64]) -> NDArray[np.bool_]:
    size = after[:, 2:] - after[:, :2]
    area_before = (before[:, 2] - before[:, 0]) * (before[:, 3] - before[:, 1])
    area = size[:, 0] * size[:, 1]
    aspect = np.maximum(size[:, 0] / (size[:, 1] + 1e-9), size[:, 1] / (size[:, 0] + 1e-9))
    return (size > 2).all(1) & (area / (area_before + 1e-9) > least) & (aspect < 100)
