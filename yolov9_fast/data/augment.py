"""Built-in augmentations: what they draw, and the objects they leave; `plan.py` puts them together.

Every random number comes from the given generator, and none depends on a pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from yolov9_fast.data.geometry import Floats, clip, covered_share, resample, transform
from yolov9_fast.data.images import Image

# Of a corner of the image towards the horizon of a perspective: there it is enlarged to 1 / (1 - 0.8) = 5 times.
_LARGEST_REACH = 0.8
_LEVELS = np.arange(256, dtype=np.float64)


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


@dataclass
class Objects:
    """Objects of an image, in pixels: `classes`, `boxes` and `polygons` as in `LabelledImage`."""

    classes: Floats
    boxes: Floats
    polygons: list[Floats | None] = field(default_factory=list)


def random_hsv(config: AugmentConfig, rng: Generator) -> NDArray[np.uint8] | None:
    """New hue, saturation and value by the old one, scaled by 1 + U(−1, 1) · strength; hue wraps around.

    uint8 [3, 256], or None without strength: colours do not change.
    """
    strengths = (config.hsv_h, config.hsv_s, config.hsv_v)
    if not any(strengths):
        return None
    gains = 1 + rng.uniform(-1, 1, 3) * strengths
    tables = _LEVELS * gains[:, None]
    np.fmod(tables[0], 180, out=tables[0])
    np.minimum(tables, 255, out=tables)
    result: NDArray[np.uint8] = tables.astype(np.uint8)
    return result


def random_flips(
    objects: Objects, shape: tuple[int, int], config: AugmentConfig, rng: Generator
) -> tuple[tuple[bool, bool], Objects]:
    """Whether an image of `shape` (height, width) is mirrored (vertically, horizontally); polygons are dropped."""
    (height, width), boxes = shape, objects.boxes
    vertical = rng.random() < config.flipud
    if vertical:
        boxes = boxes[:, [0, 3, 2, 1]]
        boxes[:, 1::2] = height - boxes[:, 1::2]
    horizontal = rng.random() < config.fliplr
    if horizontal:
        boxes = boxes[:, [2, 1, 0, 3]]
        boxes[:, ::2] = width - boxes[:, ::2]
    return (vertical, horizontal), Objects(objects.classes, boxes)


def random_affine(
    objects: Objects, size: tuple[int, int], shape: tuple[int, int], config: AugmentConfig, rng: Generator
) -> tuple[NDArray[np.float64], Objects]:
    """Scale, rotate, shear and translate a canvas of `size` around its centre, onto an image of `shape`.

    Both are (height, width). Returns the matrix [3, 3] from canvas to image, with centres of pixels at n + 0.5. Boxes
    come from the polygons where there are any (a rotated box would be too large) and are clipped to the image. A box is
    kept if both sides are longer than 2 px, the ratio of its sides is below 100, and more than 10 % of its area is
    visible (1 % of a polygon's box).
    """
    matrix, scale = _random_matrix(size, shape, config, rng)
    if not len(objects.boxes):
        return matrix, Objects(objects.classes, objects.boxes)
    boxes = _transform_boxes(objects.boxes, matrix)
    least = np.full(len(boxes), 0.10)
    for index, polygon in enumerate(objects.polygons):
        if polygon is not None:
            boxes[index] = _polygon_box(transform(resample(polygon), matrix), shape)
            least[index] = 0.01
    boxes = clip(boxes, shape[1], shape[0])
    keep = _still_visible(objects.boxes * scale, boxes, least)
    return matrix, Objects(objects.classes[keep], boxes[keep])


def mosaic(
    parts: Sequence[Objects], sizes: Sequence[tuple[int, int]], size: int, rng: Generator
) -> tuple[list[tuple[int, int]], Objects]:
    """Four images of `sizes` (height, width) around a point of a canvas [2 · size, 2 · size]: upper left, upper right,
    lower left, lower right of a point drawn uniformly from its middle half.

    Returns where they are, (left, top), and their objects, moved and clipped to the canvas.
    """
    side = 2 * size
    centre_y, centre_x = (int(value) for value in rng.uniform(size / 2, 3 * size / 2, 2))
    places = [
        (centre_x if position % 2 else centre_x - width, centre_y if position // 2 else centre_y - height)
        for position, (height, width) in enumerate(sizes)
    ]
    boxes = np.concatenate([part.boxes for part in parts])
    offsets = np.array([(*place, *place) for place in places], dtype=np.float32)
    boxes += offsets.repeat([len(part.boxes) for part in parts], axis=0)
    polygons = []
    if any(part.polygons for part in parts):
        for part, place in zip(parts, places, strict=True):
            polygons += _shift(part, np.array(place, dtype=np.float32), side)
    return places, Objects(np.concatenate([part.classes for part in parts]), clip(boxes, side, side), polygons)


def mixup(first: Objects, second: Objects, rng: Generator) -> tuple[float, Objects]:
    """The share of the first of two images from Beta(32, 32), and the objects of both (Zhang et al., 2018)."""
    share = float(rng.beta(32.0, 32.0))
    classes, boxes = np.concatenate((first.classes, second.classes)), np.concatenate((first.boxes, second.boxes))
    return share, Objects(classes, boxes)


def copy_paste(objects: Objects, width: int, share: float, rng: Generator) -> tuple[list[Floats], Objects]:
    """Choose round(share · n) objects with a polygon, whose mirrored copies appear at their mirrored positions.

    A copy is omitted if its box would cover 30 % or more of another box. Returns the polygons of the copies, on a
    canvas of this width, and all objects.
    """
    eligible = [index for index, polygon in enumerate(objects.polygons) if polygon is not None]
    chosen = rng.permutation(eligible)[: round(share * len(eligible))]
    if not len(chosen):
        return [], objects
    boxes, classes, polygons = [*objects.boxes], [*objects.classes], list(objects.polygons)
    pasted = []
    for index in chosen:
        x1, y1, x2, y2 = objects.boxes[index]
        box = np.array([width - x2, y1, width - x1, y2], dtype=np.float32)
        if (covered_share(box, np.stack(boxes)) >= 0.30).any():
            continue
        polygon = objects.polygons[index]
        assert polygon is not None
        mirrored = polygon * np.array([-1, 1], dtype=np.float32) + np.array([width, 0], dtype=np.float32)
        pasted.append(mirrored)
        boxes.append(box)
        classes.append(objects.classes[index])
        polygons.append(mirrored)
    return pasted, Objects(np.asarray(classes, np.float32), np.stack(boxes), polygons)


def _shift(part: Objects, offset: Floats, side: int) -> list[Floats | None]:
    polygons = part.polygons or [None] * len(part.boxes)
    return [None if polygon is None else np.clip(polygon + offset, 0, side) for polygon in polygons]


def _random_matrix(
    size: tuple[int, int], shape: tuple[int, int], config: AugmentConfig, rng: Generator
) -> tuple[NDArray[np.float64], float]:
    slope = rng.uniform(-config.perspective, config.perspective, 2)
    # How far a corner comes towards the horizon, where 1 + slope · point is 0; behind it a point appears mirrored.
    reach = float(np.abs(slope) @ (size[1] / 2, size[0] / 2))
    to_horizon = slope * min(1.0, _LARGEST_REACH / max(reach, 1e-12))
    angle = np.deg2rad(rng.uniform(-config.degrees, config.degrees))
    scale = float(rng.uniform(1 - config.scale, 1 + config.scale))
    shear_x, shear_y = np.tan(np.deg2rad(rng.uniform(-config.shear, config.shear, 2)))
    x, y = rng.uniform(0.5 - config.translate, 0.5 + config.translate, 2) * (shape[1], shape[0])
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    # The product from left to right, without those that are 1.
    matrix = np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])
    if config.shear:
        matrix = matrix @ np.array([[1, shear_x, 0], [shear_y, 1, 0], [0, 0, 1]])
    matrix = matrix @ np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]])
    if config.perspective:
        matrix = matrix @ np.array([[1, 0, 0], [0, 1, 0], [*to_horizon, 1]])
    return matrix @ np.array([[1, 0, -size[1] / 2], [0, 1, -size[0] / 2], [0, 0, 1]]), scale


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
