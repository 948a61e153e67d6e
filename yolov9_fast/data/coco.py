"""COCO annotations and the data file: classes of categories, objects of an image, and ground truth for pycocotools."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import compress
from typing import Any

import numpy as np

from yolov9_fast._collection import collection_paused
from yolov9_fast._untrusted import shown
from yolov9_fast.data.coco_file import CocoFile, CocoObject, read_coco
from yolov9_fast.data.config import DataConfig
from yolov9_fast.data.geometry import Floats
from yolov9_fast.data.records import ImageRecord, LabelReport
from yolov9_fast.errors import DataError


def open_annotations(config: DataConfig, split: str) -> CocoFile | None:
    """The COCO JSON of a split, read; None for YOLO txt labels."""
    file = config.split(split).annotations
    return None if file is None else read_coco(file)


def category_ids(config: DataConfig, split: str, *, coco: CocoFile | None = None) -> list[int]:
    """Category id of each class 0..nc-1: the JSON's id of the category so named, or class + 1 for YOLO txt labels.

    A JSON that lists only the categories it uses may lack some: they get ids above those of the file. `coco`: the
    split's JSON, if it has been read. Raises `DataError` where names and categories do not fit.
    """
    coco = coco or open_annotations(config, split)
    if coco is None:
        return list(range(1, config.num_classes + 1))
    ids: dict[str, list[int]] = {}
    for category, name in coco.categories.items():
        ids.setdefault(name, []).append(category)
    names = list(config.names.values())
    for name in names:
        if len(ids.get(name, ())) > 1:
            known = " and ".join(map(str, ids[name]))
            raise DataError(f"{coco.file}: categories: expected each name once, got {shown(name)} with the ids {known}")
    missing = classes_without_category(coco, config)
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated or (missing and not _is_part(coco, config)):
        wrong = repeated or missing
        listed = [coco.categories[category] for category in sorted(coco.categories)]
        raise DataError(
            f"{config.file}: names: expected categories of {coco.file}, each once; {shown(wrong)} are not found or "
            f"not unique; the categories by id are {shown(listed)}"
        )
    free = max(coco.categories, default=0)
    new = {name: free + number for number, name in enumerate(missing, start=1)}
    return [ids[name][0] if name in ids else new[name] for name in names]


def classes_without_category(coco: CocoFile, config: DataConfig) -> list[str]:
    """Class names of the data file that no category has."""
    present = set(coco.categories.values())
    return [name for name in config.names.values() if name not in present]


def _is_part(coco: CocoFile, config: DataConfig) -> bool:
    """Whether every category in use is a class, and some category too unless there is none."""
    names = set(config.names.values())
    used = {found.category_id for objects in coco.objects.values() for found in objects}
    return all(coco.categories.get(category) in names for category in used) and (
        not coco.categories or not names.isdisjoint(coco.categories.values())
    )


def place_objects(
    objects: Sequence[CocoObject], size: tuple[int, int], classes: dict[int, int], report: LabelReport | None = None
) -> tuple[list[CocoObject], Floats]:
    """The objects of an image of `size` (height, width) that training, confusion matrix and AP use, crowds included.

    `classes`: category id → class. Objects of other categories or outside the image go to `report`. Also returns the
    rows of `ImageRecord.boxes`, float32 [n, 5].
    """
    boxes = np.array([found.box for found in objects], dtype=np.float64).reshape(-1, 4)
    ends = np.stack((boxes[:, :2], boxes[:, :2] + boxes[:, 2:])) / np.array([size[1], size[0]])
    low, high = np.clip(ends, 0, 1)
    labels = np.array([classes.get(found.category_id, -1) for found in objects], dtype=np.int64)
    rows = np.concatenate((labels[:, None], (low + high) / 2, high - low), axis=1).astype(np.float32)
    used = (labels >= 0) & (rows[:, 3:] > 0).all(axis=1)
    if report is not None:
        for found, label in compress(zip(objects, labels, strict=True), ~used):
            reason = f"unknown category ({found.category_id})" if label < 0 else "box outside the image"
            report.skip(found.place, reason)
    return list(compress(objects, used)), rows[used]


def outlines_in(objects: Sequence[CocoObject], size: tuple[int, int]) -> list[Floats | None] | None:
    """`ImageRecord.polygons` of objects in an image of `size` (height, width)."""
    if all(found.outline is None for found in objects):
        return None
    scale = np.array([size[1], size[0]], dtype=np.float32)
    return [None if found.outline is None else np.clip(found.outline / scale, 0, 1) for found in objects]


@collection_paused()
def coco_ground_truth(
    config: DataConfig, split: str, records: Sequence[ImageRecord], *, coco: CocoFile | None = None
) -> dict[str, Any]:
    """Ground truth of `records` in COCO format for pycocotools; its categories are in the order of the classes.

    From a COCO JSON: the annotations that `load_split` uses, with the file's boxes, areas, and image and category ids,
    and the crowds, which are annotations with `iscrowd` 1 or `ignore` 1: loss and confusion matrix leave them out, and
    a detection inside one of its class counts neither as correct nor as wrong. pycocotools reads `iscrowd` only, so
    that both are written as `iscrowd` 1.
    From YOLO txt: one annotation per box, category id = class + 1, area = box area in pixels, iscrowd 0.

    `coco`: the split's JSON, if it has been read.
    """
    coco = coco or open_annotations(config, split)
    categories = category_ids(config, split, coco=coco)
    annotations: list[dict[str, Any]] = []
    if coco is None:
        for record in records:
            annotations += _synthesised(record)
    else:
        classes = {category: label for label, category in enumerate(categories)}
        for record in records:
            objects = coco.objects.get(record.image_id, [])
            annotations += map(_annotation, place_objects(objects, (record.height, record.width), classes)[0])
    ids = {annotation["id"] for annotation in annotations}
    # pycocotools treats id 0 as unmatched and confuses annotations with the same id.
    if len(ids) != len(annotations) or any(number is None or number <= 0 for number in ids):
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
    images = [
        {"id": record.image_id, "file_name": record.file_name, "width": record.width, "height": record.height}
        for record in records
    ]
    listed = [{"id": category, "name": config.names[label]} for label, category in enumerate(categories)]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": listed}


def _annotation(found: CocoObject) -> dict[str, Any]:
    return {
        "id": found.id,
        "image_id": found.image_id,
        "category_id": found.category_id,
        "bbox": list(found.box),
        "area": found.area,
        "iscrowd": int(found.crowd),
    }


def _synthesised(record: ImageRecord) -> list[dict[str, Any]]:
    scale = np.array([record.width, record.height], dtype=np.float64)
    result: list[dict[str, Any]] = []
    for row in record.boxes.astype(np.float64):
        size = row[3:5] * scale
        corner = row[1:3] * scale - size / 2
        result.append(
            {
                "id": None,
                "image_id": record.image_id,
                "category_id": int(row[0]) + 1,
                "bbox": [*corner.tolist(), *size.tolist()],
                "area": float(size[0] * size[1]),
                "iscrowd": 0,
            }
        )
    return result
