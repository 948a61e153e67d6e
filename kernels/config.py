"""Block sizes: the shape of a tile follows the tensor, its size and warps come from `configs/*.json`.

A record of `yolov9-fast tune` for this GPU by name (`configs/nvidia_h200.json`) wins over one for its compute
capability (`configs/sm90.json`), that over `configs/default.json`, whose reasons are written in it. Looked up once per
bucket; nothing is ever tuned inside a step.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from yolov9_fast.kernels.launch import View, capability_of
from yolov9_fast.kernels.replay import forget

from yolov9_fast._untrusted import read_json, reason

FOLDER = Path(__file__).resolve().parent / "configs"
ELEMENTS, WARPS = (1024, 2048, 4096, 8192), (2, 4, 8)
"""Elements and warps of a tile; `candidates` are the pairs that the tuner tries and a record may hold."""
_CHANNEL_BLOCKS = (64, 32, 16, 8)
_PIXEL_BLOCKS = (1024, 256, 64)
UNALIGNED = {"elements": ELEMENTS[0], "warps": WARPS[-1]}
"""The tile of tensors that allow no 16-byte access, so that elements are read one by one. Each needs a 64-bit address
and a mask in registers, in each tensor and for each neighbour: a thread takes four of them, not 32."""
UNALIGNED_PRODUCT = (64, 32, 64)
"""The largest product, pixels × k × outputs, of such tensors: 16 elements a thread. 128 × 64 and 64 × 128 are 64, and
their addresses alone take 128 of a thread's 255 registers."""
SMALL = 2**20
"""Tensors of up to this many elements get the tile for small ones: one wave of 132 × 8 programs of 1,024 elements."""


@dataclass(frozen=True)
class Tile:
    """A tile of `pixels` × `channels` worked on by `warps` warps."""

    pixels: int
    channels: int
    warps: int


@dataclass(frozen=True)
class Product:
    """Tiles of a matrix product: `pixels` × `k` times `k` × `outputs`, by `warps` warps in `stages` stages."""

    pixels: int
    k: int
    outputs: int
    warps: int
    stages: int


def product(size: int, outputs: int, device: torch.device, vector: int) -> Product:
    """Tiles for elements of `size` bytes; the block of outputs is 32, 64 or 128, as the outputs need.

    At most UNALIGNED_PRODUCT, by the most warps, where no 16-byte access is possible (`vector` 1).
    """
    record = _products(size, _device_key(device))
    block = next((b for b in (32, 64) if outputs <= b), 128)
    pixels, k, outputs = record["pixels"], record["k"], min(block, record["outputs"])
    if vector == 1:
        pixels, k, outputs = (min(a, b) for a, b in zip((pixels, k, outputs), UNALIGNED_PRODUCT, strict=True))
        return Product(pixels, k, outputs, WARPS[-1], record["stages"])
    return Product(pixels, k, outputs, record["warps"], record["stages"])


@cache
def _products(size: int, device: tuple[str, int | None]) -> dict[str, int]:
    name, capability = device
    found: dict[str, int] = {}
    for file in ("default", f"sm{capability}" if capability else "", name):
        found.update(load(file).get("products", {}).get(str(size), {}) if file else {})
    return found


