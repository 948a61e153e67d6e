"""Files of predictions: annotated images and videos, label files, and one JSON file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from yolov9_fast._lazy import require
from yolov9_fast.atomic import TemporaryFile, atomic_write
from yolov9_fast.data import Frame
from yolov9_fast.engine.predictor import Prediction
from yolov9_fast.errors import UserError
from yolov9_fast.viz import draw_detections

_IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_DEFAULT_FPS = 25.0


@dataclass
class PredictionFiles:
    """Writes predictions to `folder`; `close` finishes videos and the JSON file.

    Images keep their file's name. If two sources have the same stem, -2, -3, … is added to the later one's files.

    Args:
        folder: created by the first file.
        images: write annotated images, and videos as .mp4.
        text: write `labels/STEM.txt`, rows `class cx cy w h` normalised; of a video one file per frame,
            `STEM_000000.txt`.
        confidence: add the score to each row of the text.
        json: write `predictions.json`.
        frame_step: videos get only every n-th frame, and play at 1/n of their rate.
    """

    folder: Path
    images: bool = True
    text: bool = False
    confidence: bool = False
    json: bool = False
    line_width: int | None = None
    hide_labels: bool = False
    hide_conf: bool = False
    frame_step: int = 1
    _stems: dict[tuple[int, str], str] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _video: _Video | None = None

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Write one frame that has been read; raises `UserError` if a file cannot be written."""
        stem = self._stem(frame)
        if self.images:
            assert frame.image is not None
            annotated = draw_detections(
                frame.image,
                prediction.boxes,
                prediction.names,
                line_width=self.line_width,
                hide_labels=self.hide_labels,
                hide_conf=self.hide_conf,
            )
            if frame.is_video:
                self._write_frame(frame, stem, annotated)
            else:
                self._write_image(Path(frame.path).suffix, stem, annotated)
        if self.text:
            name = f"{stem}_{frame.frame:06d}" if frame.is_video else stem
            atomic_write(self.folder / "labels" / f"{name}.txt", label_text(prediction, self.confidence))
        if self.json:
            self._rows.append({**prediction.as_dict(), "path": _without_password(prediction.path)})

    def close(self) -> None:
        """Finish the last video and write the JSON file."""
        if self._video is not None:
            self._video.close()
            self._video = None
        if self.json:
            atomic_write(self.folder / "predictions.json", json.dumps(self._rows, indent=1))

    def _stem(self, frame: Frame) -> str:
        key = (frame.index, frame.path)
        if key not in self._stems:
            wanted = _plain_stem(frame.path)
            name, number = wanted, 1
            while name.lower() in self._taken:
                number += 1
                name = f"{wanted}-{number}"
            self._taken.add(name.lower())
            self._stems[key] = name
        return self._stems[key]

    def _write_image(self, suffix: str, stem: str, image: np.ndarray) -> None:
        suffix = suffix if suffix.lower() in _IMAGE_SUFFIXES else ".png"
        encoded, data = require("cv2").imencode(suffix.lower(), image)
        if not encoded:
            raise UserError(f"{stem}{suffix}: the image cannot be encoded")
        atomic_write(self.folder / f"{stem}{suffix}", data.tobytes())

    def _write_frame(self, frame: Frame, stem: str, image: np.ndarray) -> None:
        target = self.folder / f"{stem}.mp4"
        if self._video is None or self._video.target != target:
            if self._video is not None:
                self._video.close()
            self._video = _Video(target, (frame.fps or _DEFAULT_FPS) / self.frame_step, image)
        self._video.add(image)


class _Video:
    """An .mp4 file, renamed to its final name when it is complete."""

    def __init__(self, target: Path, fps: float, first: np.ndarray) -> None:
        cv2 = require("cv2")
        self.target = target
        self._size = (first.shape[1], first.shape[0])
        try:
            self._temporary = TemporaryFile(target, ".mp4")
        except OSError as error:
            raise UserError(f"cannot write the video {target}: {error.strerror}") from error
        self._writer = cv2.VideoWriter(str(self._temporary.path), cv2.VideoWriter_fourcc(*"mp4v"), fps, self._size)
        if not self._writer.isOpened():
            self._temporary.discard()
            raise UserError(
                f"cannot write the video {target}: OpenCV has no encoder for it, or the disk is full or read-only"
            )

    def add(self, image: np.ndarray) -> None:
        if (image.shape[1], image.shape[0]) != self._size:
            image = require("cv2").resize(image, self._size)
        self._writer.write(image)

    def close(self) -> None:
        self._writer.release()
        self._temporary.commit()


def label_text(prediction: Prediction, confidence: bool) -> str:
    """Rows `class cx cy w h [score]`: centre and size normalised by the image's width and height."""
    height, width = prediction.shape
    lines = []
    for x1, y1, x2, y2, score, label in prediction.boxes.tolist():
        numbers = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
        numbers += [score] if confidence else []
        lines.append(" ".join([str(int(label)), *(f"{number:.6f}" for number in numbers)]))
    return "".join(line + "\n" for line in lines)


def _plain_stem(path: str) -> str:
    if "://" in path:
        parts = urlsplit(path)
        return re.sub(r"\W+", "_", f"{parts.hostname or 'stream'}{parts.path}").strip("_")
    return f"webcam{path}" if path.isdecimal() else Path(path).stem


def _without_password(path: str) -> str:
    """A stream's address without user and password."""
    return re.sub(r"(?<=://)[^/@]*@", "", path)
