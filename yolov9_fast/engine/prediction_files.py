"""Files of predictions: annotated images and videos, label files, and one JSON file."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from yolov9_fast._lazy import require
from yolov9_fast.atomic import TemporaryFile, atomic_write
from yolov9_fast.data import Frame
from yolov9_fast.data.addresses import is_address, without_password
from yolov9_fast.engine.predictor import Prediction
from yolov9_fast.errors import UserError
from yolov9_fast.viz import draw_detections

_IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_DEFAULT_FPS = 25.0
_NAME_BYTES = 255
_SERIES = re.compile(r"(.+)_\d{6,}", re.DOTALL)


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
    _numbers: Counter[str] = field(default_factory=Counter)
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _video: _Video | None = None
    _failed_videos: set[Path] = field(default_factory=set)

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Write the files of one frame that has been read.

        Raises:
            UserError: a file cannot be written; the others are. A video that failed is not tried again.
        """
        stem = self._stem(frame)
        errors = []
        if self.images:
            try:
                self._write_picture(frame, prediction, stem)
            except UserError as error:
                errors.append(error)
        if self.text:
            name = f"{stem}_{frame.frame:06d}" if frame.is_video else stem
            try:
                atomic_write(self.folder / "labels" / f"{name}.txt", label_text(prediction, self.confidence))
            except UserError as error:
                errors.append(error)
        if self.json:
            self._rows.append({**prediction.as_dict(), "path": without_password(prediction.path)})
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Finish the last video and write the JSON file; raises `UserError` for one that cannot be written."""
        try:
            self._close_video()
        finally:
            if self.json:
                atomic_write(self.folder / "predictions.json", json.dumps(self._rows, indent=1))

    def _stem(self, frame: Frame) -> str:
        key = (frame.index, frame.path)
        if key not in self._stems:
            wanted = _plain_stem(frame.path)
            # The longest name of its files: a picture, or the text of a video's frame.
            longest = _NAME_BYTES - (len("_0000000000.txt") if frame.is_video else len(".jpeg"))
            name = _cut(wanted, longest)
            while not self._is_free(name.lower(), frame.is_video):
                self._numbers[wanted] += 1
                ending = f"-{self._numbers[wanted] + 1}"
                name = _cut(wanted, longest - len(ending)) + ending
            self._take(name.lower(), frame.is_video)
            self._stems[key] = name
        return self._stems[key]

    def _is_free(self, name: str, is_video: bool) -> bool:
        """Whether no file of another source has this name; a video `a` has all names `a_000000`."""
        series = _SERIES.fullmatch(name)
        if name in self._taken or (series is not None and f"{series[1]}_*" in self._taken):
            return False
        return not is_video or f"{name}_#" not in self._taken

    def _take(self, name: str, is_video: bool) -> None:
        series = _SERIES.fullmatch(name)
        self._taken.add(name)
        if series is not None:
            self._taken.add(f"{series[1]}_#")
        if is_video:
            self._taken.add(f"{name}_*")

    def _write_picture(self, frame: Frame, prediction: Prediction, stem: str) -> None:
        target = self.folder / f"{stem}.mp4"
        if frame.is_video and target in self._failed_videos:
            return
        assert frame.image is not None
        try:
            annotated = draw_detections(
                frame.image,
                prediction.boxes,
                prediction.names,
                line_width=self.line_width,
                hide_labels=self.hide_labels,
                hide_conf=self.hide_conf,
            )
        except ValueError as error:
            raise UserError(f"{stem}: the objects cannot be drawn: {error}") from error
        if not frame.is_video:
            self._write_image(Path(frame.path).suffix, stem, annotated)
            return
        if self._video is None or self._video.target != target:
            self._close_video()
            try:
                self._video = _Video(target, (frame.fps or _DEFAULT_FPS) / self.frame_step, annotated)
            except UserError:
                self._failed_videos.add(target)
                raise
        self._video.add(annotated)

    def _close_video(self) -> None:
        video, self._video = self._video, None
        if video is not None:
            video.close()

    def _write_image(self, suffix: str, stem: str, image: np.ndarray) -> None:
        cv2 = require("cv2")
        suffix = suffix if suffix.lower() in _IMAGE_SUFFIXES else ".png"
        try:
            encoded, data = cv2.imencode(suffix.lower(), image)
        except cv2.error:
            encoded = False
        if not encoded:
            raise UserError(f"{stem}{suffix}: the image cannot be encoded")
        atomic_write(self.folder / f"{stem}{suffix}", data.tobytes())


class _Video:
    """An .mp4 file, renamed to its final name when it is complete."""

    def __init__(self, target: Path, fps: float, first: np.ndarray) -> None:
        cv2 = require("cv2")
        self.target = target
        self._size = (first.shape[1], first.shape[0])
        self._count = 0
        try:
            self._temporary = TemporaryFile(target, ".mp4")
        except OSError as error:
            raise UserError(f"cannot write the video {target}: {error.strerror}") from error
        self._writer = cv2.VideoWriter(
            os.fsencode(self._temporary.path), cv2.VideoWriter_fourcc(*"mp4v"), fps, self._size
        )
        if not self._writer.isOpened():
            self._temporary.discard()
            raise UserError(
                f"cannot write the video {target}: OpenCV has no encoder for it, or the disk is full or read-only"
            )

    def add(self, image: np.ndarray) -> None:
        """Append a frame, resized to the first one's size."""
        if (image.shape[1], image.shape[0]) != self._size:
            image = require("cv2").resize(image, self._size)
        self._writer.write(image)
        self._count += 1

    def close(self) -> None:
        """Finish the file; raises `UserError` if it does not hold every frame: encoders do not report a full disk."""
        cv2 = require("cv2")
        self._writer.release()
        written = cv2.VideoCapture(os.fsencode(self._temporary.path))
        count = int(written.get(cv2.CAP_PROP_FRAME_COUNT))
        written.release()
        try:
            if count < self._count:
                raise OSError(None, f"only {max(count, 0)} of {self._count} frames could be written (disk full?)")
            self._temporary.commit()
        except OSError as error:
            self._temporary.discard()
            raise UserError(f"cannot write the video {self.target}: {error.strerror}") from error


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
    if is_address(path):
        host_and_path = re.sub(r"^[^:]*://|[?#].*", "", without_password(path))
        return re.sub(r"\W+", "_", re.sub(r":\d+(?=/|$)", "", host_and_path)).strip("_") or "stream"
    return f"webcam{path}" if path.isdecimal() else Path(path).stem or "image"


def _cut(name: str, size: int) -> str:
    """The beginning of a name, at most `size` bytes."""
    while len(os.fsencode(name)) > size:
        name = name[:-1]
    return name
