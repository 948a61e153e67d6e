"""What the header of an encoded image says before anything is decoded: its size in pixels, and the alpha of a TIFF."""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

_NETPBM = re.compile(rb"P[1-6Ff](?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)")
_PAM = re.compile(rb"P7\s.{0,500}?WIDTH\s+(\d+).{0,500}?HEIGHT\s+(\d+)", re.DOTALL)
_JPEG_2000 = b"\xff\x4f\xff\x51"  # start of a code stream, with its size
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT, _TIFF_EXTRA_SAMPLES = 256, 257, 322, 323, 338
_UNASSOCIATED_ALPHA = 2


class _Field(NamedTuple):
    """A field of a TIFF: where its first number is in the file, and how `struct` reads that number."""

    position: int
    format: str


def image_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) that an encoded image declares, before a rotation by EXIF; None where there is no known header.

    Known are the formats that OpenCV decodes: AVIF, BMP, GIF, JPEG, JPEG 2000, PNG, PNM, TIFF, WebP.
    """
    try:
        return _image_size(data)
    except (struct.error, IndexError, ValueError):  # the header is cut off or damaged
        return None


def _image_size(data: bytes) -> tuple[int, int] | None:
    if data.startswith(b"\xff\xd8"):
        return _jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        width, height = struct.unpack_from(">II", data, 16)
    elif data.startswith((b"GIF87a", b"GIF89a")):
        width, height = struct.unpack_from("<HH", data, 6)
    elif data.startswith(b"BM"):
        old = struct.unpack_from("<I", data, 14)[0] == 12
        width, height = struct.unpack_from("<HH" if old else "<ii", data, 18)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data)
    elif data.startswith((b"II", b"MM")):
        return _tiff(data)
    elif data.startswith((b"\0\0\0\x0cjP  ", _JPEG_2000)):
        right, lower, left, upper = struct.unpack_from(">IIII", data, data.index(_JPEG_2000) + 8)
        width, height = right - left, lower - upper
    elif data[4:8] == b"ftyp":
        # The whole image and its tiles each have such a box.
        sizes = [struct.unpack_from(">II", data, match.end() + 4) for match in re.finditer(b"ispe", data[:65536])]
        width, height = max((size[0] for size in sizes), default=0), max((size[1] for size in sizes), default=0)
    else:
        match = _NETPBM.match(data[:4096]) or _PAM.match(data[:4096])
        if not match:
            return None
        width, height = int(match[1][:20]), int(match[2][:20])
    return abs(height), abs(width)


def _jpeg(data: bytes) -> tuple[int, int] | None:
    position = 2
    while data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8:
            position += 1 if marker == 0xFF else 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, position + 5)
            return height, width
        else:
            position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    return None


def _webp(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[27:30], "little"), 1 + int.from_bytes(data[24:27], "little")
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    return None


def _tiff(data: bytes) -> tuple[int, int] | None:
    fields = tiff_fields(data)
    numbers = {tag: struct.unpack_from(field.format, data, field.position)[0] for tag, field in fields.items()}
    if _TIFF_WIDTH not in numbers or _TIFF_HEIGHT not in numbers:
        return None
    # A tile is decoded whole, also where it is larger than the image.
    height = max(numbers[_TIFF_HEIGHT], numbers.get(_TIFF_TILE_HEIGHT, 0))
    return height, max(numbers[_TIFF_WIDTH], numbers.get(_TIFF_TILE_WIDTH, 0))


def tiff_fields(data: bytes) -> dict[int, _Field]:
    """The fields of the first image that hold a small integer within the field itself, by tag; big TIFF too."""
    order = "<" if data.startswith(b"II") else ">"
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    offset, count, entry, value = ("Q", "Q", 20, 12) if big else ("I", "H", 12, 8)
    (start,) = struct.unpack_from(order + offset, data, 8 if big else 4)
    (number,) = struct.unpack_from(order + count, data, start)
    start += struct.calcsize(count)
    fields: dict[int, _Field] = {}
    for position in range(start, min(start + number * entry, len(data) - entry + 1), entry):
        tag, kind = struct.unpack_from(order + "HH", data, position)
        letter = {3: "H", 4: "I", 16: "Q"}.get(kind)
        if letter:
            fields.setdefault(tag, _Field(position + value, order + letter))
    return fields


def without_alpha_scaling(data: bytes) -> bytes | bytearray:
    """A TIFF that decoders do not darken by its alpha: OpenCV multiplies the colours of TIFF alone.

    Its alpha is declared as something unspecified. Everything else is returned as it is.
    """
    if not data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return data
    try:
        field = tiff_fields(data).get(_TIFF_EXTRA_SAMPLES)
        if field is None or struct.unpack_from(field.format, data, field.position)[0] != _UNASSOCIATED_ALPHA:
            return data
    except struct.error:
        return data
    changed = bytearray(data)
    struct.pack_into(field.format, changed, field.position, 0)
    return changed
