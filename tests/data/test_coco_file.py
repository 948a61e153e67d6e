"""Reading a COCO JSON: files in another format, unusable entries, outlines, sizes that ask for much work."""

from __future__ import annotations

import json
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolov9_fast.data.coco_file import CocoObject, read_coco
from yolov9_fast.errors import DataError


def annotation(**changes: object) -> dict:
    return {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40], **changes}


def read(folder: Path, annotations: list, **changes: object):
    images = [{"id": 1, "file_name": "one.png"}]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}], **changes}
    (folder / "x.json").write_text(json.dumps(content))
    return read_coco(folder / "x.json")


def only(folder: Path, **changes: object) -> tuple[CocoObject, list[str]]:
    coco = read(folder, [annotation(**changes)])
    [found] = coco.objects[1]
    return found, [reason for _, reason in coco.skipped]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "annotation file: expected JSON"),
        ("", "annotation file: expected JSON"),
        ("[]", "with a list 'images'"),
        ("3", "with a list 'images'"),
        ('{"images": [], "annotations": []}', "with a list 'categories'"),
        ('{"images": [], "annotations": {}, "categories": []}', "with a list 'annotations'"),
        ("[" * 100_000, "nested too deeply"),
        ('{"images": [{"id": %s}]}' % ("1" * 5000), "expected JSON: Exceeds the limit"),
        (
            '{"images": [], "annotations": [], "categories": [3]}',
            r"categories\[0\]: expected an integer 'id' and a text",
        ),
        ('{"images": [], "annotations": [], "categories": [{"id": true, "name": "a"}]}', r"categories\[0\]: expected"),
        ('{"images": [], "annotations": [], "categories": [{"id": [1], "name": "a"}]}', r"categories\[0\]: expected"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": 1}]}', r"categories\[0\]: expected"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": "1", "name": "b"}]}',
            "categories: expected each id once, got 1 for 'a' and 'b'",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a"}, {"id": "1", "file_name": "b"}], "annotations": [], '
            '"categories": []}',
            "images: expected unique ids, got 1 more than once",
        ),
    ],
)
def test_file_in_another_format_is_an_error_of_one_short_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(DataError, match=message) as raised:
        read_coco(file)
    assert len(str(raised.value)) < 500
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("entry", "place", "reason"),
    [
        (3, "annotations[0] of x.json", "annotation is not an object (3)"),
        (None, "annotations[0] of x.json", "annotation is not an object (None)"),
        (annotation(image_id=[1]), "annotation 1 of image [1]", "image_id is not an integer ([1])"),
        (annotation(image_id=False), "annotation 1 of image False", "image_id is not an integer (False)"),
        (annotation(id="x\ny", image_id="z"), "annotation 'x\\ny' of image 'z'", "image_id is not an integer ('z')"),
    ],
)
def test_an_annotation_that_belongs_nowhere_is_a_skip(tmp_path: Path, entry: object, place: str, reason: str) -> None:
    coco = read(tmp_path, [entry, annotation()])
    assert coco.skipped == [(place, reason)]
    assert len(coco.objects[1]) == 1


def test_a_long_value_is_shortened_in_the_reason(tmp_path: Path) -> None:
    [(place, reason)] = read(tmp_path, [annotation(id="i" * 10**5, bbox=["9" * 1000] * 100)]).skipped
    assert len(place) < 400
    assert len(reason) < 400


@pytest.mark.parametrize("number", [[1], {"a": 1}, "x", None, -5, 1.5, True])
def test_the_id_of_an_annotation_needs_to_be_no_number(tmp_path: Path, number: object) -> None:
    assert only(tmp_path, id=number)[1] == []


@pytest.mark.parametrize(
    "segmentation",
    [None, [], {"counts": "x" * 100, "size": [10**9, 10**9]}, {"counts": [10**18], "size": [-1, 0]}, {"counts": None}],
)
def test_a_run_length_mask_of_any_size_leaves_the_box(tmp_path: Path, segmentation: object) -> None:
    found, problems = only(tmp_path, segmentation=segmentation)
    assert (found.outline, problems) == (None, [])


@pytest.mark.parametrize(
    "segmentation",
    [
        "x",
        7,
        [1, 2, 3, 4, 5, 6],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, 4, 5, float("nan")]],
        [[1, 2, 3, 4, 5, float("inf")]],
        [[1, 2, 3, 4, 5, 1e30]],
        [[1, 2, 3, 4, 5, 10**400]],
        [[1, 2, 3, 4, 5, "x"]],
        [[1, 2, 3, 4, 5, True]],
        [[1, 2, 3, 4, 5, None]],
        [[1, 2, 3, 4, 5, [6]]],
    ],
)
def test_an_unusable_outline_leaves_the_box_and_is_counted(tmp_path: Path, segmentation: object) -> None:
    found, [problem] = only(tmp_path, segmentation=segmentation)
    assert (found.outline, found.box) == (None, (1, 2, 30, 40))
    assert problem.startswith("segmentation ")


def test_numbers_of_an_outline_may_be_text(tmp_path: Path) -> None:
    found, problems = only(tmp_path, segmentation=[["1", 2, "3.5", 4, 5.0, "6"], [1, 2]])
    assert found.outline is not None
    np.testing.assert_array_equal(found.outline, [[1, 2], [3.5, 4], [5, 6]])
    assert len(problems) == 1  # the part of one point


def test_outlines_of_many_points_or_parts_take_little_time(tmp_path: Path) -> None:
    circle = np.arange(50_000) / 50_000 * 2 * np.pi
    parts = [np.stack([np.cos(circle), np.sin(circle)], 1).ravel() + shift for shift in (0, 5)]
    many = np.random.default_rng(0).uniform(0, 50, (1000, 100))
    started = time.perf_counter()
    coco = read(
        tmp_path, [annotation(segmentation=[part.tolist() for part in parts]), annotation(segmentation=many.tolist())]
    )
    assert time.perf_counter() - started < 5
    outlines = [found.outline for found in coco.objects[1]]
    assert [len(outline) for outline in outlines if outline is not None] == [100_000 + 2, 50_000 + 1000 + 999]


@pytest.mark.parametrize("count", [3, 40])
def test_parts_of_an_object_are_filled_and_what_is_between_is_not(tmp_path: Path, count: int) -> None:
    """A row of squares of 10 pixels: filled like a mask, the joined outline has them and lines between them only."""
    squares = [[x, 10, x + 10, 10, x + 10, 20, x, 20] for x in range(10, 20 * count, 20)]
    outline = only(tmp_path, segmentation=squares)[0].outline
    assert outline is not None
    mask = cv2.fillPoly(np.zeros((40, 20 * count + 40), np.uint8), [outline.astype(np.int32)], 1)
    for x in range(10, 20 * count, 20):
        assert mask[11:19, x + 1 : x + 9].all()
        assert mask[:, x + 11 : x + 19].sum() <= 2 * 9


@pytest.mark.parametrize("segmentation", [[[1, 2] * 8], [[1, 2, 3, 4, 5, 6]] * 2])
def test_an_outline_above_the_limit_leaves_the_box(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segmentation: list
) -> None:
    monkeypatch.setenv("YOLOV9_FAST_MAX_OUTLINE_POINTS", "7")
    found, [problem] = only(tmp_path, segmentation=segmentation)
    assert found.outline is None
    assert "too long" in problem
    assert "YOLOV9_FAST_MAX_OUTLINE_POINTS" in problem
