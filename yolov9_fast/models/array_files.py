"""Weights in `.npz` and `.safetensors` files. What a file declares is compared with its own size before it is read."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from yolov9_fast._lazy import require
from yolov9_fast.errors import CheckpointError
from yolov9_fast.limits import above_limit, limit
from yolov9_fast.models.foreign_archive import checkpoint_file, open_zip

_MAX_HEADER_BYTES = 16 << 20
_MAX_RATIO = 16
_SPARE_BYTES = 64 << 20
_Headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arrays of an `.npz` file by name; no metadata.

    Raises:
        CheckpointError: missing, damaged, not plain numbers, or unpacked larger than 16 times the file and 64 MiB.
    """
    with checkpoint_file(path, ".npz file of plain arrays") as file, open_zip(file) as archive:
        entries = archive.infolist()
        check_count(path, len(entries))
        unpacked, size = sum(entry.file_size for entry in entries), os.fstat(file.fileno()).st_size
        if unpacked > _MAX_RATIO * size + _SPARE_BYTES:
            raise CheckpointError(
                f"{path}: expected at most {_MAX_RATIO} times the file's {size:,} bytes and 64 MiB when unpacked, "
                f"got {unpacked:,}"
            )
        return {entry.filename.removesuffix(".npy"): _read_array(archive, entry) for entry in entries}, {}


def _read_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Tensor:
    with archive.open(entry) as stream:
        file: IO[bytes] = stream
        version = np.lib.format.read_magic(file)
        if version not in _Headers:
            raise ValueError(f"entry {entry.filename}: an array format of version {version}")
        shape, is_fortran, dtype = _Headers[version](file)
        if dtype.hasobject or dtype.names is not None or dtype.kind not in "fiub":
            raise ValueError(f"entry {entry.filename}: expected plain numbers, got {dtype}")
        expected = math.prod(shape) * dtype.itemsize
        if not 0 <= expected <= entry.file_size:
            raise ValueError(
                f"entry {entry.filename}: an array of {list(shape)} in an entry of {entry.file_size:,} bytes"
            )
        data = bytearray(file.read())  # Up to the end, where the check sum is compared.
        if len(data) != expected:
            raise ValueError(f"entry {entry.filename}: an array of {expected:,} bytes with {len(data):,} bytes of data")
    flat = np.frombuffer(data, dtype)
    array = flat.reshape(shape[::-1]).transpose() if is_fortran else flat.reshape(shape)
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a safetensors file, as they are.

    Raises:
        CheckpointError: missing, truncated or damaged.
    """
    safetensors = require("safetensors")
    with checkpoint_file(path, "safetensors file") as file:
        header = int.from_bytes(file.read(8), "little")
        if header > _MAX_HEADER_BYTES:
            raise ValueError(f"its header of {header:,} bytes is larger than {_MAX_HEADER_BYTES:,}")
        with safetensors.safe_open(path, framework="pt") as tensors:
            metadata = dict(tensors.metadata() or {})
            keys = list(tensors.keys())
            check_count(path, len(keys))
            return {key: tensors.get_tensor(key) for key in keys}, metadata


def check_count(path: Path, count: int) -> None:
    """Raise `CheckpointError` if a file has more tensors than `limit("TENSORS")`."""
    if count > limit("TENSORS"):
        raise CheckpointError(f"{path}: {above_limit('TENSORS', count)}")
