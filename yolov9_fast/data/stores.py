"""Cached images: decoded and resized once, then read from memory or from disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from yolov9_fast.atomic import atomic_write
from yolov9_fast.data.cache import cache_folder, digest
from yolov9_fast.data.images import Image, decoder, scaled_size
from yolov9_fast.errors import UserError

_log = logging.getLogger(__name__)

# Largest share of the free memory for cached images.
_MEMORY_SHARE = 0.8


class ImageStore(Protocol):
    """`get(index)` returns the resized image of a record: uint8 BGR [h, w, 3], read-only."""

    def get(self, index: int) -> Image: ...


class NoStore:
    """No cache: decodes at every call."""

    def __init__(self, load: Callable[[int], Image]) -> None:
        self.get = load


class MemoryStore:
    """All images in one array, which threads fill at construction and forked workers share.

    `pixels`: uint8 [n]; the image of a record begins at its place in `offsets`, int64.
    """

    def __init__(self, load: Callable[[int], Image], sizes: Sequence[tuple[int, int]], image_size: int) -> None:
        self._shapes = [scaled_size(height, width, image_size) for height, width in sizes]
        self.offsets = np.cumsum([0, *(height * width * 3 for height, width in self._shapes)])
        self.pixels = np.empty(int(self.offsets[-1]), dtype=np.uint8)

        def fill(index: int) -> None:
            self.pixels[self.offsets[index] : self.offsets[index + 1]] = load(index).reshape(-1)

        with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 16)) as pool:
            list(pool.map(fill, range(len(self._shapes))))

    def get(self, index: int) -> Image:
        image = self.pixels[self.offsets[index] : self.offsets[index + 1]].reshape(*self._shapes[index], 3)
        image.setflags(write=False)
        return image


class DiskStore:
    """One `.npy` per image, written at first use and named by a hash of the image file's path, size, time and decoder.

    When the disk is full or not writable it logs one warning and decodes from then on.
    """

    def __init__(
        self, load: Callable[[int], Image], path: Callable[[int], Path], folder: Path | None, image_size: int, mode: str
    ) -> None:
        self._load, self._path = load, path
        self._folder = folder or cache_folder() / "pixels"
        self._form = (image_size, mode, decoder())
        self._writable = True

    def get(self, index: int) -> Image:
        path = self._path(index)
        try:
            status = path.stat()
        except OSError:
            return self._load(index)  # raises what is wrong with the file
        file = self._folder / f"{digest(path.resolve(), status.st_size, status.st_mtime_ns, *self._form)}.npy"
        cached = _read(file)
        if cached is not None:
            return cached
        image = self._load(index)
        if self._writable:
            try:
                atomic_write(file, lambda stream: np.save(stream, image, allow_pickle=False))
            except UserError as error:
                self._writable = False
                _log.warning("images are no longer cached on disk: %s", error)
        return image


def fits_memory(sizes: Sequence[tuple[int, int]], image_size: int) -> bool:
    """Whether all images fit in the free memory; logs how much they need."""
    needed = sum(height * width * 3 for height, width in (scaled_size(h, w, image_size) for h, w in sizes))
    free = available_memory()
    text = f"{len(sizes)} images at {image_size} px need {needed / 2**30:.2f} GiB of memory"
    if free is not None and needed > _MEMORY_SHARE * free:
        _log.warning("%s, but only %.2f GiB are free: images are not cached", text, free / 2**30)
        return False
    _log.info("%s", text)
    return True


def available_memory() -> int | None:
    """Bytes that this process may still allocate: the limit of the machine or control group; None if unknown."""
    limits = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        pass
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            limits.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(limits) if limits else None


def _read(file: Path) -> Image | None:
    try:
        # A map of the file: what its header declares takes no memory before it is compared with the file's size.
        image = np.array(np.lib.format.open_memmap(file, mode="r"))
    except OSError:  # there is none, or writing it will tell why
        return None
    except Exception:  # NumPy raises errors of many types for a damaged header.
        _log.warning("the cached image %s is damaged and is written again", file)
        return None
    valid = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    return image if valid else None
