"""Images and objects of a split, each checked once; unusable ones are counted and listed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import compress
from pathlib import Path

import numpy as np

from yolov9_fast._collection import collection_paused
from yolov9_fast._numbers import LARGEST_INTEGER
from yolov9_fast._untrusted import MissingFileError, absence, read_text, shown
from yolov9_fast.data.coco import category_ids, classes_without_category, open_annotations, outlines_in, place_objects
from yolov9_fast.data.coco_file import CocoFile, CocoImage
from yolov9_fast.data.config import DataConfig
from yolov9_fast.data.listing import label_path, list_images
from yolov9_fast.data.records import ImageRecord, LabelReport
from yolov9_fast.data.scan import check_images
from yolov9_fast.data.yolo import parse_yolo
from yolov9_fast.errors import DataError
from yolov9_fast.limits import above_limit, limit


@collection_paused()
def load_split(
    config: DataConfig, split: str, *, for_training: bool, coco: CocoFile | None = None
) -> tuple[list[ImageRecord], LabelReport]:
    """All usable images of a split with their objects, and a report of what was skipped.

    `coco`: the split's COCO JSON, if it has been read (`open_annotations`).

    Raises `DataError` when the split has no usable image, and in training when no image has an object.
    """
    report = LabelReport()
    coco = coco or open_annotations(config, split)
    if coco is None:
        records = _yolo_records(config, split, report)
    else:
        records = _coco_records(config, split, coco, report, for_training)
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


def _yolo_records(config: DataConfig, split: str, report: LabelReport) -> list[ImageRecord]:
    paths = list_images(config, split, report)
    records = []
    missing = 0
    for path, image_id, checked in zip(paths, _image_ids(paths), check_images(paths, _key(config, split)), strict=True):
        if checked.problem:
            report.skip(str(path), checked.problem)
            continue
        name = _name_in(config.path, path)
        record = ImageRecord(path, checked.width, checked.height, image_id, np.zeros((0, 5), np.float32), None, name)
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


def _name_in(root: Path, path: Path) -> str:
    """The path relative to the dataset's root if it lies in it: unlike the last part alone, no two images share it."""
    path = Path(os.path.normpath(path))
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _image_ids(paths: Sequence[Path]) -> list[int]:
    """The file names as numbers, as in COCO, if all are numbers of 63 bits and differ; otherwise 1..n."""
    stems = [path.stem for path in paths]
    if all(stem.isascii() and stem.isdigit() for stem in stems):
        ids = [int(stem) for stem in stems]
        if len(set(ids)) == len(ids) and max(ids) <= LARGEST_INTEGER:
            return ids
    return list(range(1, len(paths) + 1))


def _coco_records(
    config: DataConfig, split: str, coco: CocoFile, report: LabelReport, for_training: bool
) -> list[ImageRecord]:
    folders = config.split(split).images
    classes = {category: label for label, category in enumerate(category_ids(config, split, coco=coco))}
    report.skipped += coco.skipped
    report.notes += [*coco.notes, *_category_notes(config, coco)]
    paths = {image.id: path for image in coco.images if (path := _find(image.file_name, folders))}
    if coco.images and not paths:
        places = ", ".join(str(folder) for folder in folders)
        raise DataError(
            f"{config.file}: split '{split}': none of the {len(coco.images)} images of {coco.file} is in {places}"
        )
    checked_images = dict(zip(paths, check_images(list(paths.values()), _key(config, split)), strict=True))
    records = []
    for image in coco.images:
        if image.id not in paths:
            report.skip(image.file_name, "image file is missing")
            continue
        path, checked = paths[image.id], checked_images[image.id]
        size = (checked.height, checked.width)
        objects = coco.objects.get(image.id, [])
        problem = checked.problem or _size_mismatch(image, checked.width, checked.height)
        if problem or len(objects) > limit("IMAGE_OBJECTS"):
            report.skip(str(path), problem or f"too many objects ({above_limit('IMAGE_OBJECTS', len(objects))})")
            continue
        placed, boxes = place_objects(objects, size, classes, report)
        for found in placed if for_training else ():
            if found.crowd:
                report.skip(found.place, "crowd or ignored region, not used in training")
        single = np.array([not found.crowd for found in placed], dtype=bool)
        polygons = outlines_in(list(compress(placed, single)), size)
        records.append(
            ImageRecord(path, checked.width, checked.height, image.id, boxes[single], polygons, image.file_name)
        )
    listed = {image.id for image in coco.images}
    unlisted = sum(len(objects) for image_id, objects in coco.objects.items() if image_id not in listed)
    if unlisted:
        report.notes.append(f"  {unlisted} annotations belong to images that are not listed in {coco.file.name}")
    return records


def _category_notes(config: DataConfig, coco: CocoFile) -> list[str]:
    missing = classes_without_category(coco, config)
    if not missing:
        return []
    return [
        f"  {coco.file.name} has no category for {len(missing)} classes: no objects there, and their detections "
        f"get category ids above its own: {shown(missing)}"
    ]


def _find(name: str, folders: tuple[Path, ...]) -> Path | None:
    """The image file in one of the folders; a name with backslashes that is no file is read as a path of Windows."""
    names = dict.fromkeys((name, name.replace("\\", "/")))
    candidates = (folder / name for name in names for folder in folders)
    # Not Path.is_file, which raises for a path that is too long.
    return next((path for path in candidates if os.path.isfile(path)), None)


def _size_mismatch(image: CocoImage, width: int, height: int) -> str | None:
    if image.size in (None, (width, height)):
        return None
    return f"image size differs from the annotations' ({width}x{height}, annotated {image.size[0]}x{image.size[1]})"


def _key(config: DataConfig, split: str) -> str:
    return f"{config.path}\0{split}\0{config.split(split)}"
