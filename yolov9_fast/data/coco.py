"""COCO annotation files: classes of categories, objects of an image, and ground truth for pycocotools."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yolov9_fast.data.config import DataConfig
from yolov9_fast.data.geometry import Floats
from yolov9_fast.data.records import ImageRecord, LabelReport
from yolov9_fast.data.yolo import box_from_corners
from yolov9_fast.errors import DataError

Annotation = dict[str, Any]


@dataclass
class CocoFile:
    """A COCO JSON as read: `images` and `categories` as listed, `annotations` by image id."""

    file: Path
    images: list[dict[str, Any]]
    annotations: dict[int, list[Annotation]]
    categories: list[dict[str, Any]]


def read_coco(file: Path) -> CocoFile:
    """Read a COCO JSON; raises `DataError` that names the missing or wrong entry."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{file}: annotation file does not exist") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{file}: expected a JSON file: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{file}: expected a COCO annotation file with a list '{key}'")
    _check_entries(content["images"], "images", {"id": int, "file_name": str}, file)
    _check_entries(content["annotations"], "annotations", {"image_id": int}, file)
    _check_entries(content["categories"], "categories", {"id": int, "name": str}, file)
    by_image: dict[int, list[Annotation]] = defaultdict(list)
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    return CocoFile(file, content["images"], dict(by_image), content["categories"])


def _check_entries(entries: list[Any], name: str, keys: dict[str, type], file: Path) -> None:
    for number, entry in enumerate(entries):
        for key, kind in keys.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                raise DataError(f"{file}: {name}[{number}]: expected '{key}' ({kind.__name__}), got {str(entry)[:200]}")


def category_ids(config: DataConfig, split: str) -> list[int]:
    """Category id of each class 0..nc-1: the JSON's id of the category so named, or class + 1 for YOLO txt labels."""
    file = config.split(split).annotations
    if file is None:
        return list(range(1, config.num_classes + 1))
    return _class_categories(read_coco(file), config)


def class_of_category(coco: CocoFile, config: DataConfig) -> dict[int, int]:
    """Category id → class index."""
    return {category: index for index, category in enumerate(_class_categories(coco, config))}


def _class_categories(coco: CocoFile, config: DataConfig) -> list[int]:
    ids = {category["name"]: category["id"] for category in coco.categories}
    names = list(config.names.values())
    if all(name in ids for name in names) and len(set(names)) == len(names):
        return [ids[name] for name in names]
    wrong = [name for name in names if name not in ids] or names
    raise DataError(
        f"{config.file}: names: expected categories of {coco.file}, each once; {wrong} are not found or not unique; "
        f"the categories by id are {[name for name, _ in sorted(ids.items(), key=lambda item: item[1])]}"
    )


def coco_objects(
    annotations: Sequence[Annotation],
    size: tuple[int, int],
    classes: dict[int, int],
    report: LabelReport,
    *,
    for_training: bool,
) -> tuple[Floats, list[Floats | None] | None]:
    """Boxes and polygons of an image of `size` (height, width), without crowds; bad annotations go to `report`."""
    height, width = size
    boxes: list[list[float]] = []
    polygons: list[Floats | None] = []
    for annotation in annotations:
        place = f"annotation {annotation.get('id')} of image {annotation.get('image_id')}"
        if annotation.get("iscrowd") or annotation.get("ignore"):
            if for_training:
                report.skip(place, "crowd or ignored region, not used in training")
            continue
        problem = _problem(annotation, classes)
        if problem:
            report.skip(place, problem)
            continue
        x, y, w, h = (float(value) for value in annotation["bbox"])
        box = box_from_corners(x / width, y / height, (x + w) / width, (y + h) / height)
        if box[2] <= 0 or box[3] <= 0:
            report.skip(place, "box outside the image")
            continue
        boxes.append([classes[annotation["category_id"]], *box])
        polygons.append(_polygon(annotation.get("segmentation"), width, height))
    array = np.asarray(boxes, dtype=np.float32).reshape(-1, 5)
    return array, polygons if any(polygon is not None for polygon in polygons) else None


