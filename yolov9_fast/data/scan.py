"""Decode every image of a split once, in parallel, and cache its size or problem until the file changes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolov9_fast._untrusted import read_json
from yolov9_fast.atomic import atomic_write
from yolov9_fast.data.cache import cache_folder, digest
from yolov9_fast.data.images import decoder, read_image
from yolov9_fast.errors import DataError, UserError
from yolov9_fast.limits import limit

_log = logging.getLogger(__name__)

MIN_PIXELS = 10
_VERSION = 2


@dataclass(frozen=True)
class Checked:
    """Size in pixels of an upright, decoded image, or the problem that makes it unusable."""

    width: int
    height: int
    problem: str | None = None


def check_images(paths: Sequence[Path], key: str) -> list[Checked]:
    """Decode each image, unless the cache of `key` has its size and the file's bytes and time are unchanged.

    An image with a problem is tried again: permissions and limits change without the file.
    """
    file = cache_folder() / "images" / f"{digest(key, _VERSION, decoder())}.json"
    known = _load(file)
    stamps = [_stamp(path) for path in paths]
    results = [_cached(known.get(str(path)), stamp) for path, stamp in zip(paths, stamps, strict=True)]
    unknown = [position for position, result in enumerate(results) if result is None]
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 16)) as pool:
        for position, result in zip(unknown, pool.map(lambda i: _check(paths[i]), unknown), strict=True):
            results[position] = result
    checked = [result for result in results if result is not None]
    if unknown:
        _store(file, paths, stamps, checked)
    return checked


def _check(path: Path) -> Checked:
    try:
        image = read_image(path)
    except DataError as error:
        return Checked(0, 0, str(error).removeprefix(f"{path}: "))
    height, width = image.shape[:2]
    if min(height, width) < MIN_PIXELS:
        return Checked(width, height, f"image is smaller than {MIN_PIXELS} pixels ({width}x{height})")
    return Checked(width, height)


def _stamp(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: a NUL byte
        return None
    return [status.st_size, status.st_mtime_ns]


def _cached(entry: Any, stamp: list[int] | None) -> Checked | None:
    if stamp is None or not isinstance(entry, list) or len(entry) != 4 or entry[:2] != stamp:
        return None
    width, height = entry[2:]
    known = isinstance(width, int) and isinstance(height, int) and width * height <= limit("IMAGE_PIXELS")
    return Checked(width, height) if known else None


def _load(file: Path) -> dict[str, Any]:
    try:
        images = read_json(file, "cache")
    except DataError:
        return {}
    return images if isinstance(images, dict) else {}


def _store(file: Path, paths: Sequence[Path], stamps: Sequence[list[int] | None], results: Sequence[Checked]) -> None:
    images = {
        str(path): [*stamp, result.width, result.height]
        for path, stamp, result in zip(paths, stamps, results, strict=True)
        if stamp is not None and result.problem is None
    }
    try:
        atomic_write(file, json.dumps(images, separators=(",", ":")))
    except UserError as error:
        _log.warning("the sizes of the images are not cached: %s", error)
