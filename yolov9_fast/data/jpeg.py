"""Ordinary JPEG files decoded by simplejpeg (libjpeg-turbo): the pixels that OpenCV gives, in less time.

What is not ordinary is left to OpenCV: grey, CMYK, a rotation by EXIF, more than 8 bits, arithmetic coding, damage.
"""

from __future__ import annotations

import importlib
import struct
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolov9_fast.data.headers import tiff_fields

Image = NDArray[np.uint8]

_HUFFMAN_CODED = (0xC0, 0xC1, 0xC2)
_START_OF_SCAN, _EXIF = 0xDA, 0xE1
# Tables, intervals of restarts, applications' segments, comments: they have a length and change no size.
_WITHOUT_EFFECT = frozenset({0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE})
_ORIENTATION = 274


@cache
def simplejpeg() -> Any | None:
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None


def decode_jpeg(data: bytes, factor: int = 1, out: Image | None = None) -> Image | None:
    """Decode an ordinary JPEG file to uint8 BGR [H, W, 3]; None for any other file, which OpenCV may decode.

    Args:
        data: contents of the file.
        factor: 1, 2, 4 or 8: the sides are divided by it and rounded up, in the transform of the format.
        out: a contiguous array, into which an image of its shape is decoded.
    """
    module = simplejpeg()
    size = _ordinary_size(data) if module is not None else None
    if module is None or size is None:
        return None
    height, width = (-(-side // factor) for side in size)
    buffer = out if out is not None and out.shape == (height, width, 3) else None
    smallest = {"min_height": height, "min_width": width, "min_factor": factor} if factor > 1 else {}
    try:
        image: Image = module.decode_jpeg(data, "BGR", buffer=buffer, **smallest)
    except (ValueError, RuntimeError, MemoryError):  # damaged: OpenCV says how, or reads what can be read
        return None
    if image.shape != (height, width, 3):
        return None
    return image if buffer is None else buffer


def _ordinary_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG of three components of 8 bits that EXIF does not rotate, by its header."""
    try:
        return _size(data)
    except (struct.error, IndexError):
        return None


def _size(data: bytes) -> tuple[int, int] | None:
    position, size, exif = 2, None, 0
    while data[:2] == b"\xff\xd8" and data[position] == 0xFF:
        marker = data[position + 1]
        (length,) = struct.unpack_from(">H", data, position + 2)
        if marker == _START_OF_SCAN:
            return size
        if marker == _EXIF and data[position + 4 : position + 8] == b"Exif":
            exif += 1
            if exif > 1 or not _is_upright(data[position + 10 : position + 2 + length]):
                return None
        elif marker in _HUFFMAN_CODED:
            precision, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
            if precision != 8 or components != 3 or size is not None:
                return None
            size = (height, width)
        elif marker not in _WITHOUT_EFFECT:
            return None
        position += 2 + length
    return None


def _is_upright(exif: bytes) -> bool:
    """Whether the orientation in the TIFF of an EXIF segment is missing or 1, without a doubt."""
    if not exif.startswith((b"II*\0", b"MM\0*")):
        return False
    field = tiff_fields(exif).get(_ORIENTATION)
    return field is None or (
        field.format.endswith("H") and struct.unpack_from(field.format, exif, field.position)[0] == 1
    )
