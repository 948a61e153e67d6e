"""Augmentations from outside the package: they change source images, or the finished training image, with objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import Generator

from yolov9_fast._lazy import import_callable
from yolov9_fast._untrusted import shown
from yolov9_fast.data.augment import LabelledImage
from yolov9_fast.errors import DataError, UserError

Augmentation = Callable[[LabelledImage, Generator], LabelledImage]
"""`augmentation(labelled, rng)`: gets and returns uint8 RGB [H, W, 3] of one size with its objects.

It may change what it is given in place. Its random draws must come from `rng`, which depends on the seed, the epoch and
the index of the sample alone.
"""


def resolve_augmentations(
    augmentations: Sequence[Augmentation | str], option: str = "augmentations"
) -> tuple[Augmentation, ...]:
    """The functions; those given by import path `module:function` are imported.

    Raises:
        UserError: a path that leads nowhere.
    """
    if isinstance(augmentations, str):
        augmentations = [augmentations]
    try:
        return tuple(import_callable(each) if isinstance(each, str) else each for each in augmentations)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from error


def apply_augmentations(
    augmentations: Sequence[Augmentation], labelled: LabelledImage, rng: Generator
) -> LabelledImage:
    """Call each function on an RGB image with its objects, and check what it returns.

    Raises:
        DataError: one line that names the function and what is wrong with its result.
    """
    shape = labelled.image.shape
    for augmentation in augmentations:
        result = augmentation(labelled, rng)
        problem = _problem(result, shape)
        if problem:
            name = getattr(augmentation, "__name__", type(augmentation).__name__)
            raise DataError(f"augmentation {name}: {problem}")
        labelled = result
    classes, boxes = labelled.classes.astype(np.float32), labelled.boxes.astype(np.float32)
    return LabelledImage(labelled.image, classes, boxes, labelled.polygons)


def _problem(result: object, shape: tuple[int, ...]) -> str | None:
    if not isinstance(result, LabelledImage):
        return f"expected a LabelledImage, got {type(result).__name__}"
    image, boxes, classes = result.image, result.boxes, result.classes
    if _kind(image) != f"uint8 {list(shape)}":
        return f"image: expected uint8 {list(shape)}, got {_kind(image)}"
    count = len(boxes) if isinstance(boxes, np.ndarray) and boxes.ndim else 0
    for name, values, expected in (("boxes", boxes, (count, 4)), ("classes", classes, (count,))):
        if not isinstance(values, np.ndarray) or values.shape != expected or values.dtype.kind not in "iuf":
            return f"{name}: expected float32 {list(expected)}, got {_kind(values)}"
    if not np.isfinite(boxes).all():
        return "boxes: expected finite numbers, got NaN or infinity"
    height, width = result.size
    bad = ~((boxes[:, :2] >= 0) & (boxes[:, :2] < boxes[:, 2:]) & (boxes[:, 2:] <= (width, height))).all(1)
    if bad.any():
        return f"boxes: expected 0 <= x1 < x2 <= {width} and 0 <= y1 < y2 <= {height}, got {boxes[bad][0].tolist()}"
    polygons = result.polygons
    if not isinstance(polygons, list) or len(polygons) not in (0, count) or not all(map(_is_polygon, polygons)):
        return f"polygons: expected an empty list, or of {count} float32 [k, 2] or None, got {shown(polygons)}"
    bad = ~((classes >= 0) & (classes == np.floor(classes)))
    return f"classes: expected whole numbers from 0, got {classes[bad][0]}" if bad.any() else None


def _is_polygon(points: object) -> bool:
    if points is None:
        return True
    return isinstance(points, np.ndarray) and points.shape[1:] == (2,) and points.dtype.kind == "f"


def _kind(values: object) -> str:
    return f"{values.dtype} {list(values.shape)}" if isinstance(values, np.ndarray) else type(values).__name__
