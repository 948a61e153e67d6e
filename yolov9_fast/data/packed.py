"""Records in a few flat arrays, which forked workers share; reading Python objects would copy their memory pages."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from yolov9_fast.data.geometry import Floats
from yolov9_fast.data.records import ImageRecord


class PackedRecords:
    """Paths, sizes, boxes and polygons of all records, by index."""

    def __init__(self, records: Sequence[ImageRecord]) -> None:
        names = [os.fsencode(record.path) for record in records]
        self._names = np.frombuffer(b"".join(names), dtype=np.uint8)
        self._name_ends = np.cumsum([0, *map(len, names)])
        self.sizes = np.array([(record.height, record.width) for record in records], dtype=np.int32).reshape(-1, 2)
        self._boxes = np.concatenate([np.zeros((0, 5), np.float32), *(record.boxes for record in records)])
        self._box_ends = np.cumsum([0, *(len(record.boxes) for record in records)])
        polygons = [polygon for record in records for polygon in (record.polygons or [None] * len(record.boxes))]
        points = [np.zeros((0, 2), np.float32), *(polygon for polygon in polygons if polygon is not None)]
        self._points = np.concatenate(points).astype(np.float32)
        self._point_ends = np.cumsum([0, *(0 if polygon is None else len(polygon) for polygon in polygons)])

    def __len__(self) -> int:
        return len(self.sizes)

    def path(self, index: int) -> Path:
        start, end = self._name_ends[index : index + 2]
        return Path(os.fsdecode(self._names[start:end].tobytes()))

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels."""
        height, width = self.sizes[index]
        return int(height), int(width)

    def boxes(self, index: int) -> Floats:
        """float32 [n, 5] (class, cx, cy, w, h) normalised."""
        return self._boxes[self._box_ends[index] : self._box_ends[index + 1]]

    def polygons(self, index: int) -> list[Floats | None]:
        """Per object its normalised polygon [k, 2] or None; empty when no object of the image has one."""
        first, last = self._box_ends[index : index + 2]
        ends = self._point_ends[first : last + 1]
        if ends[0] == ends[-1]:
            return []
        return [self._points[a:b] if b > a else None for a, b in itertools.pairwise(ends)]
