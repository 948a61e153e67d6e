"""Sources of images to predict on: files, folders, globs, lists, videos, webcams and streams, as frames."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from yolov9_fast._lazy import require
from yolov9_fast._untrusted import absence, user_path
from yolov9_fast.data.files import find_files, match_files
from yolov9_fast.data.images import IMAGE_SUFFIXES, Image, read_image
from yolov9_fast.data.listing import read_image_list
from yolov9_fast.errors import DataError

_log = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset({".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"})

_MEDIA_SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES
_LISTED_PROBLEMS = 10
_WEBCAM_DIGITS = 3
_STREAM_SCHEMES = ("rtsp://", "rtmp://", "http://", "https://", "tcp://", "udp://")


@dataclass
class Frame:
    """One image of a source.

    `image`: uint8 BGR [H, W, 3], or None when it could not be read, for the reason in `error`; `path`: the file,
    address or webcam; `index`: number of the file in the source; `frame`: number within the file (0 for an image);
    `fps`: frames per second of a video where known.
    """

    image: Image | None
    path: str
    index: int
    frame: int = 0
    is_video: bool = False
    fps: float | None = None
    error: str | None = None


def open_source(source: str | Path | Sequence[str | Path]) -> Iterator[Frame]:
    """Frames of a source, read one at a time.

    `source`: an image or video file, a folder (without subfolders), a glob (`**` allowed), a `.txt` list, a webcam's
    number, a stream's address, or a sequence of these. Raises `DataError` at the call if there is nothing to read or a
    webcam or stream cannot be opened; a file that cannot be read is a frame with an `error`.
    """
    parts = [source] if isinstance(source, str | Path) else list(source)
    items = list(chain.from_iterable(_expand(str(part)) for part in parts))
    if not items:
        raise DataError(
            f"source: no image or video found in {', '.join(map(str, parts)) or 'an empty sequence'}; "
            f"suffixes are {' '.join(sorted(_MEDIA_SUFFIXES))}"
        )
    opened = {item: _open_live(item) for item in items if _is_live(item)}
    return chain.from_iterable(_frames(item, index, opened.get(item)) for index, item in enumerate(items))


def _expand(source: str) -> list[str]:
    if _is_live(source):
        return [source]
    path = user_path(source, "source")
    if os.path.isdir(path):
        found = find_files([path], _MEDIA_SUFFIXES, deep=False)
        if not found.folders:
            raise DataError(f"source: {path}: {found.problems[0][1]}")
    elif os.path.isfile(path):
        return [str(file) for file in read_image_list(path)] if path.suffix.lower() == ".txt" else [str(path)]
    elif glob.has_magic(source):
        found = match_files(path, _MEDIA_SUFFIXES)
    else:
        raise DataError(f"source: {source} {absence(path)}")
    if ignored := found.ignored():
        _log.info("%s: not images or videos, ignored: %s", source, ignored)
    for place, problem in found.problems[:_LISTED_PROBLEMS]:
        _log.warning("%s: skipped: %s", place, problem)
    if len(found.problems) > _LISTED_PROBLEMS:
        _log.warning("%s: skipped: %d more", source, len(found.problems) - _LISTED_PROBLEMS)
    return [str(file) for file in found.files]


def _is_live(source: str) -> bool:
    is_number = source.isdecimal() and len(source) <= _WEBCAM_DIGITS
    return source.lower().startswith(_STREAM_SCHEMES) or (is_number and not os.path.exists(source))


def _open_live(source: str) -> Any:
    capture = require("cv2").VideoCapture(int(source) if source.isdecimal() else source)
    if not capture.isOpened():
        kind = "webcam" if source.isdecimal() else "stream"
        raise DataError(f"source: {kind} {source} cannot be opened")
    return capture


def _frames(item: str, index: int, live: Any) -> Iterator[Frame]:
    if live is not None:
        yield from _video_frames(live, item, index)
    elif Path(item).suffix.lower() in VIDEO_SUFFIXES:
        yield from _video_frames(require("cv2").VideoCapture(item), item, index)
    else:
        try:
            yield Frame(read_image(item), item, index)
        except DataError as error:
            yield Frame(None, item, index, error=str(error))


def _video_frames(capture: Any, item: str, index: int) -> Iterator[Frame]:
    try:
        fps = float(capture.get(require("cv2").CAP_PROP_FPS)) or None
        number = 0
        while True:
            good, image = capture.read()
            if not good:
                break
            yield Frame(image, item, index, number, is_video=True, fps=fps)
            number += 1
        if number == 0:
            yield Frame(None, item, index, is_video=True, error=f"{item}: no frame can be decoded")
    finally:
        capture.release()
