"""YOLO label files: each row is `class cx cy w h` or a polygon `class x1 y1 x2 y2 x3 y3 ...`, normalised."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from yolov9_fast.data.geometry import Floats
from yolov9_fast.errors import DataError
from yolov9_fast.limits import above_limit, limit

# Annotation tools round: coordinates up to this far outside the image are clipped, others are an error.
TOLERANCE = 1e-3


@dataclass
class ParsedLabels:
    """Objects of a file: boxes float32 [n, 5] and polygons as in `ImageRecord`; `problems`: (row number, reason)."""

    boxes: Floats
    polygons: list[Floats | None] | None
    problems: list[tuple[int, str]] = field(default_factory=list)


class _RowError(Exception):
    pass


def parse_yolo(text: str, num_classes: int, file: str = "labels") -> ParsedLabels:
    """Read the text of a label file; a bad row becomes a problem, the others are used.

    Raises `DataError`, which begins with `file`, if there are more than `limit("LABEL_ROWS")` rows.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    count = text.count("\n") + 1
    if count > limit("LABEL_ROWS"):
        raise DataError(f"{file}: {above_limit('LABEL_ROWS', count)}")
    boxes: list[list[float]] = []
    polygons: list[Floats | None] = []
    problems: list[tuple[int, str]] = []
    seen: set[tuple[float, ...]] = set()
    for number, line in enumerate(text.split("\n"), start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            box, polygon = _parse_row(fields, num_classes)
        except _RowError as error:
            problems.append((number, str(error)))
            continue
        if tuple(box) in seen:
            problems.append((number, "duplicate label"))
            continue
        seen.add(tuple(box))
        boxes.append(box)
        polygons.append(polygon)
    array = np.asarray(boxes, dtype=np.float32).reshape(-1, 5)
    return ParsedLabels(array, polygons if any(polygon is not None for polygon in polygons) else None, problems)


def box_from_corners(x1: float, y1: float, x2: float, y2: float) -> list[float]:
    """(cx, cy, w, h) of a box given by normalised corners, clipped to the image."""
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in (x1, y1, x2, y2))
    return [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]


def _parse_row(fields: list[str], num_classes: int) -> tuple[list[float], Floats | None]:
    try:
        values = [_number(text) for text in fields]
    except ValueError:
        raise _RowError(f"not a number ({' '.join(fields[:20])[:60]})") from None
    if not np.isfinite(values).all():
        raise _RowError("NaN or infinite number")
    is_box = len(values) == 5
    if not is_box and (len(values) < 7 or len(values) % 2 == 0):
        raise _RowError(f"row is neither a box nor a polygon ({len(values)} numbers; expected 5, or 7 and more, odd)")
    label, coordinates = values[0], values[1:]
    if label != int(label):
        raise _RowError(f"class id is not an integer ({label})")
    if not 0 <= label < num_classes:
        raise _RowError(f"class id out of range ({int(label)}, expected 0..{num_classes - 1})")
    if min(coordinates) < -TOLERANCE or max(coordinates) > 1 + TOLERANCE:
        raise _RowError("coordinate outside the image (expected 0..1)")
    if is_box:
        return [label, *_box(coordinates)], None
    points = np.clip(np.asarray(coordinates, dtype=np.float32).reshape(-1, 2), 0, 1)
    low, high = points.min(0), points.max(0)
    box = box_from_corners(float(low[0]), float(low[1]), float(high[0]), float(high[1]))
    _check_area(box)
    return [label, *box], points


def _number(text: str) -> float:
    # Python's float also takes 1_0 and the digits of other scripts.
    if not text.isascii() or "_" in text:
        raise ValueError(text)
    return float(text)


def _box(coordinates: list[float]) -> list[float]:
    cx, cy, width, height = coordinates
    _check_area(coordinates)
    corners = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
    inside = min(corners) >= 0 and max(corners) <= 1
    box = list(coordinates) if inside else box_from_corners(*corners)
    _check_area(box)
    return box


def _check_area(box: list[float]) -> None:
    if box[2] <= 0 or box[3] <= 0:
        raise _RowError("box without area")