def channel_block(channels: int) -> int:
    """Channels of a tile where they are contiguous: 64 (128 bytes of bf16, a cache line) unless less wastes less."""
    return min(_CHANNEL_BLOCKS, key=lambda block: (-(-channels // block) * block * 8 // (9 * max(channels, 1)), -block))


def pixel_block(pixels: int) -> int:
    """Pixels of a tile where they are contiguous: as many as waste at most half of the last tile."""
    return next((block for block in _PIXEL_BLOCKS if 2 * pixels >= block), _PIXEL_BLOCKS[-1])


def tile(kernel: str, view: View, vector: int) -> Tile:
    """The tile of `kernel` for tensors like `view`, in accesses of `vector` elements."""
    size = "small" if view.images * view.pixels * view.channels <= SMALL else "large"
    block = channel_block(view.channels) if view.last else pixel_block(view.pixels)
    block = max(block, vector)
    layout = "last" if view.last else "planes"
    bucket = f"{layout}/{view.data.element_size()}/{block}/{size}"
    record = UNALIGNED if vector == 1 else _record(kernel, bucket, _device_key(view.data.device))
    other = max(1, record["elements"] // block)
    return Tile(other, block, record["warps"]) if view.last else Tile(block, other, record["warps"])


def candidates(kernel: str) -> list[dict[str, int]]:
    """The tiles of `kernel` that its registers can hold, and of no less than one 16-byte access of bf16 a thread.

    Registers follow from the elements of a thread: at most those of the default tile, which is chosen for them.
    """
    most = _default(kernel, "large")
    pairs = [(elements, warps) for elements in ELEMENTS for warps in WARPS]
    limit = most["elements"] // most["warps"]
    return [{"elements": e, "warps": w} for e, w in pairs if 32 * 8 <= e // w <= limit]


def _default(kernel: str, size: str) -> dict[str, int]:
    default = load("default")
    record: dict[str, int] = default["sizes"][size] | default["kernels"].get(kernel, {})
    return record


def _device_key(device: torch.device) -> tuple[str, int | None]:
    return (_gpu_name(device.index) if device.type == "cuda" else "", capability_of(device))


@cache
def _gpu_name(index: int | None) -> str:
    return slug(torch.cuda.get_device_name(index))


def slug(name: str) -> str:
    """A GPU's name as the name of its file: `NVIDIA H200` → `nvidia_h200`."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


@cache
def _record(kernel: str, bucket: str, device: tuple[str, int | None]) -> dict[str, int]:
    """{"elements": …, "warps": …} for a bucket "layout/bytes/block/size"; the most specific record wins."""
    name, capability = device
    if (kernel, bucket) in _forced:
        return _forced[kernel, bucket]
    found = _default(kernel, bucket.rsplit("/", 1)[1])
    for file in (f"sm{capability}" if capability else "", name):
        found.update(load(file)["kernels"].get(kernel, {}).get(bucket, {}) if file else {})
    return found


_forced: dict[tuple[str, str], dict[str, int]] = {}


@contextmanager
def forced(kernel: str, bucket: str, record: dict[str, int]) -> Iterator[None]:
    """Within the block this record is used instead of those of the files: for the tuner."""
    _forced[kernel, bucket] = record
    _record.cache_clear()
    forget()
    try:
        yield
    finally:
        del _forced[kernel, bucket]
        _record.cache_clear()
        forget()


@cache
def load(name: str) -> dict[str, Any]:
    """One file of records, from YOLOV9_FAST_TUNING (a folder) when it has it, else from the package; empty if absent.

    Raises `DataError` for a file that is not JSON, and `ValueError` naming the file for records outside what the tuner
    tries: the ahead-of-time builds do not cover them, and those with more elements a thread would spill.
    """
    folders = [Path(folder) for folder in (os.environ.get("YOLOV9_FAST_TUNING"),) if folder] + [FOLDER]
    for path in (folder / f"{name}.json" for folder in folders):
        if os.path.isfile(path):
            content: dict[str, Any] = read_json(path, "tuning record")
            try:
                (_check_default if name == "default" else _check)(content, path)
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                raise ValueError(f"{path}: expected a record of `yolov9-fast tune`: {reason(error)}") from error
            return content
    return {"kernels": {}}


def _check_default(content: dict[str, Any], path: Path) -> None:
    for record in (*content["sizes"].values(), *content["kernels"].values()):
        if record.get("elements", ELEMENTS[0]) not in ELEMENTS or record.get("warps", WARPS[0]) not in WARPS:
            raise ValueError(f"{path}: expected elements among {ELEMENTS} and warps among {WARPS}, got {record}")


def _check(content: dict[str, Any], path: Path) -> None:
    for kernel, buckets in content["kernels"].items():
        for bucket, record in buckets.items():
            full = _default(kernel, bucket.rsplit("/", 1)[1]) | record
            if full not in candidates(kernel):
                allowed = ", ".join("{elements} by {warps}".format(**one) for one in candidates(kernel))
                raise ValueError(f"{path}: {kernel} {bucket}: expected elements by warps among {allowed}, got {record}")
