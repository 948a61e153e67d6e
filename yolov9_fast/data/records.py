"""The description of an image and its objects, and the report of what was skipped."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from yolov9_fast._text import printable
from yolov9_fast.data.geometry import Floats


@dataclass
class ImageRecord:
    """An image file and its objects.

    `boxes`: float32 [n, 5] rows (class, cx, cy, w, h), normalised to the image; `polygons`: per object None or float32
    [k, 2] normalised points, or None when no object has one; `width`, `height`: pixels of the decoded image, rotated by
    its EXIF tag; `file_name`: as in the COCO JSON, or relative to the dataset's root.
    """

    path: Path
    width: int
    height: int
    image_id: int
    boxes: Floats
    polygons: list[Floats | None] | None = None
    file_name: str = ""


@dataclass
class LabelReport:
    """Counts of a split: images used, objects, images without objects; skipped files and labels as (place, reason)."""

    images: int = 0
    objects: int = 0
    background: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def skip(self, place: str, reason: str) -> None:
        """Record one skipped image or label; `reason` may end in a detail in parentheses, which the counts ignore."""
        self.skipped.append((place, reason))

    def counts(self) -> dict[str, int]:
        """Number of skips by reason, most frequent first."""
        return dict(Counter(reason.split(" (")[0] for _, reason in self.skipped).most_common())

    def add(self, record: ImageRecord) -> None:
        """Count one usable image."""
        self.images += 1
        self.objects += len(record.boxes)
        self.background += len(record.boxes) == 0

    def short(self) -> str:
        """The counts on one line, with the first place skipped."""
        counts = [f"{count} skipped: {reason}" for reason, count in self.counts().items()]
        first = [f"the first is {printable(place, 300)}: {reason}" for place, reason in self.skipped[:1]]
        return "; ".join([*(note.strip() for note in self.notes), *counts, *first]) or "nothing was skipped"

    def summary(self, first: int = 10) -> str:
        """Readable text: totals, skips by reason, and the first places skipped."""
        lines = [f"{self.images} images, {self.objects} objects, {self.background} images without objects"]
        lines += map(printable, self.notes)
        lines += [f"  skipped {count}: {printable(reason)}" for reason, count in self.counts().items()]
        lines += [f"    {printable(place)}: {printable(reason)}" for place, reason in self.skipped[:first]]
        if len(self.skipped) > first:
            lines.append(f"    ... and {len(self.skipped) - first} more")
        return "\n".join(lines)
