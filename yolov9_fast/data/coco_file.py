"""A COCO JSON read once into checked values: images, objects in pixels, categories, and what was skipped."""

from __future__ import annotations

import os
import posixpath
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from yolov9_fast._collection import collection_paused
from yolov9_fast._numbers import finite_number, flag, integer
from yolov9_fast._untrusted import read_json, shown
from yolov9_fast.data.geometry import Floats, join_polygons
from yolov9_fast.errors import DataError
from yolov9_fast.limits import above_limit, limit

LARGEST_COORDINATE = 1e9
"""Of boxes and outlines, in pixels."""
LARGEST_AREA = 1e10
"""pycocotools leaves larger objects out of every metric."""
Size = tuple[int, int] | None


class CocoImage(NamedTuple):
    """An entry of `images`: `size` is (width, height) in pixels, None where the file states none."""

    id: int
    file_name: str
    size: Size


class CocoObject(NamedTuple):
    """An entry of `annotations`: `box` x, y, w, h and `outline` [k, 2] in pixels; `crowd`: iscrowd or ignore is set."""

    id: int | None
    image_id: int
    category_id: int
    box: tuple[float, float, float, float]
    area: float
    crowd: bool
    outline: Floats | None

    @property
    def place(self) -> str:
        """Which annotation it is, for a report."""
        return f"annotation {self.id} of image {self.image_id}"


@dataclass
class CocoFile:
    """What a COCO JSON holds: `objects` by image id, `categories` id → name; `skipped` (place, reason); `notes`."""

    file: Path
    images: list[CocoImage] = field(default_factory=list)
    objects: dict[int, list[CocoObject]] = field(default_factory=dict)
    categories: dict[int, str] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class _Unusable(Exception):
    """The reason why an entry is skipped."""


@collection_paused()
def read_coco(file: Path) -> CocoFile:
    """Read a COCO JSON and check every number in it.

    Numeric strings and integral floats count as numbers; true and false do not, except as `iscrowd` and `ignore`. An
    image without a usable id or file name, and an annotation with an unusable number, are skipped with a reason. An
    unusable outline, or one above `limit("OUTLINE_POINTS")`, is left out, and the box is used. An image file that is
    listed again under another id gets the objects of both under its first id.

    Raises:
        DataError: not a COCO JSON, an unusable category, an id that stands twice.
    """
    content = read_json(file, "annotation file")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{file}: expected a COCO annotation file with a list '{key}'")
    coco = CocoFile(file, categories=_categories(content["categories"], file))
    images = _images(content["images"], coco)
    _read_objects(content["annotations"], coco)
    _merge_repeated(images, coco)
    return coco


def _categories(entries: list[Any], file: Path) -> dict[int, str]:
    categories: dict[int, str] = {}
    for number, entry in enumerate(entries):
        category = integer(entry.get("id")) if isinstance(entry, dict) else None
        if category is None or not isinstance(entry.get("name"), str):
            raise DataError(
                f"{file}: categories[{number}]: expected an integer 'id' and a text 'name', got {shown(entry)}"
            )
        if categories.setdefault(category, entry["name"]) != entry["name"]:
            names = f"{shown(categories[category])} and {shown(entry['name'])}"
            raise DataError(f"{file}: categories: expected each id once, got {category} for {names}")
    return categories


def _images(entries: list[Any], coco: CocoFile) -> list[CocoImage]:
    images: list[CocoImage] = []
    without_size = 0
    for number, entry in enumerate(entries):
        try:
            image = _image(entry)
        except _Unusable as problem:
            coco.skipped.append((f"images[{number}] of {coco.file.name}", str(problem)))
            continue
        without_size += image.size is None and ("width" in entry or "height" in entry)
        images.append(image)
    if without_size:
        coco.notes.append(f"  {without_size} images have no usable width and height in {coco.file.name}: not compared")
    repeated = [image_id for image_id, count in Counter(image.id for image in images).items() if count > 1]
    if repeated:
        raise DataError(f"{coco.file}: images: expected unique ids, got {repeated[0]} more than once")
    return images


def _image(entry: Any) -> CocoImage:
    if not isinstance(entry, dict):
        raise _Unusable(f"image entry is not an object ({shown(entry)})")
    image_id, name = integer(entry.get("id")), entry.get("file_name")
    if image_id is None:
        raise _Unusable(f"image id is not an integer ({shown(entry.get('id'))})")
    if not isinstance(name, str) or not _is_path(name):
        raise _Unusable(f"file_name is not a path ({shown(name)})")
    sides = integer(entry.get("width")), integer(entry.get("height"))
    width, height = (0 if side is None else side for side in sides)
    return CocoImage(image_id, name, (width, height) if width > 0 and height > 0 else None)


def _is_path(name: str) -> bool:
    try:
        raw = os.fsencode(name)
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return 0 < len(raw) < 4096 and b"\0" not in raw and all(len(part) < 256 for part in raw.split(b"/"))


