"""COCO annotation files: classes by name, crowds, bad annotations, and the ground truth for pycocotools."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.data.drawing import paint, write_config
from yolov9_fast.data import category_ids, coco_ground_truth, load_data_config, load_split
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
        ({"bbox": {"x": 1}}, "bbox is not 4 numbers"),
        ({"bbox": ["x", 1, 2, 3]}, "bbox is not 4 finite numbers"),
        ({"bbox": [float("nan"), 1, 2, 3]}, "bbox is not 4 finite numbers"),
        ({"bbox": [1, 1, float("inf"), 3]}, "bbox is not 4 finite numbers"),
        ({"bbox": [1, 1, 10**400, 3]}, "bbox is not 4 finite numbers"),
        ({"bbox": [1, 1, True, 3]}, "bbox is not 4 finite numbers"),
        ({"bbox": [1, 1, [2], 3]}, "bbox is not 4 finite numbers"),
        ({"bbox": ["1", "1", "nan", "3"]}, "bbox is not 4 finite numbers"),
        ({"bbox": [1, 1, 1e300, 3]}, "bbox is too large"),
        ({"bbox": [1, 1, 2e5, 2e5]}, "bbox is too large"),
        ({"bbox": [100, 10, 5, 5]}, "box outside the image"),
        ({"category_id": 4}, "unknown category"),
        ({"category_id": None}, "category_id is not an integer"),
        ({"category_id": True}, "category_id is not an integer"),
        ({"category_id": 7.5}, "category_id is not an integer"),
        ({"category_id": [7]}, "category_id is not an integer"),
        ({"category_id": 10**30}, "category_id is not an integer"),
        ({"area": "big"}, "area is not a number of pixels"),
        ({"area": float("nan")}, "area is not a number of pixels"),
        ({"area": 2e10}, "area is not a number of pixels"),
        ({"area": -1}, "area is not a number of pixels"),
        ({"area": True}, "area is not a number of pixels"),
        ({"area": [150]}, "area is not a number of pixels"),
        ({"iscrowd": 2}, "iscrowd is neither 0 nor 1"),
        ({"iscrowd": "no"}, "iscrowd is neither 0 nor 1"),
        ({"iscrowd": []}, "iscrowd is neither 0 nor 1"),
        ({"ignore": float("nan")}, "ignore is neither 0 nor 1"),
    ],
)
def test_bad_annotation_is_a_counted_skip(tmp_path: Path, changes: dict, reason: str) -> None:
    config = write(tmp_path, [annotation(1), annotation(2, **changes)])
    [record], report = load_split(config, "train", for_training=True)
    assert len(record.boxes) == 1
    assert report.counts() == {reason: 1}
    assert "annotation 2 of image 1" in report.skipped[0][0]
    assert "\n" not in report.skipped[0][1]
    assert [entry["id"] for entry in coco_ground_truth(config, "train", [record])["annotations"]] == [1]


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


def test_missing_annotation_file_and_images_are_errors(tmp_path: Path) -> None:
    config = write(tmp_path, [annotation(1)], images=[{"id": 1, "file_name": "gone.png"}])
    with pytest.raises(DataError, match=r"none of the 1 images of .*a.json is in .*pics"):
        load_split(config, "train", for_training=True)
    (tmp_path / "a.json").unlink()
    with pytest.raises(DataError, match=r"a\.json: annotation file does not exist"):
        load_split(config, "train", for_training=True)
    config = write(tmp_path, [], images=[])
    with pytest.raises(DataError, match="has no usable image"):
        load_split(config, "train", for_training=True)


def test_ignored_annotations_are_crowds_for_all_who_read_them(tmp_path: Path) -> None:
    config = write(
        tmp_path, [annotation(1), annotation(2, ignore=1), annotation(3, ignore="1"), annotation(4, ignore=0)]
    )
    [record], report = load_split(config, "train", for_training=True)
    assert len(record.boxes) == 2
    assert report.counts() == {"crowd or ignored region, not used in training": 2}
    gt = coco_ground_truth(config, "train", [record])
    assert [entry["iscrowd"] for entry in gt["annotations"]] == [0, 1, 1, 0]


def test_numbers_written_as_text_or_floats_are_numbers(tmp_path: Path) -> None:
    """The same objects as with plain numbers, in training and in the ground truth, which holds numbers only."""
    plain = [annotation(1), annotation(2, bbox=[0, 0, 60, 40], iscrowd=1)]
    written = [
        annotation(1, image_id="1", category_id=7.0, bbox=["10", "10.0", 20.0, " 10 "], area="150", iscrowd="0"),
        annotation(2, image_id=1.0, category_id="7", bbox=["0", 0, "60", "40"], area=150.0, iscrowd=True, ignore=None),
    ]
    results = []
    for number, listed in enumerate((plain, written)):
        root = tmp_path / str(number)
        root.mkdir()
        images = [{"id": ("1", 1.0)[number], "file_name": "one.png", "width": "60", "height": 40.0}]
        categories = [{"id": 90, "name": "c"}, {"id": "3", "name": "a"}, {"id": 7.0, "name": "b"}]
        config = write(root, listed, images=images, **({"categories": categories} if number else {}))
        [record], report = load_split(config, "train", for_training=False)
        assert report.skipped == []
        assert report.notes == []
        results.append((record.boxes.tolist(), record.image_id, coco_ground_truth(config, "train", [record])))
        assert category_ids(config, "train") == [3, 7, 90]
    assert results[0] == results[1]
    [first, second] = results[1][2]["annotations"]
    assert all(type(value) in (int, float) for value in first["bbox"])
    assert (first["iscrowd"], second["iscrowd"], type(first["area"])) == (0, 1, float)


@pytest.mark.parametrize(("width", "height"), [(None, None), (0, 0), (-1, -1), (True, 40), ("x", 40), ([60], 40)])
def test_an_image_without_usable_size_is_used_and_noted(tmp_path: Path, width: object, height: object) -> None:
    images = [{"id": 1, "file_name": "one.png", "width": width, "height": height}]
    [record], report = load_split(write(tmp_path, [annotation(1)], images=images), "train", for_training=True)
    assert ((record.width, record.height), report.skipped) == ((60, 40), [])
    assert report.notes == ["  1 images have no usable width and height in a.json: not compared"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": True}, "image id is not an integer"),
        ({"id": [1]}, "image id is not an integer"),
        ({"id": 1.5}, "image id is not an integer"),
        ({"id": float("inf")}, "image id is not an integer"),
        ({"file_name": 3}, "file_name is not a path"),
        ({"file_name": ""}, "file_name is not a path"),
        ({"file_name": "a\0b.png"}, "file_name is not a path"),
        ({"file_name": "\ud800.png"}, "file_name is not a path"),
        ({"file_name": "x" * 300}, "file_name is not a path"),
        ({"file_name": "x/" * 3000}, "file_name is not a path"),
    ],
)
def test_an_image_entry_that_cannot_be_used_is_a_counted_skip(tmp_path: Path, changes: dict, reason: str) -> None:
    good = {"id": 1, "file_name": "one.png", "width": 60, "height": 40}
    config = write(tmp_path, [annotation(1)], images=[{**good, "id": 2, **changes}, good])
    records, report = load_split(config, "train", for_training=True)
    assert [record.image_id for record in records] == [1]
    assert report.counts() == {reason: 1}


def test_backslashes_in_file_names_are_separators_unless_the_file_has_them(tmp_path: Path) -> None:
    names = ["sub\\one.png", ".\\sub\\two.png", "odd\\name.png"]
    (tmp_path / "pics" / "sub").mkdir(parents=True)
    for name in ("sub/one.png", "sub/two.png", "odd\\name.png"):
        cv2.imwrite(str(tmp_path / "pics" / name), paint(40, 60, []))
    images = [{"id": number, "file_name": name} for number, name in enumerate(names, start=1)]
    records, report = load_split(write(tmp_path, [annotation(1)], images=images), "train", for_training=True)
    assert report.skipped == []
    assert [record.path.name for record in records] == ["one.png", "two.png", "odd\\name.png"]


def test_json_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    config = write(tmp_path, [annotation(1)])
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.json").read_bytes())
    assert load_split(config, "train", for_training=True)[1].objects == 1


def test_a_file_with_its_used_categories_only_is_used_and_noted(tmp_path: Path) -> None:
    config = write(tmp_path, [annotation(1)], categories=[{"id": 7, "name": "b"}, {"id": 100, "name": "unused parent"}])
    [record], report = load_split(config, "train", for_training=False)
    assert record.boxes[:, 0].tolist() == [1]
    assert report.notes == [
        "  a.json has no category for 2 classes: no objects there, and their detections get category ids above "
        "its own: ['a', 'c']",
    ]
    assert category_ids(config, "train") == [101, 7, 102]
    gt = coco_ground_truth(config, "train", [record])
    assert gt["categories"] == [{"id": 101, "name": "a"}, {"id": 7, "name": "b"}, {"id": 102, "name": "c"}]


def test_a_category_name_with_two_ids_is_an_error_if_it_is_a_class(tmp_path: Path) -> None:
    config = write(tmp_path, [annotation(1)], categories=[*CATEGORIES, {"id": 9, "name": "b"}])
    with pytest.raises(DataError, match=r"a\.json: categories: expected each name once, got 'b' with the ids 7 and 9"):
        load_split(config, "train", for_training=True)
    twice = [*CATEGORIES, CATEGORIES[0], {"id": 10, "name": "other"}, {"id": 11, "name": "other"}]
    assert load_split(write(tmp_path, [annotation(1)], categories=twice), "train", for_training=True)[1].objects == 1


@pytest.mark.parametrize(
    "again", [{"file_name": "one.png"}, {"file_name": "./one.png", "width": None}, {"file_name": "x\\..\\one.png"}]
)
def test_a_file_under_two_ids_is_one_image_with_the_objects_of_both(tmp_path: Path, again: dict) -> None:
    size = {"width": 60, "height": 40}
    images = [{"id": 1, "file_name": "one.png", **size}, {"id": 2, **size, **again}]
    other = annotation(3, image_id=2, bbox=[30, 20, 10, 10])
    config = write(tmp_path, [annotation(1), annotation(2, image_id=2), other], images=images)
    [record], report = load_split(config, "train", for_training=True)
    assert len(record.boxes) == 2
    assert report.counts() == {"image file is listed again under another id, its objects are added": 1}
    gt = coco_ground_truth(config, "train", [record])
    assert [(entry["id"], entry["image_id"]) for entry in gt["annotations"]] == [(1, 1), (3, 1)]
    config = write(tmp_path, [annotation(2, image_id=2)], images=images)  # the first id without objects
    assert load_split(config, "train", for_training=True)[1].objects == 1


def test_an_object_outside_its_image_is_no_ground_truth_either(tmp_path: Path) -> None:
    config = write(tmp_path, [annotation(1), annotation(2, bbox=[100, 10, 5, 5])])
    records, _ = load_split(config, "train", for_training=False)
    assert [entry["id"] for entry in coco_ground_truth(config, "train", records)["annotations"]] == [1]


def test_too_many_objects_of_an_image_are_a_counted_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLOV9_FAST_MAX_IMAGE_OBJECTS", "2")
    config = write(tmp_path, [annotation(number) for number in range(1, 4)])
    with pytest.raises(DataError, match=r"1 skipped: too many objects.*got 3 \(YOLOV9_FAST_MAX_IMAGE_OBJECTS"):
        load_split(config, "train", for_training=True)