def _problem(annotation: Annotation, classes: dict[int, int]) -> str | None:
    box = annotation.get("bbox")
    try:
        values = np.asarray(box, dtype=np.float64)
    except (TypeError, ValueError):
        return f"bbox is not 4 numbers ({box})"
    if values.shape != (4,):
        return f"bbox is not 4 numbers ({box})"
    if not np.isfinite(values).all():
        return "NaN or infinite number"
    category = annotation.get("category_id")
    if not isinstance(category, int) or category not in classes:
        return f"unknown category ({category})"
    if values[2] <= 0 or values[3] <= 0:
        return "box without area"
    return None


def _polygon(segmentation: Any, width: int, height: int) -> Floats | None:
    if not isinstance(segmentation, list):
        return None
    parts: list[Floats] = []
    for part in segmentation:
        if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
            continue
        try:
            points: Floats = np.asarray(part, dtype=np.float32).reshape(-1, 2)
        except (TypeError, ValueError):
            return None
        if not np.isfinite(points).all():
            return None
        parts.append(np.clip(points / np.array([width, height], dtype=np.float32), 0, 1))
    return _join(parts) if parts else None


def _join(parts: list[Floats]) -> Floats:
    """Join the parts of an object to one closed polygon, by bridges of zero width between nearest points."""
    polygon = parts[0]
    for part in parts[1:]:
        distance = ((polygon[:, None] - part[None]) ** 2).sum(-1)
        i, j = np.unravel_index(int(distance.argmin()), distance.shape)
        polygon = np.concatenate((polygon[: i + 1], part[j:], part[: j + 1], polygon[i:]))
    return polygon


def coco_ground_truth(config: DataConfig, split: str, records: Sequence[ImageRecord]) -> dict[str, Any]:
    """Ground truth of `records` in COCO format for pycocotools.

    From a COCO JSON: its own annotations and category ids, crowds and ignored ones included, of the records' images.
    From YOLO txt: one annotation per box, category id = class + 1, area = box area in pixels, iscrowd 0.
    """
    file = config.split(split).annotations
    annotations: list[Annotation] = []
    if file is None:
        for record in records:
            annotations += _synthesised(record)
        categories = [{"id": index + 1, "name": name} for index, name in config.names.items()]
    else:
        coco = read_coco(file)
        classes = class_of_category(coco, config)
        for record in records:
            annotations += [_completed(a) for a in coco.annotations.get(record.image_id, []) if _usable(a, classes)]
        categories = [category for category in coco.categories if category["id"] in classes]
    ids = [annotation.get("id") for annotation in annotations]
    # pycocotools treats id 0 as unmatched and confuses annotations with the same id.
    if len(set(ids)) != len(ids) or any(not isinstance(i, int) or i <= 0 for i in ids):
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
    images = [
        {"id": record.image_id, "file_name": record.file_name, "width": record.width, "height": record.height}
        for record in records
    ]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}


def _usable(annotation: Annotation, classes: dict[int, int]) -> bool:
    return _problem(annotation, classes) is None


def _completed(annotation: Annotation) -> Annotation:
    _x, _y, width, height = annotation["bbox"]
    return {"iscrowd": 0, "area": width * height, **annotation}


def _synthesised(record: ImageRecord) -> list[Annotation]:
    scale = np.array([record.width, record.height], dtype=np.float64)
    result: list[Annotation] = []
    for row in record.boxes.astype(np.float64):
        size = row[3:5] * scale
        corner = row[1:3] * scale - size / 2
        result.append(
            {
                "image_id": record.image_id,
                "category_id": int(row[0]) + 1,
                "bbox": [*corner.tolist(), *size.tolist()],
                "area": float(size[0] * size[1]),
                "iscrowd": 0,
            }
        )
    return result
