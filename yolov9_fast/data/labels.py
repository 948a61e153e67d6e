"""Images and objects of a split, each checked once; unusable ones are counted and listed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from yolov9_fast._untrusted import MissingFileError, absence, read_text
from yolov9_fast.data.coco import class_of_category, coco_objects, read_coco
from yolov9_fast.data.config import DataConfig
from yolov9_fast.data.listing import label_path, list_images
from yolov9_fast.data.records import ImageRecord, LabelReport
from yolov9_fast.data.scan import check_images
from yolov9_fast.data.yolo import parse_yolo
from yolov9_fast.errors import DataError


def load_split(config: DataConfig, split: str, *, for_training: bool) -> tuple[list[ImageRecord], LabelReport]:
    """All usable images of a split with their objects, and a report of what was skipped.

    Raises `DataError` when the split has no usable image, and in training when no image has an object.
    """
    report = LabelReport()
    coco = config.split(split).annotations is not None
    records = (_coco_records if coco else _yolo_records)(config, split, report, for_training)
    for record in records:
        report.add(record)
    if not records:
        raise DataError(f"{config.file}: split '{split}' has no usable image; {report.short()}")
    if for_training and not report.objects:
        where = config.split(split).annotations or label_path(records[0].path)
        raise DataError(
            f"{config.file}: split '{split}' has {len(records)} images and no objects; "
            f"labels were looked for in {where}; {report.short()}"
        )
    return records, report


def _yolo_records(config: DataConfig, split: str, report: LabelReport, for_training: bool) -> list[ImageRecord]:
    paths = list_images(config, split, report)
    records = []
    missing = 0
    for path, image_id, checked in zip(paths, _image_ids(paths), check_images(paths, _key(config, split)), strict=True):
        if checked.problem:
            report.skip(str(path), checked.problem)
            continue
        record = ImageRecord(
            path, checked.width, checked.height, image_id, np.zeros((0, 5), np.float32), None, path.name
        )
        try:
            _read_labels(record, config.num_classes, report)
        except MissingFileError:
            missing += 1
        except DataError as error:
            file = label_path(path)
            detail = str(error).removeprefix(f"{file}: ").removeprefix("label file: ")
            report.skip(str(file), f"label file cannot be used, nor its image ({detail})")
            continue
        records.append(record)
    if missing:
        report.notes.append(f"  {missing} images have no label file and are used as images without objects")
    return records


def _read_labels(record: ImageRecord, num_classes: int, report: LabelReport) -> None:
    """Set the objects of a record; raises `MissingFileError` without a label file, `DataError` if it is of no use."""
    file = label_path(record.path)
    if os.path.islink(file) and not os.path.exists(file):
        raise DataError(f"{file}: {absence(file)}")
    parsed = parse_yolo(read_text(file, "label file", "LABEL_BYTES"), num_classes, str(file))
    record.boxes, record.polygons = parsed.boxes, parsed.polygons
    for row, reason in parsed.problems:
        report.skip(f"{file}:{row}", reason)


def _image_ids(paths: Sequence[Path]) -> list[int]:
    """The file names as numbers, as in COCO, if all are numbers and differ; otherwise 1..n."""
    stems = [path.stem for path in paths]
    if all(stem.isascii() and stem.isdigit() for stem in stems):
        ids = [int(stem) for stem in stems]
        if len(set(ids)) == len(ids):
            return ids
    return list(range(1, len(paths) + 1))


def _coco_records(config: DataConfig, split: str, report: LabelReport, for_training: bool) -> list[ImageRecord]:
    definition = config.split(split)
    assert definition.annotations is not None
    coco = read_coco(definition.annotations)
    classes = class_of_category(coco, config)
    if not coco.images:
        raise DataError(f"{config.file}: split '{split}' is empty: {coco.file} lists no images")
    _check_unique_ids(coco.images, coco.file)
    paths = [_find(image["file_name"], definition.images) for image in coco.images]
    if not any(path.is_file() for path in paths):
        places = ", ".join(str(folder) for folder in definition.images)
        raise DataError(
            f"{config.file}: split '{split}': none of the {len(paths)} images of {coco.file} is in {places}"
        )
    records = []
    for image, path, checked in zip(coco.images, paths, check_images(paths, _key(config, split)), strict=True):
        problem = checked.problem or _size_mismatch(image, checked.width, checked.height)
        if problem:
            report.skip(str(path), problem)
            continue
        annotations = coco.annotations.get(image["id"], [])
        size = (checked.height, checked.width)
        boxes, polygons = coco_objects(annotations, size, classes, report, for_training=for_training)
        name = str(image["file_name"])
        records.append(ImageRecord(path, checked.width, checked.height, image["id"], boxes, polygons, name))
    unlisted = set(coco.annotations) - {image["id"] for image in coco.images}
    if unlisted:
        count = sum(len(coco.annotations[key]) for key in unlisted)
        report.notes.append(f"  {count} annotations belong to images that are not listed in {coco.file.name}")
    return records


def _check_unique_ids(images: list[dict[str, Any]], file: Path) -> None:
    repeated = [image_id for image_id, count in Counter(image["id"] for image in images).items() if count > 1]
    if repeated:
        raise DataError(f"{file}: images: expected unique ids, got {repeated[0]} more than once")


def _find(name: str, folders: tuple[Path, ...]) -> Path:
    candidates = [folder / name for folder in folders]
    return next((path for path in candidates if path.is_file()), candidates[0])


def _size_mismatch(image: dict[str, Any], width: int, height: int) -> str | None:
    stated = (image.get("width", width), image.get("height", height))
    if stated == (width, height):
        return None
    return f"image size differs from the annotations' ({width}x{height}, annotated {stated[0]}x{stated[1]})"


def _key(config: DataConfig, split: str) -> str:
    return f"{config.path}\0{split}\0{config.split(split)}"
