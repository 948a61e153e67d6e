"""Files that torch.save wrote, zip archives and the older stream, read without running anything from them."""

from __future__ import annotations

import io
import math
import os
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from yolov9_fast._untrusted import reason
from yolov9_fast.errors import CheckpointError, UserError
from yolov9_fast.limits import above_limit, limit
from yolov9_fast.models.pickle_calls import STORAGE_DTYPES, GlobalName, PickleError, Storage
from yolov9_fast.models.restricted_pickle import restricted_unpickle

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_MAX_DIRECTORY_BYTES = 16 << 20


@contextmanager
def checkpoint_file(path: Path, kind: str) -> Iterator[IO[bytes]]:
    """Open a file of weights; whatever fails in the block is one `CheckpointError` of one short line.

    Args:
        path: a regular file of at most `limit("CHECKPOINT_BYTES")` bytes.
        kind: of the file, for errors, such as "PyTorch checkpoint".
    """
    try:
        if not path.exists():
            raise CheckpointError(f"no such checkpoint: {path}")
        if not path.is_file():
            raise CheckpointError(f"cannot read {path}: expected a regular file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit("CHECKPOINT_BYTES"):
                raise CheckpointError(f"{path}: {above_limit('CHECKPOINT_BYTES', size)}")
            yield file
    except UserError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {reason(error)}") from error
    except MemoryError as error:
        raise CheckpointError(f"{path}: there is not enough memory to read it") from error
    # What NumPy, zipfile and PyTorch raise for damaged input is no one family of exceptions.
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable {kind}: {reason(error)}") from error


def restricted_load(path: str | Path, kind: str = "PyTorch checkpoint") -> Any:
    """What a file written by torch.save holds, tensors on the CPU; classes and calls in it come back as inert `Stub`s.

    Memory stays below 3 times the file's size and 1 GiB, whatever the file says.
    `kind`: of the file, for errors.

    Raises:
        CheckpointError: no such file, not a PyTorch file, truncated, or ill-formed; names the file.
    """
    with checkpoint_file(Path(path), kind) as file:
        start = file.read(4)
        file.seek(0)
        return _read_zip(file) if start[:2] == b"PK" else _read_legacy(file, start)


class _Directory:
    """A zip archive's file that gives its list of entries only up to a size: it is held in memory ten times larger."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.limited = True

    def read(self, count: int = -1) -> bytes:
        if self.limited and count > _MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"a list of entries of {count:,} bytes")
        return self.file.read(count)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


_ENCRYPTED, _PATCHED = 0x41, 0x20
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@contextmanager
def open_zip(file: IO[bytes]) -> Iterator[zipfile.ZipFile]:
    """The archive in a file; `zipfile.BadZipFile` if it is none, has very many entries, or one that cannot be read."""
    directory = _Directory(file)
    try:
        archive = zipfile.ZipFile(directory)
    except NotImplementedError as error:  # a version above Python's
        raise zipfile.BadZipFile(str(error)) from None
    with archive:
        directory.limited = False
        for info in archive.infolist():
            if info.flag_bits & _ENCRYPTED:
                raise zipfile.BadZipFile(f"entry {info.filename} is encrypted")
            if info.flag_bits & _PATCHED or info.compress_type not in _COMPRESSIONS:
                raise zipfile.BadZipFile(f"entry {info.filename} has a compression that cannot be read")
        yield archive


def _read_zip(file: IO[bytes]) -> Any:
    with open_zip(file) as archive:
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
        # Entries may lie over one another, so that each is as large as the file.
        remaining = os.fstat(file.fileno()).st_size

        def load(identifier: Any) -> Storage:
            nonlocal remaining
            dtype, key, count = _storage_identifier(identifier)
            if key not in storages:
                info = entries.get(f"{folder}data/{key}")
                if info is None:
                    raise PickleError(f"storage {key} is missing")
                expected = count * dtype.itemsize
                if info.file_size < expected:
                    raise PickleError(f"storage {key} declares {expected} bytes and has {info.file_size}")
                remaining -= info.file_size
                if remaining < 0:
                    raise PickleError("storages that together are larger than the file")
                storages[key] = Storage(_numbers(_entry(archive, info, info.file_size), dtype, count))
            if storages[key].data.dtype != dtype:
                raise PickleError(f"storage {key} is declared with two types")
            return storages[key]

        pickle_bytes = _entry(archive, entries[pickles[0]], limit("PICKLE_BYTES"))
        return restricted_unpickle(io.BytesIO(pickle_bytes), load)


def _entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo, largest: int) -> bytes:
    """Bytes of an archive's entry; torch.save never compresses, so a size can be no larger than the file itself."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise PickleError(f"entry {info.filename} is compressed, which torch.save never does")
    if info.file_size > largest or info.file_size != info.compress_size:
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
    if not isinstance(key, str) or len(key) > 100 or type(count) is not int or not 0 <= count < 2**48:
        raise PickleError("a storage without key or with an impossible size")
    return dtype, key, count


def _numbers(raw: bytes, dtype: torch.dtype, count: int) -> torch.Tensor:
    if count == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype, count=count)


class _Bounded:
    """A file that never reads beyond its end: a declared length of terabytes would otherwise be allocated first.

    `read` and `readline` are for its pickles, `numbers` for what follows them.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.size = os.fstat(file.fileno()).st_size
        self._largest = limit("PICKLE_BYTES")

    def read(self, count: int) -> bytes:
        return self.numbers(min(count, self._largest))

    def readline(self) -> bytes:
        return self._file.readline(self._largest)

    def numbers(self, count: int) -> bytes:
        return self._file.read(max(0, min(count, self.size - self._file.tell())))

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
    raw = file.numbers(target.numel() * target.itemsize)
    if int.from_bytes(header, sys.byteorder) != target.numel() or len(raw) < target.numel() * target.itemsize:
        raise PickleError("the file ends before its numbers do")
    target.copy_(_numbers(raw, target.dtype, math.prod(target.shape)))
