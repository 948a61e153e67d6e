"""Cached images: decoded and resized once, then read from memory or from disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from yolov9_fast.atomic import atomic_write
from yolov9_fast.data.cache import cache_folder, digest
from yolov9_fast.data.images import Image, decoder, scaled_size
from yolov9_fast.data.shared import SharedBytes
from yolov9_fast.errors import DataError, UserError

_log = logging.getLogger(__name__)

# Largest shares of the free memory for cached images: where they are asked for, and where nobody asked.
_LARGEST_SHARE, _AUTOMATIC_SHARE = 0.8, 0.5


class Load(Protocol):
    """The resized image of a record, uint8 BGR [h, w, 3]; in `out`, if that is given."""

    def __call__(self, index: int, out: Image | None = None) -> Image: ...


class ImageStore(Protocol):
    """Resized images of the records.

    `get(index)` returns one, uint8 BGR [h, w, 3], read-only; `read(index, out)` writes it into an array of its shape.
    """

    def get(self, index: int) -> Image: ...

    def read(self, index: int, out: Image) -> None: ...


class NoStore:
    """No cache: decodes at every call."""

    def __init__(self, load: Load) -> None:
        self._load = load

    def get(self, index: int) -> Image:
        return self._load(index)

    def read(self, index: int, out: Image) -> None:
        self._load(index, out)


class MemoryStore:
    """All images in one array, which the processes of a run share; each is decoded by the first that needs it.

    Two that need it at the same time write the same bytes. A spawned process that cannot reach the array decodes.

    Attributes:
        pixels: uint8 [n], or None in such a process; an image is there after `fill`.
        offsets: int64 [records + 1], where the image of each record begins.
    """

    def __init__(self, load: Load, sizes: Sequence[tuple[int, int]], image_size: int) -> None:
        self._load = load
        self._shapes = np.array([scaled_size(height, width, image_size) for height, width in sizes]).reshape(-1, 2)
        self.offsets = np.concatenate(([0], np.cumsum(self._shapes.prod(1) * 3)))
        self._memory = SharedBytes(int(self.offsets[-1]) + len(sizes))
        self._divide()

    def _divide(self) -> None:
        array, end = self._memory.array, int(self.offsets[-1])
        self.pixels = None if array is None else array[:end]
        self._filled = None if array is None else array[end:]

    def fill(self, indices: Iterable[int]) -> None:
        """Decode those images of the array that nobody has decoded yet."""
        if self.pixels is None or self._filled is None:
            return
        for index in indices:
            if not self._filled[index]:
                self._load(index, self._place(self.pixels, index))
                self._filled[index] = 1

    def get(self, index: int) -> Image:
        if self.pixels is None:
            return self._load(index)
        self.fill([index])
        image = self._place(self.pixels, index)
        image.setflags(write=False)
        return image

    def read(self, index: int, out: Image) -> None:
        out[...] = self.get(index)

    def _place(self, pixels: Image, index: int) -> Image:
        return pixels[self.offsets[index] : self.offsets[index + 1]].reshape(*self._shapes[index], 3)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pixels": None, "_filled": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._divide()


class DiskStore:
    """One `.npy` per image, written at first use and named by a hash of the image file's path, size, time and decoder.

    When the disk is full or not writable it logs one warning and decodes from then on.
    """

    def __init__(
        self, load: Load, path: Callable[[int], Path], folder: Path | None, image_size: int, mode: str
    ) -> None:
        self._load, self._path = load, path
        self._folder = folder or cache_folder() / "pixels"
        self._form = (image_size, mode, decoder())
        self._writable = True

    def read(self, index: int, out: Image) -> None:
        image = self.get(index)
        if image.shape != out.shape:
            expected, got = (f"{height}x{width}" for height, width, _ in (out.shape, image.shape))
            raise DataError(f"{self._path(index)}: cached image of another size: expected {expected}, got {got}")
        out[...] = image

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


def choose_cache(
    cache: str, sizes: Sequence[tuple[int, int]], image_size: int, copies: int = 1
) -> Literal["ram", "disk"] | None:
    """Where the resized images of a run are kept; logs one line that says it and why.

    Args:
        cache: "off", "ram", "disk", or "auto": "ram" where they fit in half of the free memory, else "off".
        sizes: (height, width) of all images.
        image_size: the long side that they are scaled to, in pixels.
        copies: processes that keep all images each.
    """
    if cache in ("off", "disk"):
        _log.info(f"cache: {'none' if cache == 'off' else 'decoded images on disk'} (--cache {cache})")
        return "disk" if cache == "disk" else None
    needed, free = copies * memory_needed(sizes, image_size), available_memory()
    share = _AUTOMATIC_SHARE if cache == "auto" else _LARGEST_SHARE
    text = f"{len(sizes)} decoded images take {_gibibytes(needed)}"
    if free is None and cache == "auto":
        _log.info(f"cache: none, {text} and the free memory is unknown (--cache auto)")
        return None
    if free is not None and needed > share * free:
        text += f", more than {share:.0%} of the {_gibibytes(free)} of memory that are free"
        _log.log(logging.INFO if cache == "auto" else logging.WARNING, f"cache: none, {text} (--cache {cache})")
        return None
    text += "" if free is None else f" of the {_gibibytes(free)} that are free"
    _log.info(f"cache: in memory, {text} (--cache {cache})")
    return "ram"


def memory_needed(sizes: Sequence[tuple[int, int]], image_size: int) -> int:
    """Bytes of all images with their long side scaled to `image_size`."""
    return sum(height * width * 3 for height, width in (scaled_size(h, w, image_size) for h, w in sizes))


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def fits_memory(sizes: Sequence[tuple[int, int]], image_size: int) -> bool:
    """Whether all images fit in the free memory; a warning tells if not."""
    needed, free = memory_needed(sizes, image_size), available_memory()
    if free is None or needed <= _LARGEST_SHARE * free:
        return True
    text = f"{len(sizes)} images at {image_size} px need {_gibibytes(needed)} of memory"
    _log.warning(f"{text}, but only {_gibibytes(free)} are free: images are not cached")
    return False


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
