"""Files that torch.save wrote, zip archives and the older stream, read without running anything from them."""

from __future__ import annotations

import io
import math
import os
import sys
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from yolov9_fast.errors import CheckpointError
from yolov9_fast.models.restricted_pickle import STORAGE_DTYPES, GlobalName, PickleError, Storage, restricted_unpickle

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_MAX_PICKLE_BYTES = 1 << 30


def restricted_load(path: str | Path) -> Any:
    """What a file written by torch.save holds, tensors on the CPU; classes and calls in it come back as inert `Stub`s.

    Raises:
        CheckpointError: no such file, not a PyTorch file, truncated, or ill-formed; names the file.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(4)
            file.seek(0)
            if start[:2] == b"PK":
                return _read_zip(file)
            return _read_legacy(file, start)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (PickleError, zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable PyTorch checkpoint: {error}") from error


def _read_zip(file: IO[bytes]) -> Any:
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise PickleError(f"a zip archive with {len(pickles)} entries named data.pkl where one is expected")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}constants.pkl" in entries:
            raise PickleError("a TorchScript program; a checkpoint with weights is expected")
        if f"{folder}byteorder" in entries:
            order = _entry(archive, entries[f"{folder}byteorder"], 16).decode("ascii", "replace")
            if order != sys.byteorder:
                raise PickleError(f"numbers stored {order}-endian on a {sys.byteorder}-endian machine")
        storages: dict[str, Storage] = {}

        def load(identifier: Any) -> Storage:
            dtype, key, count = _storage_identifier(identifier)
            if key not in storages:
                info = entries.get(f"{folder}data/{key}")
                if info is None:
                    raise PickleError(f"storage {key} is missing")
                expected = count * dtype.itemsize
                if info.file_size < expected:
                    raise PickleError(f"storage {key} declares {expected} bytes and has {info.file_size}")
                storages[key] = Storage(_numbers(_entry(archive, info, info.file_size), dtype, count))
            if storages[key].data.dtype != dtype:
                raise PickleError(f"storage {key} is declared with two types")
            return storages[key]

        pickle_bytes = _entry(archive, entries[pickles[0]], _MAX_PICKLE_BYTES)
        return restricted_unpickle(io.BytesIO(pickle_bytes), load)


def _entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> bytes:
    """Bytes of an archive's entry; torch.save never compresses, so a size can be no larger than the file itself."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise PickleError(f"entry {info.filename} is compressed, which torch.save never does")
    if info.file_size > limit or info.file_size != info.compress_size:
        raise PickleError(f"entry {info.filename} has an impossible size of {info.file_size} bytes")
    return archive.read(info)


def _storage_identifier(identifier: Any) -> tuple[torch.dtype, str, int]:
    """Dtype, key and count of numbers of the persistent id ("storage", type, key, location, count, …)."""
    if not isinstance(identifier, tuple) or len(identifier) < 5 or identifier[0] != "storage":
        raise PickleError("a reference to something other than a storage")
    _, kind, key, _, count = identifier[:5]
    dtype = STORAGE_DTYPES.get(str(kind)) if isinstance(kind, GlobalName) else None
    if dtype is None:
        raise PickleError(f"a storage of type {kind if isinstance(kind, GlobalName) else type(kind).__name__}")
    if not isinstance(key, str) or type(count) is not int or not 0 <= count < 2**48:
        raise PickleError("a storage without key or with an impossible size")
    return dtype, key, count


def _numbers(raw: bytes, dtype: torch.dtype, count: int) -> torch.Tensor:
    if count == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype, count=count)


class _Bounded:
    """A file that never reads beyond its end: a declared length of terabytes would otherwise be allocated first."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.size = os.fstat(file.fileno()).st_size

    def read(self, count: int) -> bytes:
        return self._file.read(max(0, min(count, self.size - self._file.tell())))

    def readline(self) -> bytes:
        return self._file.readline()

    def tell(self) -> int:
        return self._file.tell()


def _read_legacy(stream: IO[bytes], start: bytes) -> Any:
    """PyTorch before 1.6: pickles of magic number, version, system, object and storages' keys, then the numbers."""
    file = _Bounded(stream)
    if not start.startswith(b"\x80"):
        raise PickleError("neither a zip archive nor a pickle")
    if restricted_unpickle(file) != _LEGACY_MAGIC:
        raise PickleError("a pickle that torch.save did not write")
    if restricted_unpickle(file) != _LEGACY_VERSION:
        raise PickleError("an unknown version of the stream format")
    system = restricted_unpickle(file)
    if isinstance(system, dict) and system.get("little_endian") is not (sys.byteorder == "little"):
        raise PickleError(f"numbers stored in another byte order than this machine's ({sys.byteorder}-endian)")
    storages: dict[str, Storage] = {}
    allocated = 0

    def load(identifier: Any) -> Any:
        nonlocal allocated
        if isinstance(identifier, tuple) and len(identifier) >= 2 and identifier[0] == "module":
            return identifier[1]
        dtype, key, count = _storage_identifier(identifier)
        if len(identifier) > 5 and identifier[5] is not None:
            raise PickleError("a view of a storage, as PyTorch before 0.4 wrote; save the file again with a newer one")
        if key not in storages:
            allocated += count * dtype.itemsize
            if allocated > file.size:
                raise PickleError(f"storage {key} declares more bytes than the file has")
            storages[key] = Storage(torch.zeros(count, dtype=dtype))
        return storages[key]

    content = restricted_unpickle(file, load)
    keys = restricted_unpickle(file)
    if not isinstance(keys, list) or sorted(storages) != sorted(k for k in keys if isinstance(k, str)):
        raise PickleError("the list of storages does not fit the content")
    for key in keys:
        _fill(file, storages.get(key))
    return content


def _fill(file: _Bounded, storage: Storage | None) -> None:
    header = file.read(8)
    if storage is None or len(header) < 8:
        raise PickleError("the file ends before its numbers do")
    target = storage.data
    raw = file.read(target.numel() * target.itemsize)
    if int.from_bytes(header, sys.byteorder) != target.numel() or len(raw) < target.numel() * target.itemsize:
        raise PickleError("the file ends before its numbers do")
    target.copy_(_numbers(raw, target.dtype, math.prod(target.shape)))
