"""A small synthetic data set: coloured, rotated, overlapping shapes on varied backgrounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from yolov9_fast._lazy import require
from yolov9_fast.atomic import atomic_write
from yolov9_fast.data.images import Image
from yolov9_fast.data.yolo import box_from_corners

SHAPES = ("disc", "square", "triangle", "star", "ring")
MOST_OBJECTS = 5
LEAST_VISIBLE = 0.7
_TRIES = 20
_SUBPIXEL = 4  # bits after the point in OpenCV's drawing coordinates


@dataclass(frozen=True)
class RenderedImage:
    """`image`: uint8 BGR [H, W, 3]; `labels`: float32 [n, 5] rows (class, cx, cy, w, h), normalised."""

    image: Image
    labels: NDArray[np.float32]


def render_dataset(folder: str | Path, *, train: int, val: int, size: int, seed: int = 0) -> Path:
    """Write `images/SPLIT/*.jpg`, `labels/SPLIT/*.txt` and `data.yaml` into `folder`; returns the data file.

    Args:
        train, val: number of images.
        size: longer side in pixels; the shorter varies from 3/4 of it.
        seed: the same seed gives the same files, however many images are asked for.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    cv2 = require("cv2")
    for split, (name, count) in enumerate((("train", train), ("val", val))):
        for number in range(count):
            rendered = render_image(np.random.default_rng([seed, split, number]), size)
            _, data = cv2.imencode(".jpg", rendered.image, [cv2.IMWRITE_JPEG_QUALITY, 92])
            atomic_write(folder / "images" / name / f"{number:04d}.jpg", data.tobytes())
            rows = "".join(f"{int(row[0])} " + " ".join(f"{v:.6f}" for v in row[1:]) + "\n" for row in rendered.labels)
            atomic_write(folder / "labels" / name / f"{number:04d}.txt", rows)
    names = "".join(f"  {index}: {name}\n" for index, name in enumerate(SHAPES))
    return atomic_write(folder / "data.yaml", f"train: images/train\nval: images/val\nnames:\n{names}")


def render_image(rng: Generator, size: int) -> RenderedImage:
    """An image with 1 to 5 shapes, each at least 70 % visible; all random numbers come from `rng`."""
    short = int(size * rng.uniform(0.75, 1.0))
    height, width = (size, short) if rng.random() < 0.5 else (short, size)
    canvas = _background(rng, height, width)
    owner = np.zeros((height, width), np.uint8)
    areas: list[int] = []
    labels: list[list[float]] = []
    for _ in range(int(rng.integers(1, MOST_OBJECTS + 1))):
        for _ in range(_TRIES):
            label = int(rng.integers(len(SHAPES)))
            mask = _shape_mask(rng, label, height, width)
            inside = mask > 127
            if inside.any() and _leaves_others_visible(owner, areas, inside):
                break
        else:
            continue
        canvas = _paint(rng, canvas, mask)
        areas.append(int(inside.sum()))
        owner[inside] = len(areas)
        rows, columns = np.nonzero(inside)
        edges = (columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height)
        labels.append([label, *box_from_corners(*map(float, edges))])
    return RenderedImage(canvas, np.asarray(labels, np.float32).reshape(-1, 5))


def _leaves_others_visible(owner: Image, areas: list[int], inside: NDArray[np.bool_]) -> bool:
    visible = np.bincount(owner[~inside].ravel(), minlength=len(areas) + 1)
    return all(visible[index] >= LEAST_VISIBLE * area for index, area in enumerate(areas, start=1))


def _shape_mask(rng: Generator, label: int, height: int, width: int) -> Image:
    """A shape as uint8 [H, W], 0..255 with smooth edges; it does not touch the image's border."""
    cv2 = require("cv2")
    radius = float(rng.uniform(0.15, 0.29) * min(height, width))
    reach = radius + 2  # smooth edges are wider than the shape
    x, y = rng.uniform(reach, width - reach), rng.uniform(reach, height - reach)
    outline = np.stack(_OUTLINES[SHAPES[label]](), axis=1) * radius
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    squeeze = np.array([1.0, rng.uniform(0.75, 1.0)])
    points = (outline * squeeze) @ turn.T + (x, y)
    mask = np.zeros((height, width), np.uint8)
    _fill(cv2, mask, points, 255)
    if SHAPES[label] == "ring":
        _fill(cv2, mask, (points - (x, y)) * rng.uniform(0.5, 0.65) + (x, y), 0)
    return mask


