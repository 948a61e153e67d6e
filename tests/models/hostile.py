"""Builders of files that ask for far more than they hold."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import resource
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

MAGIC = 0x1950A86A20F9469CFC6C


@contextlib.contextmanager
def memory_limit(mib: int) -> Iterator[None]:
    """The process may take so much address space in addition to what it has."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (mib << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def zip_checkpoint(path: Path, program: bytes, storages: dict[str, bytes] | None = None) -> Path:
    """A file of torch.save's form around a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for key, numbers in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", numbers)
    return path


def legacy_checkpoint(path: Path, program: bytes, storages: dict[str, bytes] | None = None, item: int = 4) -> Path:
    """As `zip_checkpoint`, in the stream format of PyTorch before 1.6."""
    storages = storages or {}
    header = [MAGIC, 1001, {"little_endian": sys.byteorder == "little"}]
    numbers = [struct.pack("<q", len(data) // item) + data for data in storages.values()]
    parts = [*(pickle.dumps(part, 2) for part in header), program, pickle.dumps(list(storages), 2), *numbers]
    path.write_bytes(b"".join(parts))
    return path


def text(value: str) -> bytes:
    """BINUNICODE."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """LONG1."""
    raw = pickle.encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw


def storage(kind: str = "FloatStorage", key: str = "0", count: int = 4) -> bytes:
    """A persistent id."""
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(kind: str = "FloatStorage", key: str = "0", count: int = 4, size: tuple[int, ...] | None = None) -> bytes:
    """A contiguous tensor over a storage of `count` numbers, by default all of them."""
    size = (count,) if size is None else size
    strides, step = [], 1
    for n in reversed(size):
        strides.insert(0, step)
        step *= max(n, 1)
    sizes, steps = (b"(" + b"".join(map(number, values)) + b"t" for values in (size, strides))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(kind, key, count) + b"K\x00" + sizes + steps + b"\x89NtR"


REPEATS = 200_000
_LONG_LIST = b"](" + b"K\x01" * 200_000 + b"eq\x00"


def _many(program: bytes, prefix: bytes = b"") -> bytes:
    return prefix + b"](" + program * REPEATS + b"e."


def _call(function: str, argument: bytes) -> bytes:
    return f"c{function}\n".encode() + argument + b"\x85R"


MULTIPLYING: dict[str, bytes] = {
    "copies of a list": _many(_call("builtins\nlist", b"h\x00"), _LONG_LIST),
    "copies as tuples": _many(_call("builtins\ntuple", b"h\x00"), _LONG_LIST),
    "copies as sizes": _many(_call("torch\nSize", b"h\x00"), _LONG_LIST),
    "copies of an ordered dictionary": _many(
        _call("collections\nOrderedDict", b"h\x00"),
        b"}(" + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(60_000)) + b"uq\x00",
    ),
    "copies as sets": _many(
        _call("builtins\nset", b"h\x00"),
        b"](" + b"".join(b"M" + struct.pack("<H", i) for i in range(60_000)) + b"eq\x00",
    ),
    "encoded copies": _many(b"c_codecs\nencode\nh\x00\x85R", text("x" * 1_000_000) + b"q\x00"),
    "long names of devices": _many(_call("torch\ndevice", b"h\x00"), text("x" * 1_000_000) + b"q\x00"),
    "long names of classes": _many(b"h\x00h\x00\x93)R", text("x" * 1_000_000) + b"q\x00"),
    "arguments that are copied": _many(b"cx\ny\nh\x00}\x92", b"(" + b"K\x01" * 200_000 + b"tq\x00"),
    "calls with many arguments": _many(b"cx\ny\nh\x00R", b"(" + b"K\x01" * 200_000 + b"tq\x00"),
    "arguments of a rebuilt class": _many(
        b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_parameter\nNh\x00NtR",
        b"(" + b"K\x01" * 200_000 + b"tq\x00",
    ),
    "empty sets": b"](" + b"\x8f" * 5_000_000 + b"e.",
    "empty objects": b"cx\ny\nq\x00](" + b"h\x00)R" * 2_000_000 + b"e.",
    "integers of one hash": b"}(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(100_000)) + b"u.",
}
"""Pickles of a few MB, each of which would take many GiB or hours."""


def safetensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str]) -> Path:
    """A safetensors file of (dtype, shape, data) by key."""
    header: dict[str, object] = {"__metadata__": metadata}
    place = 0
    for key, (dtype, shape, data) in tensors.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(data)]}
        place += len(data)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(data for _, _, data in tensors.values()))
    return path


def npy_header(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    """The beginning of an array file that declares a shape."""
    text = str({"descr": dtype, "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def npz(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def zeros_entry(path: Path, name: str, header: bytes, count: int) -> Path:
    """A compressed archive of one entry with `count` zero bytes behind a header, written in pieces."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w", force_zip64=True) as file:
        file.write(header)
        block = bytes(1 << 20)
        for _ in range(count >> 20):
            file.write(block)
    return path


def overlapping_zip(path: Path, count: int, size: int) -> Path:
    """A checkpoint whose storages 0 … count-1 lie within one another, each with a header of its own."""
    program = b"(" + b"".join(text(str(i)) + tensor("FloatStorage", str(i), size // 4) for i in range(count)) + b"d."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        head = buffer.tell()
    first = buffer.getvalue()[:head]
    import binascii

    body = bytes(size)
    records: list[tuple[str, int, bytes]] = []
    for index in reversed(range(count)):
        name = f"archive/data/{index}".encode()
        crc = binascii.crc32(body)
        local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, crc, len(body), len(body), len(name), 0) + name
        records.append((name.decode(), crc, local))
        body = local + body
    end = len(first) + len(body)
    directory = b""
    with zipfile.ZipFile(io.BytesIO(buffer.getvalue())) as archive:
        info = archive.infolist()[0]
        entries = [(info.filename, info.CRC, info.file_size, 0)]
    offset, length = len(first), len(body)
    for name, crc, local in reversed(records):
        length -= len(local)
        entries.append((name, crc, length, offset))
        offset += len(local)
    for name, crc, length, offset in entries:
        raw = name.encode()
        directory += (
            struct.pack(
                "<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, crc, length, length, len(raw), 0, 0, 0, 0, 0, offset
            )
            + raw
        )
    tail = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, len(entries), len(entries), len(directory), end, 0)
    path.write_bytes(first + body + directory + tail)
    return path


Write = Callable[[Path, bytes], Path]
