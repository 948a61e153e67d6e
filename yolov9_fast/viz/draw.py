"""Boxes with class names, drawn into images by OpenCV."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from yolov9_fast._lazy import require
from yolov9_fast._text import printable
from yolov9_fast.viz.color import class_color, text_color

Names = Mapping[int, str] | Sequence[str]

log = logging.getLogger(__name__)

_MOSAIC_SIDE = 1920
_LONGEST_NAME = 60
_GAP = 4
_GAP_COLOR = 255


def draw_detections(
    image: np.ndarray,
    boxes: np.ndarray,
    names: Names,
    *,
    line_width: int | None = None,
    hide_labels: bool = False,
    hide_conf: bool = False,
) -> np.ndarray:
    """Return a copy of `image` with its detections, as uint8 BGR [H, W, 3].

    `image`: uint8, BGR [H, W, 3], BGRA [H, W, 4] or grey [H, W] or [H, W, 1]. `boxes` [n, 6]: x1, y1, x2, y2 in
    pixels of the image, score, class index; boxes are clipped to the image. `names`: class index → name.
    `line_width` in pixels, by default from the image's size. Higher scores are drawn over lower ones. Raises
    `ValueError` for other shapes or types and for boxes that are not finite.
    """
    canvas = _as_bgr(image)
    rows = np.asarray(boxes, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != 6:
        raise ValueError(f"boxes: expected shape [n, 6], got {list(rows.shape)}")
    if not np.isfinite(rows).all():
        raise ValueError("boxes: expected finite numbers, got NaN or infinity")
    width = line_width if line_width is not None else default_line_width(canvas.shape[0], canvas.shape[1])
    if width < 1:
        raise ValueError(f"line_width: expected at least 1 pixel, got {line_width}")
    marks = []
    for row in rows[np.argsort(rows[:, 4], kind="stable")]:
        name = class_name(names, int(row[5]))
        text = name if hide_conf else f"{name} {row[4]:.2f}"
        marks.append(_Mark(row[:4], class_color(int(row[5])), "" if hide_labels else text))
    _draw_marks(canvas, marks, width)
    return canvas


def draw_targets(images: Tensor, targets: Tensor, names: Names, *, max_images: int = 16) -> np.ndarray:
    """Return a grid of the first images of a batch with their ground truth, as one uint8 BGR image [H, W, 3].

    `images`: uint8 RGB [B, 3, H, W]. `targets` [n, 6]: image index, class, x, y, w, h (centre form, normalised).
    Raises `ValueError` for other shapes or types.
    """
    cv2 = require("cv2")
    if images.ndim != 4 or images.shape[1] != 3 or not images.shape[0] or images.dtype.itemsize != 1:
        raise ValueError(f"images: expected uint8 [B, 3, H, W] with B > 0, got {images.dtype} {list(images.shape)}")
    if targets.ndim != 2 or targets.shape[1] != 6:
        raise ValueError(f"targets: expected shape [n, 6], got {list(targets.shape)}")
    if max_images < 1:
        raise ValueError(f"max_images: expected at least 1, got {max_images}")
    count = min(len(images), max_images)
    rows = targets.detach().cpu().double().numpy()
    height, width = images.shape[2], images.shape[3]
    columns = math.ceil(math.sqrt(count))
    scale = min(1.0, _MOSAIC_SIDE / columns / max(height, width))
    tile_h, tile_w = max(1, round(height * scale)), max(1, round(width * scale))
    lines = math.ceil(count / columns)
    mosaic = np.full((lines * (tile_h + _GAP) + _GAP, columns * (tile_w + _GAP) + _GAP, 3), _GAP_COLOR, dtype=np.uint8)
    for i in range(count):
        tile = np.ascontiguousarray(images[i].cpu().permute(1, 2, 0).numpy()[:, :, ::-1])
        if scale < 1.0:
            tile = cv2.resize(tile, (tile_w, tile_h), interpolation=cv2.INTER_AREA)
        size = np.array([tile_w, tile_h, tile_w, tile_h])
        marks = [
            _Mark(
                np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]) * size,
                class_color(int(c)),
                class_name(names, int(c)),
            )
            for _, c, x, y, w, h in rows[rows[:, 0] == i]
        ]
        _draw_marks(tile, marks, default_line_width(tile_h, tile_w))
        top, left = _GAP + i // columns * (tile_h + _GAP), _GAP + i % columns * (tile_w + _GAP)
        mosaic[top : top + tile_h, left : left + tile_w] = tile
    return mosaic


def class_name(names: Names, index: int) -> str:
    """The name of a class index on one short line, or the index itself where `names` has none."""
    if isinstance(names, Mapping):
        return printable(names.get(index, index), _LONGEST_NAME)
    return printable(names[index], _LONGEST_NAME) if 0 <= index < len(names) else str(index)


def default_line_width(height: int, width: int) -> int:
    """Line width in pixels for an image's size: 1 up to 500 pixels, 2 at 640, 4 at 1600."""
    return max(1, round((height + width) / 2 * 0.0027))


