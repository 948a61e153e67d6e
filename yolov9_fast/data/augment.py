"""Built-in augmentations of a labelled image; every random number comes from the given generator."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from yolov9_fast._lazy import require
from yolov9_fast.data.geometry import Floats, clip, covered_share, resample, transform
from yolov9_fast.data.images import GREY, Image

# Of a corner of the image towards the horizon of a perspective: there it is enlarged to 1 / (1 - 0.8) = 5 times.
_LARGEST_REACH = 0.8


@dataclass(frozen=True)
class AugmentConfig:
    """Strengths and probabilities of the published recipe.

    `hsv_*`: largest relative change; `degrees`, `shear`: largest angle; `translate`: share of the side; `scale`:
    largest relative change of size; `flipud`, `fliplr`, `mosaic`, `mixup`: probabilities; `copy_paste`: share of
    objects with a polygon.
    """

    hsv_h: float = 0.015
    hsv_s: float = 0.7
    hsv_v: float = 0.4
    degrees: float = 0.0
    translate: float = 0.1
    scale: float = 0.9
    shear: float = 0.0
    perspective: float = 0.0
    flipud: float = 0.0
    fliplr: float = 0.5
    mosaic: float = 1.0
    mixup: float = 0.15
    copy_paste: float = 0.3

    def __post_init__(self) -> None:
        limits = {"degrees": 180.0, "shear": 89.0, "perspective": 0.001}
        for item in fields(self):
            value, limit = getattr(self, item.name), limits.get(item.name, 1.0)
            if not 0 <= value <= limit:
                raise ValueError(f"{item.name}: expected 0..{limit:g}, got {value}")
        if self.scale >= 1:
            raise ValueError(f"scale: expected a factor below 1, got {self.scale}")


@dataclass
class LabelledImage:
    """An image with its objects, in pixels.

    `image`: uint8 [H, W, 3], BGR, but RGB in an `Augmentation`; `classes`: float32 [n]; `boxes`: float32 [n, 4] rows
    x1, y1, x2, y2; `polygons`: per object its polygon, float32 [k, 2], or None; an empty list when no object has one.
    """

    image: Image
    classes: Floats
    boxes: Floats
    polygons: list[Floats | None] = field(default_factory=list)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.image.shape[0], self.image.shape[1]


def random_hsv(image: Image, config: AugmentConfig, rng: Generator) -> Image:
    """Scale hue, saturation and value of uint8 BGR by 1 + U(−1, 1) · strength; hue wraps around."""
    strengths = np.array([config.hsv_h, config.hsv_s, config.hsv_v])
    if not strengths.any():
        return image
    cv2 = require("cv2")
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
        image = require("cv2").flip(image, 0)
        boxes = np.stack((boxes[:, 0], height - boxes[:, 3], boxes[:, 2], height - boxes[:, 1]), axis=1)
    if rng.random() < config.fliplr:
        image = require("cv2").flip(image, 1)
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
    image = require("cv2").addWeighted(first.image, share, second.image, 1 - share, 0)
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
        require("cv2").fillPoly(mask, [points], 1)
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
    cv2 = require("cv2")
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
