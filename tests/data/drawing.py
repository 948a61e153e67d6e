"""Small labelled images drawn for the tests: one coloured rectangle per object on black, with YOLO txt labels."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

COLOURS = {0: (0, 0, 255), 1: (0, 255, 0), 2: (255, 0, 0)}
"""BGR of each class."""


def paint(height: int, width: int, objects: list[tuple[int, int, int, int, int]], background: int = 0) -> np.ndarray:
    """uint8 BGR [height, width, 3]; objects are (class, x1, y1, x2, y2) in integer pixels."""
    image = np.full((height, width, 3), background, np.uint8)
    for label, x1, y1, x2, y2 in objects:
        image[y1:y2, x1:x2] = COLOURS[label]
    return image


def rows(height: int, width: int, objects: list[tuple[int, int, int, int, int]]) -> list[list[float]]:
    """YOLO rows (class, cx, cy, w, h)."""
    return [
        [label, (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
        for label, x1, y1, x2, y2 in objects
    ]


def add_image(root: Path, name: str, image: np.ndarray, text: str | None, split: str = "train") -> Path:
    """Write images/SPLIT/NAME and labels/SPLIT/STEM.txt (none for text None); returns the image's path."""
    file = root / "images" / split / name
    file.parent.mkdir(parents=True, exist_ok=True)
    (root / "labels" / split).mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(file), image)
    if text is not None:
        (root / "labels" / split / name).with_suffix(".txt").write_text(text)
    return file


def write_config(root: Path, **content: object) -> Path:
    """data.yaml with names a, b, c and a train folder, changed by `content`; JSON is YAML too."""
    file = root / "data.yaml"
    file.write_text(json.dumps({"names": ["a", "b", "c"], "train": "images/train", **content}))
    return file


def box_of_colour(image: np.ndarray, label: int) -> tuple[float, float, float, float] | None:
    """x1, y1, x2, y2 of the pixels nearer to the class's colour than to black, grey or the other colours; BGR image."""
    others = [COLOURS[key] for key in COLOURS if key != label] + [(0, 0, 0), (114, 114, 114), (255, 255, 255)]
    palette = np.array([COLOURS[label], *others], np.int32)
    distance = np.abs(image[:, :, None].astype(np.int32) - palette).sum(-1)
    y, x = np.nonzero(distance.argmin(-1) == 0)
    return (x.min(), y.min(), x.max() + 1, y.max() + 1) if len(x) else None


def dataset_folder(root: Path, count: int = 12, split: str = "train") -> Path:
    """`count` images of different sizes with one to three rectangles; returns the data file."""
    rng = np.random.default_rng(7)
    for number in range(count):
        height, width = (int(side) for side in rng.integers(60, 120, 2))
        objects = []
        for label in range(1 + number % 3):
            x, y = (int(value) for value in rng.integers(0, 30, 2))
            objects.append((label, x, y, x + int(rng.integers(8, 28)), y + int(rng.integers(8, 28))))
        text = "\n".join(" ".join(map(str, row)) for row in rows(height, width, objects))
        add_image(root, f"p{number:03d}.png", paint(height, width, objects), text, split)
    return write_config(root)
