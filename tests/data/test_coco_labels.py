"""COCO annotation files: classes by name, crowds, bad annotations, and the ground truth for pycocotools."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.data.drawing import paint, write_config
from yolov9_fast.data import category_ids, coco_ground_truth, load_data_config, load_split
from yolov9_fast.data.coco import read_coco
from yolov9_fast.errors import DataError

CATEGORIES = [{"id": 90, "name": "c"}, {"id": 3, "name": "a"}, {"id": 7, "name": "b"}]


def annotation(number: int, **changes: object) -> dict:
    return {
        "id": number,
        "image_id": 1,
        "category_id": 7,
        "bbox": [10, 10, 20, 10],
        "area": 150,
        "iscrowd": 0,
        **changes,
    }


def write(root: Path, annotations: list[dict], **changes: object):
    (root / "pics").mkdir(exist_ok=True)
    cv2.imwrite(str(root / "pics" / "one.png"), paint(40, 60, [(1, 10, 10, 30, 20)]))
    images = [{"id": 1, "file_name": "one.png", "width": 60, "height": 40}]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES, **changes}
    (root / "a.json").write_text(json.dumps(content))
    return load_data_config(write_config(root, train={"images": "pics", "annotations": "a.json"}))


def test_classes_are_categories_by_name(tmp_path: Path) -> None:
    config = write(tmp_path, [annotation(5)])
    [record], report = load_split(config, "train", for_training=True)
    np.testing.assert_allclose(record.boxes, [[1, 20 / 60, 15 / 40, 20 / 60, 10 / 40]], atol=1e-6)
    assert (record.image_id, record.file_name, report.objects) == (1, "one.png", 1)
    assert category_ids(config, "train") == [3, 7, 90]


def test_names_that_are_no_categories_are_an_error(tmp_path: Path) -> None:
    write(tmp_path, [annotation(1)])
    config = load_data_config(
        write_config(tmp_path, names=["a", "zebra"], train={"images": "pics", "annotations": "a.json"})
    )
    with pytest.raises(DataError, match=r"zebra.*categories by id are \['a', 'b', 'c'\]"):
        load_split(config, "train", for_training=True)


def test_crowds_are_ignored_in_training_and_kept_in_the_ground_truth(tmp_path: Path) -> None:
    config = write(tmp_path, [annotation(1), annotation(2, iscrowd=1, bbox=[0, 0, 60, 40])])
    [record], report = load_split(config, "train", for_training=True)
    assert len(record.boxes) == 1
    assert report.counts() == {"crowd or ignored region, not used in training": 1}
    assert load_split(config, "train", for_training=False)[1].skipped == []
    gt = coco_ground_truth(config, "train", [record])
    assert [(entry["id"], entry["iscrowd"], entry["area"]) for entry in gt["annotations"]] == [
        (1, 0, 150),
        (2, 1, 150),
    ]
    assert gt["annotations"][1]["bbox"] == [0, 0, 60, 40]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bbox": [10, 10, 0, 10]}, "box without area"),
        ({"bbox": [10, 10, -3, 10]}, "box without area"),
        ({"bbox": [10, 10, 5]}, "bbox is not 4 numbers"),
        ({"bbox": None}, "bbox is not 4 numbers"),
        ({"bbox": ["x", 1, 2, 3]}, "bbox is not 4 numbers"),
        ({"bbox": [float("nan"), 1, 2, 3]}, "NaN or infinite number"),
        ({"bbox": [100, 10, 5, 5]}, "box outside the image"),
        ({"category_id": 4}, "unknown category"),
        ({"category_id": None}, "unknown category"),
    ],
)
def test_bad_annotation_is_a_counted_skip(tmp_path: Path, changes: dict, reason: str) -> None:
    config = write(tmp_path, [annotation(1), annotation(2, **changes)])
    [record], report = load_split(config, "train", for_training=True)
    assert len(record.boxes) == 1
    assert report.counts() == {reason: 1}
    assert "annotation 2 of image 1" in report.skipped[0][0]
    coco_ground_truth(config, "train", [record])


def test_image_that_is_missing_or_of_another_size_is_a_counted_skip(tmp_path: Path) -> None:
    images = [
        {"id": 1, "file_name": "one.png", "width": 60, "height": 40},
        {"id": 2, "file_name": "gone.png", "width": 60, "height": 40},
        {"id": 3, "file_name": "one.png", "width": 600, "height": 400},
    ]
    config = write(tmp_path, [annotation(1), annotation(2, image_id=77)], images=images)
    records, report = load_split(config, "train", for_training=True)
    assert len(records) == 1
    assert report.counts() == {"image file is missing": 1, "image size differs from the annotations'": 1}
    assert "1 annotations belong to images that are not listed in a.json" in report.summary()


def test_annotation_ids_that_pycocotools_misreads_are_renumbered(tmp_path: Path) -> None:
    config = write(tmp_path, [annotation(0), annotation(0)])
    records, _ = load_split(config, "train", for_training=False)
    assert [entry["id"] for entry in coco_ground_truth(config, "train", records)["annotations"]] == [1, 2]


def test_parts_of_an_object_become_one_polygon_without_filling_the_gap(tmp_path: Path) -> None:
    parts = [[10, 10, 20, 10, 20, 20, 10, 20], [40, 10, 50, 10, 50, 20, 40, 20]]
    config = write(tmp_path, [annotation(1, segmentation=parts, bbox=[10, 10, 40, 10])])
    [record], _ = load_split(config, "train", for_training=True)
    assert record.polygons is not None
    assert record.polygons[0] is not None
    polygon = np.round(record.polygons[0] * [60, 40]).astype(np.int32)
    mask = cv2.fillPoly(np.zeros((40, 60), np.uint8), [polygon], 1)
    assert mask[12:19, 12:19].all()
    assert mask[12:19, 42:49].all()
    assert mask[:, 25:35].sum() <= 2 * 10  # the bridge is a line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a JSON file"),
        ("[]", "with a list 'images'"),
        ('{"images": [], "annotations": []}', "with a list 'categories'"),
        (
            '{"images": [{"id": 1}], "annotations": [], "categories": []}',
            r"images\[0\]: expected 'file_name' ",
        ),
        ('{"images": [], "annotations": [3], "categories": []}', r"annotations\[0\]: expected 'image_id' \(int\), got"),
    ],
)
def test_file_in_another_format_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_coco(file)


def test_missing_annotation_file_and_images_are_errors(tmp_path: Path) -> None:
    config = write(tmp_path, [annotation(1)], images=[{"id": 1, "file_name": "gone.png"}])
    with pytest.raises(DataError, match=r"none of the 1 images of .*a.json is in .*pics"):
        load_split(config, "train", for_training=True)
    (tmp_path / "a.json").unlink()
    with pytest.raises(DataError, match=r"a\.json: annotation file does not exist"):
        load_split(config, "train", for_training=True)
    config = write(tmp_path, [], images=[])
    with pytest.raises(DataError, match=r"is empty: .*a.json lists no images"):
        load_split(config, "train", for_training=True)