def _read_objects(entries: list[Any], coco: CocoFile) -> None:
    objects: defaultdict[int, list[CocoObject]] = defaultdict(list)
    largest = limit("OUTLINE_POINTS")
    for number, entry in enumerate(entries):
        try:
            found, problem = _object(entry, largest)
        except _Unusable as unusable:
            place = f"annotations[{number}] of {coco.file.name}"
            if isinstance(entry, dict):
                place = f"annotation {shown(entry.get('id'))} of image {shown(entry.get('image_id'))}"
            coco.skipped.append((place, str(unusable)))
            continue
        if problem:
            coco.skipped.append((found.place, problem))
        objects[found.image_id].append(found)
    coco.objects = dict(objects)


def _object(entry: Any, largest: int) -> tuple[CocoObject, str | None]:
    """The object of an annotation, and why its outline is not used."""
    if not isinstance(entry, dict):
        raise _Unusable(f"annotation is not an object ({shown(entry)})")
    ids = [integer(entry.get(key)) for key in ("id", "image_id", "category_id")]
    for key, value in (("image_id", ids[1]), ("category_id", ids[2])):
        if value is None:
            raise _Unusable(f"{key} is not an integer ({shown(entry.get(key))})")
    marks = [flag(entry.get(key)) for key in ("iscrowd", "ignore")]
    for key, mark in zip(("iscrowd", "ignore"), marks, strict=True):
        if mark is None:
            raise _Unusable(f"{key} is neither 0 nor 1 ({shown(entry[key])})")
    box = _box(entry.get("bbox"))
    given = entry.get("area")
    area = box[2] * box[3] if given is None else finite_number(given)
    if area is None or not 0 <= area <= LARGEST_AREA:
        raise _Unusable(f"area is not a number of pixels ({shown(given)})")
    outline, problem = _outline(entry.get("segmentation"), largest)
    assert ids[1] is not None
    assert ids[2] is not None
    return CocoObject(ids[0], ids[1], ids[2], box, area, any(marks), outline), problem


def _box(value: Any) -> tuple[float, float, float, float]:
    if not isinstance(value, list) or len(value) != 4:
        raise _Unusable(f"bbox is not 4 numbers ({shown(value)})")
    x, y, width, height = map(finite_number, value)
    if x is None or y is None or width is None or height is None:
        raise _Unusable(f"bbox is not 4 finite numbers ({shown(value)})")
    if max(abs(x), abs(y), width, height) > LARGEST_COORDINATE or width * height > LARGEST_AREA:
        raise _Unusable(f"bbox is too large ({shown(value)})")
    if width <= 0 or height <= 0:
        raise _Unusable(f"box without area ({shown(value)})")
    return x, y, width, height


def _outline(segmentation: Any, largest: int) -> tuple[Floats | None, str | None]:
    """One polygon in pixels, and why there is none though polygons are given; a run-length mask gives neither."""
    if segmentation is None or isinstance(segmentation, dict) or segmentation == []:
        return None, None
    if not isinstance(segmentation, list) or not all(isinstance(part, list) for part in segmentation):
        return None, f"segmentation is not a list of polygons, only the box is used ({shown(segmentation)})"
    if sum(map(len, segmentation)) > 2 * largest or len(segmentation) > largest // 100:
        return None, f"segmentation is too long, only the box is used ({above_limit('OUTLINE_POINTS')})"
    parts = [part for part in segmentation if len(part) >= 6 and len(part) % 2 == 0]
    points = _points(list(chain.from_iterable(parts)))
    if points is None:
        return None, f"segmentation has no usable numbers, only the box is used ({shown(segmentation)})"
    problem = None
    if len(parts) < len(segmentation):
        problem = f"segmentation has parts that are not x, y of 3 points or more, not used ({shown(segmentation)})"
    ends = [0, *accumulate(len(part) // 2 for part in parts)]
    return join_polygons([points[start:end] for start, end in pairwise(ends)]) if parts else None, problem


def _points(numbers: list[Any]) -> Floats | None:
    """float32 [k, 2] of x1, y1, x2, y2, …; None if one is no number or too large."""
    if not {*map(type, numbers)} <= {int, float}:
        numbers = [finite_number(value) for value in numbers]
        if None in numbers:
            return None
    try:
        points = np.array(numbers, dtype=np.float64).reshape(-1, 2)
    except OverflowError:
        return None
    # Also false for NaN.
    return points.astype(np.float32) if np.abs(points).max(initial=0) <= LARGEST_COORDINATE else None


def _merge_repeated(images: list[CocoImage], coco: CocoFile) -> None:
    """Keep one image of those that list the same file with the same or no size, with the objects of all."""
    known: defaultdict[str, dict[Size, CocoImage]] = defaultdict(dict)
    for image in images:
        sizes = known[posixpath.normpath(image.file_name.replace("\\", "/"))]
        first = sizes.get(image.size) or sizes.get(None)
        if first is None and image.size is None:
            first = next(iter(sizes.values()), None)
        if first is None:
            sizes[image.size] = image
            coco.images.append(image)
            continue
        reason = f"image file is listed again under another id, its objects are added (id {image.id}, used {first.id})"
        coco.skipped.append((image.file_name, reason))
        objects = coco.objects.setdefault(first.id, [])
        present = {(found.category_id, found.box) for found in objects}
        for found in coco.objects.pop(image.id, []):
            if (found.category_id, found.box) not in present:
                objects.append(found._replace(image_id=first.id))