def _as_bgr(image: np.ndarray) -> np.ndarray:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        raise ValueError(f"image: expected a uint8 array, got {getattr(image, 'dtype', type(image).__name__)}")
    grey = image[:, :, None] if image.ndim == 2 else image
    if grey.ndim != 3 or grey.shape[2] not in (1, 3, 4) or not grey.size:
        raise ValueError(f"image: expected [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], got {list(image.shape)}")
    bgr = np.repeat(grey, 3, axis=2) if grey.shape[2] == 1 else grey[:, :, :3]
    return np.array(bgr, order="C")


class _Mark(NamedTuple):
    corners: np.ndarray  # x1, y1, x2, y2 in pixels
    rgb: tuple[int, int, int]
    text: str


def _draw_marks(canvas: np.ndarray, marks: list[_Mark], width: int) -> None:
    """Draw all boxes, then all labels, so that no line crosses a label; later marks cover earlier ones."""
    cv2 = require("cv2")
    height, breadth = canvas.shape[:2]
    limits = np.array([breadth - 1, height - 1, breadth - 1, height - 1])
    placed = [np.clip(np.rint(mark.corners), 0, limits).astype(int).tolist() for mark in marks]
    for mark, (x1, y1, x2, y2) in zip(marks, placed, strict=True):
        cv2.rectangle(canvas, (x1, y1), (x2, y2), mark.rgb[::-1], thickness=width, lineType=cv2.LINE_8)
    for mark, (x1, y1, _, _) in zip(marks, placed, strict=True):
        if mark.text:
            _draw_label(canvas, x1, y1, mark.rgb, mark.text, width)


def _draw_label(canvas: np.ndarray, x: int, top: int, rgb: tuple[int, int, int], text: str, width: int) -> None:
    """Draw the label above the box, or inside its upper edge if there is no space above; all of it is visible."""
    cv2 = require("cv2")
    height, breadth = canvas.shape[:2]
    if not text.isascii():
        _warn_of_old_opencv(cv2.__version__)
    font, thickness, pad = cv2.FONT_HERSHEY_SIMPLEX, max(1, width - 1), 1 + width
    scale = 0.32 + 0.08 * width
    (text_w, text_h), below = cv2.getTextSize(text, font, scale, thickness)
    space = breadth / (text_w + 2 * pad), height / (text_h + below + 2 * pad)
    if min(space) < 1.0:  # the label is larger than the image: shrink it, and omit it where it could not be read
        scale *= min(space)
        if scale < 0.2:
            return
        (text_w, text_h), below = cv2.getTextSize(text, font, scale, thickness)
    label_w, label_h = text_w + 2 * pad, text_h + below + 2 * pad
    left = max(0, min(x, breadth - label_w))
    upper = top - label_h if top >= label_h else top
    upper = max(0, min(upper, height - label_h))
    cv2.rectangle(canvas, (left, upper), (left + label_w - 1, upper + label_h - 1), rgb[::-1], thickness=cv2.FILLED)
    origin = (left + pad, upper + pad + text_h)
    cv2.putText(canvas, text, origin, font, scale, text_color(rgb), thickness, cv2.LINE_AA)


@functools.cache
def _warn_of_old_opencv(version: str) -> None:
    if int(version.split(".")[0]) < 5:
        log.warning(f"OpenCV {version} draws only ASCII names into images; `pip install -U opencv-python-headless`")
