"""YOLO label files: boxes, polygons, and the reason for each bad row."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolov9_fast.data.yolo import parse_yolo
from yolov9_fast.errors import DataError

GOOD = "1 0.5 0.5 0.25 0.125"


def test_box_row_is_kept_exactly() -> None:
    parsed = parse_yolo(GOOD, 3)
    assert parsed.boxes.tolist() == [[1, 0.5, 0.5, 0.25, 0.125]]
    assert parsed.polygons is None
    assert parsed.problems == []


def test_boxes_and_polygons_may_be_mixed_in_a_file() -> None:
    parsed = parse_yolo(f"0 0.1 0.2 0.5 0.2 0.3 0.6\n{GOOD}", 3)
    np.testing.assert_allclose(parsed.boxes, [[0, 0.3, 0.4, 0.4, 0.4], [1, 0.5, 0.5, 0.25, 0.125]], atol=1e-7)
    assert parsed.polygons is not None
    assert parsed.polygons[1] is None
    np.testing.assert_allclose(parsed.polygons[0], [[0.1, 0.2], [0.5, 0.2], [0.3, 0.6]])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("0 a 0.5 0.1 0.1", "not a number"),
        ("0 nan 0.5 0.1 0.1", "NaN"),
        ("0 inf 0.5 0.1 0.1", "NaN or infinite"),
        ("0 1.2 0.5 0.1 0.1", "outside the image"),
        ("0 -0.2 0.5 0.1 0.1", "outside the image"),
        ("3 0.5 0.5 0.1 0.1", r"class id out of range \(3, expected 0..2\)"),
        ("-1 0.5 0.5 0.1 0.1", "class id out of range"),
        ("0.5 0.5 0.5 0.1 0.1", "not an integer"),
        ("0 0.5 0.5 0 0.1", "without area"),
        ("0 0.5 0.5 0.1 -0.0005", "without area"),
        ("0 0.5 0.5 0.1", "neither a box nor a polygon"),
        ("0 0.5 0.5 0.1 0.1 0.9", "neither a box nor a polygon"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "neither a box nor a polygon"),
        ("0 0.1 0.1 0.1 0.2 0.1 0.3", "without area"),
        (GOOD, "duplicate"),
    ],
)
def test_bad_row_is_counted_and_the_others_are_read(row: str, reason: str) -> None:
    parsed = parse_yolo(f"{GOOD}\n\n{row}\n2 0.25 0.25 0.5 0.5", 3)
    assert parsed.boxes[:, 0].tolist() == [1, 2]
    [(number, text)] = parsed.problems
    assert number == 3
    assert re.search(reason, text)


def test_rounding_outside_the_border_is_clipped() -> None:
    parsed = parse_yolo("0 0.95 0.5 0.1005 1.0008", 1)
    assert parsed.problems == []
    _, cx, cy, width, height = parsed.boxes[0].astype(float)
    assert cx + width / 2 <= 1 + 1e-6
    assert height <= 1
    np.testing.assert_allclose([cx - width / 2, cy], [0.95 - 0.1005 / 2, 0.5], atol=1e-6)


@given(st.text(alphabet="0123456789.-+e naif\n\t", max_size=80))
def test_any_text_gives_boxes_inside_the_image(text: str) -> None:
    boxes = parse_yolo(text, 3).boxes
    assert np.isfinite(boxes).all()
    assert (boxes[:, 3:] > 0).all()
    assert set(boxes[:, 0]) <= {0, 1, 2}
    assert (boxes[:, 1:3] - boxes[:, 3:] / 2 >= -1e-5).all()
    assert (boxes[:, 1:3] + boxes[:, 3:] / 2 <= 1 + 1e-5).all()


@pytest.mark.parametrize("text", ["1 0.5 0.5 0.2_5 0.125", "1_0 0.5 0.5 0.1 0.1", "\u0661 0.5 0.5 0.1 0.1"])
def test_numbers_are_plain(text: str) -> None:
    assert [reason.split(" (")[0] for _, reason in parse_yolo(text, 20).problems] == ["not a number"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_rows_are_counted_whatever_ends_a_line(end: str) -> None:
    parsed = parse_yolo(end.join([GOOD, "", "x", "0 0.5 0.5\x0c0.1 0.1"]), 3)
    assert [row for row, _ in parsed.problems] == [3]
    assert len(parsed.boxes) == 2


def test_more_rows_than_the_limit_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLOV9_FAST_MAX_LABEL_ROWS", "2")
    assert len(parse_yolo(f"{GOOD}\n0 0.5 0.5 0.1 0.1", 3).boxes) == 2
    with pytest.raises(DataError, match=r"a\.txt: expected at most 2 rows, got 3"):
        parse_yolo(f"{GOOD}\n\n", 3, "a.txt")


@pytest.mark.parametrize("text", ["9" * 5000, "1" * 2**20 + " 0.5 0.5 0.1 0.1", "0 " * 2**20])
def test_long_rows_have_a_short_reason(text: str) -> None:
    [(_, reason)] = parse_yolo(text, 3).problems
    assert len(reason) < 200
