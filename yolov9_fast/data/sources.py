"""Sources of images to predict on: files, folders, globs, lists, videos, webcams and streams, as frames."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from yolov9_fast._lazy import require
from yolov9_fast._untrusted import absence, reason, shown, user_path
from yolov9_fast.data.addresses import is_address, without_password
from yolov9_fast.data.files import find_files, match_files
from yolov9_fast.data.images import IMAGE_SUFFIXES, Image, check_pixels, read_image
from yolov9_fast.data.listing import listed_path, read_lines
from yolov9_fast.errors import DataError

_log = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    {".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm"}
    | {".wmv"}
)
Source = str | int | os.PathLike[str]

_MEDIA_SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES
_LISTED_PROBLEMS = 10
_WEBCAM_DIGITS = 3
# Failed reads after which a video has ended: one that tells its number of frames, and one that does not.
_LONGEST_GAP, _LONGEST_GAP_OF_UNKNOWN = 10_000, 5
# Some files tell the resolution of their clock as the rate; their number of frames is as wrong.
_LARGEST_FPS = 240.0


@dataclass
class Frame:
    """One image of a source.

    `image`: uint8 BGR [H, W, 3], or None when it could not be read, for the reason in `error`; `path`: the file,
    address (without password) or webcam; `index`: number of the file in the source; `frame`: number within the file (0
    for an image); `fps`: frames per second of a video where known; `lost`: number of frames that an `error` stands for.
    """

    image: Image | None
    path: str
    index: int
    frame: int = 0
    is_video: bool = False
    fps: float | None = None
    error: str | None = None
    lost: int = 1


def open_source(source: Source | Iterable[Source]) -> Iterator[Frame]:
    """Frames of a source, read one at a time.

    `source`: an image or video file, a folder (without subfolders), a glob (`**` allowed), a `.txt` list of files,
    addresses and webcams, a webcam's number, a stream's address, or several of these.

    A file that cannot be read is a frame with an `error`; so are, at the end of a video, its frames that cannot be
    decoded, all together.

    Raises:
        DataError: at the call, if there is nothing to read, or a webcam or stream cannot be opened.
    """
    parts: Iterable[object] = (source,)
    if isinstance(source, Iterable) and not isinstance(source, str | bytes | os.PathLike):
        parts = source
    names = [_name(part) for part in parts]
    items = list(chain.from_iterable(map(_expand, names)))
    if not items:
        raise DataError(
            f"source: no image or video found in {shown([without_password(name) for name in names])}; "
            f"suffixes are {' '.join(sorted(_MEDIA_SUFFIXES))}"
        )
    opened = {index: _open_live(item) for index, item in enumerate(items) if _is_live(item)}
    return chain.from_iterable(_frames(item, index, opened.get(index)) for index, item in enumerate(items))


def _name(part: object) -> str:
    name = os.fspath(part) if isinstance(part, os.PathLike) else part
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise DataError(f"source: expected paths, addresses or numbers of webcams, got {type(name).__name__}")
    if name == "":
        raise DataError("source: expected a path, address or number of a webcam, got an empty text")
    return str(name)


def _expand(source: str) -> list[str]:
    if _is_live(source):
        return [source]
    path = user_path(source, "source")
    if os.path.isdir(path):
        found = find_files([path], _MEDIA_SUFFIXES, deep=False)
        if not found.folders:
            raise DataError(f"source: {path}: {found.problems[0][1]}")
    elif os.path.isfile(path):
        return _list_items(path) if path.suffix.lower() == ".txt" else [str(path)]
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


def _list_items(file: Path) -> list[str]:
    paths = {line: str(listed_path(line, file.parent)) for line in read_lines(file)}
    return [line if _is_live(line) and not os.path.exists(path) else path for line, path in paths.items()]


def _is_live(source: str) -> bool:
    return is_address(source) or is_webcam(source)


def is_webcam(source: object) -> bool:
    """Whether `source` is a webcam's number, not a file."""
    text = str(source) if isinstance(source, str | int) else ""
    return text.isdecimal() and len(text) <= _WEBCAM_DIGITS and not os.path.exists(text)


def _open_live(source: str) -> Any:
    kind = "webcam" if source.isdecimal() else "stream"
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # FFmpeg's own messages may hold the password.
    try:
        capture = _open_video(int(source) if source.isdecimal() else source)
    except UnicodeEncodeError:
        capture = None
    if capture is None or not capture.isOpened():
        raise DataError(f"source: {kind} {without_password(source)} cannot be opened")
    return capture


def _open_video(source: str | int) -> Any:
    """OpenCV's reader, which takes names that are not UTF-8 as bytes only."""
    return require("cv2").VideoCapture(source if isinstance(source, int) else os.fsencode(source))


def _frames(item: str, index: int, live: Any) -> Iterator[Frame]:
    if live is not None:
        yield from _video_frames(live, without_password(item), index)
    elif Path(item).suffix.lower() in VIDEO_SUFFIXES:
        if problem := _unreadable(item):
            yield Frame(None, item, index, is_video=True, error=f"{item}: video {problem}")
        else:
            # An absolute path: FFmpeg takes a name such as `http:clip.avi` for an address.
            yield from _video_frames(_open_video(os.path.abspath(item)), item, index)
    else:
        try:
            yield Frame(read_image(item), item, index)
        except DataError as error:
            yield Frame(None, item, index, error=str(error))


def _unreadable(file: str) -> str | None:
    if not os.path.isfile(file):
        return absence(file)
    try:
        open(file, "rb").close()
    except OSError as error:
        return f"cannot be read: {reason(error)}"
    return None


def _video_frames(capture: Any, item: str, index: int) -> Iterator[Frame]:
    """The frames that can be decoded, then one `Frame` that tells how many could not."""
    cv2 = require("cv2")
    read = number = gap = first_lost = 0
    try:
        height, width = (int(capture.get(side)) for side in (cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH))
        check_pixels(height, width, item)
        rate, announced = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        fps = float(rate) if 0 < rate <= _LARGEST_FPS else None
        total = int(announced) if 0 < announced < 2**53 and not rate > _LARGEST_FPS else 0
        longest_gap = _LONGEST_GAP if total else _LONGEST_GAP_OF_UNKNOWN
        while gap < longest_gap:
            good, image = _read(capture)
            if good:
                yield Frame(image, item, index, number, is_video=True, fps=fps)
                read, gap = read + 1, 0
            elif total and number >= total:
                break
            else:
                first_lost = first_lost if number > read else number
                gap += 1
            number += 1
    except DataError as error:
        yield Frame(None, item, index, is_video=True, error=str(error))
        return
    finally:
        capture.release()
    # The end of a video that does not tell its length looks like a gap.
    lost = max(number, total) - read if total else number - read - gap
    if not read:
        yield Frame(None, item, index, is_video=True, error=f"{item}: no frame can be decoded")
    elif lost:
        text = f"{item}: {lost} of {read + lost} frames cannot be decoded, the first is frame {first_lost}"
        yield Frame(None, item, index, first_lost, is_video=True, error=text, lost=lost)


def _read(capture: Any) -> tuple[bool, Any]:
    try:
        good, image = capture.read()
    except require("cv2").error:
        return False, None
    return good, image