def _fill(cv2: object, mask: Image, points: NDArray[np.float64], value: int) -> None:
    fixed = np.rint(points * (1 << _SUBPIXEL)).astype(np.int32)
    cv2.fillPoly(mask, [fixed], value, lineType=cv2.LINE_AA, shift=_SUBPIXEL)  # type: ignore[attr-defined]


def _regular(corners: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    angles = np.arange(corners) * 2 * np.pi / corners
    return np.cos(angles), np.sin(angles)


def _star() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = _regular(10)
    reach = np.where(np.arange(10) % 2, 0.42, 1.0)
    return x * reach, y * reach


_OUTLINES: dict[str, Callable[[], tuple[NDArray[np.float64], NDArray[np.float64]]]] = {
    "disc": lambda: _regular(48),
    "square": lambda: _regular(4),
    "triangle": lambda: _regular(3),
    "star": _star,
    "ring": lambda: _regular(48),
}


def _paint(rng: Generator, canvas: Image, mask: Image) -> Image:
    """Fill `mask` with a colour that differs from the background, plain or shaded."""
    height, width = mask.shape
    below = canvas[mask > 127].mean(0)
    colour = rng.uniform(0, 255, 3)
    while np.abs(colour - below).max() < 90:
        colour = rng.uniform(0, 255, 3)
    fill = np.broadcast_to(colour, canvas.shape)
    if rng.random() < 0.5:
        fill = fill * (0.75 + 0.5 * _ramp(rng, height, width))[..., None]
    alpha = mask[..., None] / 255.0
    return np.clip(canvas * (1 - alpha) + fill * alpha, 0, 255).astype(np.uint8)


def _ramp(rng: Generator, height: int, width: int) -> NDArray[np.float64]:
    """[H, W], ascending from 0 to 1 in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:height, 0:width]
    ramp: NDArray[np.float64] = x * np.cos(angle) + y * np.sin(angle)
    ramp = (ramp - ramp.min()) / max(float(np.ptp(ramp)), 1e-9)
    return ramp


def _background(rng: Generator, height: int, width: int) -> Image:
    first, second = rng.uniform(20, 235, (2, 3))
    share = _PATTERNS[int(rng.integers(len(_PATTERNS)))](rng, height, width)[..., None]
    grain = rng.normal(0, rng.uniform(0, 8), (height, width, 1))
    image: Image = np.clip(first * (1 - share) + second * share + grain, 0, 255).astype(np.uint8)
    return image


def _noise(rng: Generator, height: int, width: int) -> NDArray[np.float64]:
    return rng.random((height, width))


def _clouds(rng: Generator, height: int, width: int) -> NDArray[np.float64]:
    """Smooth blobs: enlarged coarse noise."""
    cv2 = require("cv2")
    coarse = rng.random((int(rng.integers(3, 9)), int(rng.integers(3, 9))))
    blobs: NDArray[np.float64] = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(blobs, 0, 1)


def _stripes(rng: Generator, height: int, width: int) -> NDArray[np.float64]:
    wave: NDArray[np.float64] = np.sin(_ramp(rng, height, width) * rng.uniform(10, 60))
    return 0.5 + 0.5 * wave


def _checks(rng: Generator, height: int, width: int) -> NDArray[np.float64]:
    cell = int(rng.integers(6, 24))
    y, x = np.mgrid[0:height, 0:width]
    parity: NDArray[np.float64] = ((x // cell + y // cell) % 2).astype(np.float64)
    return parity


_PATTERNS = (_ramp, _noise, _clouds, _stripes, _checks)
