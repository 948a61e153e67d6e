"""Block sizes: the shape of a tile follows the tensor, its size and warps come from `configs/*.json`.

A record of `yolov9-fast tune` for this GPU by name (`configs/nvidia_h200.json`) wins over one for its compute
capability (`configs/sm90.json`), that over `configs/default.json`, whose reasons are written in it. Looked up once per
bucket; nothing is ever tuned inside a step.
"""

import json
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

FOLDER = Path(__file__).resolve().parent / "configs"
ELEMENTS = (1024, 2048, 4096, 8192)
"""Elements of a tile that the tuner tries; with WARPS all that a record may hold."""
WARPS = (2, 4, 8)
_CHANNEL_BLOCKS = (64, 32, 16, 8)
_PIXEL_BLOCKS = (1024, 256, 64)
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


def product(size: int, outputs: int, device: torch.device) -> Product:
    """Tiles for elements of `size` bytes; the block of outputs is 32, 64 or 128, as the outputs need."""
    record = _products(size, _device_key(device))
    block = next((b for b in (32, 64) if outputs <= b), 128)
    return Product(record["pixels"], record["k"], min(block, record["outputs"]), record["warps"], record["stages"])


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


def tile(kernel: str, view: View, vector: int, limit: int = ELEMENTS[-1]) -> Tile:
    """The tile of `kernel` for tensors like `view`, of at most `limit` elements."""
    size = "small" if view.images * view.pixels * view.channels <= SMALL else "large"
    block = channel_block(view.channels) if view.last else pixel_block(view.pixels)
    block = max(block, vector)
    layout = "last" if view.last else "planes"
    record = _record(kernel, f"{layout}/{view.data.element_size()}/{block}/{size}", _device_key(view.data.device))
    if vector == 1:  # each element then has an address of its own, in registers
        limit = min(limit, ELEMENTS[0])
    other = max(1, min(record["elements"], limit) // block)
    return Tile(other, block, record["warps"]) if view.last else Tile(block, other, record["warps"])


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
    default = load("default")
    if (kernel, bucket) in _forced:
        return _forced[kernel, bucket]
    found: dict[str, int] = dict(default["sizes"][bucket.rsplit("/", 1)[1]])
    found.update(default["kernels"].get(kernel, {}))
    for file in (f"sm{capability}" if capability else "", name):
        found.update(load(file)["kernels"].get(kernel, {}).get(bucket, {}) if file else {})
    return found


_forced: dict[tuple[str, str], dict[str, int]] = {}


@contextmanager
def forced(kernel: str, bucket: str, record: dict[str, int]) -> Iterator[None]:
    """Within the block this record holds, whatever the files say: for the tuner."""
    _forced[kernel, bucket] = record
    _record.cache_clear()
    try:
        yield
    finally:
        del _forced[kernel, bucket]
        _record.cache_clear()


@cache
def load(name: str) -> dict[str, Any]:
    """One file of records, from YOLOV9_FAST_TUNING (a folder) when it has it, else from the package; empty if absent.

    Raises `ValueError` naming the file for records outside what the tuner tries: the list of ahead-of-time builds
    would not cover them.
    """
    folders = [Path(folder) for folder in (os.environ.get("YOLOV9_FAST_TUNING"),) if folder] + [FOLDER]
    for path in (folder / f"{name}.json" for folder in folders):
        if path.is_file():
            content: dict[str, Any] = json.loads(path.read_text())
            _check(content, path)
            return content
    return {"kernels": {}}


def _check(content: dict[str, Any], path: Path) -> None:
    records = list(content.get("sizes", {}).values())
    for entry in content["kernels"].values():
        records.extend([entry] if "warps" in entry or "elements" in entry else entry.values())
    for record in records:
        if record.get("elements", ELEMENTS[0]) not in ELEMENTS or record.get("warps", WARPS[0]) not in WARPS:
            raise ValueError(f"{path}: elements must be among {ELEMENTS} and warps among {WARPS}, got {record}")
