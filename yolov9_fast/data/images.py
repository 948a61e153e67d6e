"""Images as arrays: decoding, resizing, letterboxing, and boxes in pixels of the original image."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yolov9_fast import __version__
from yolov9_fast._lazy import require
from yolov9_fast._untrusted import MissingFileError, read_bytes, reason
from yolov9_fast.data.headers import image_size, without_alpha_scaling
from yolov9_fast.data.jpeg import decode_jpeg, simplejpeg
from yolov9_fast.errors import DataError
from yolov9_fast.limits import above_limit, limit
from yolov9_fast.ops._boxes import STRIDES

Image = NDArray[np.uint8]

GREY = 114
# Raised when the same file is decoded to other pixels than before.
_FORMAT = 2
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".jp2", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def read_image(path: str | Path) -> Image:
    """Decode a file to uint8 BGR [H, W, 3], rotated by its EXIF tag.

    Grey, 16-bit and transparent images are converted to 3 channels of 8 bits; the colours are those stored, whatever
    the alpha. Raises `DataError` for a file that is missing, damaged, too large (see `limits`), or truncated: decoders
    would fill the missing part, whose labels remain, with grey.
    """
    return decode_image(_contents(path), str(path))


def read_resized(
    path: str | Path, original: tuple[int, int], image_size: int, *, training: bool, out: Image | None = None
) -> Image:
    """As `read_image`, then the long side is scaled to `image_size` as by `resize_long_side`.

    In training an ordinary JPEG file whose long side is at least 2, 4 or 8 times `image_size` is decoded at that
    fraction of its size, then scaled.

    Args:
        path: the image file.
        original: (height, width) that it has.
        image_size: long side of the result in pixels.
        training: whether it is for training.
        out: uint8 [h, w, 3] of the result's size, contiguous, to be filled and returned.

    Raises:
        DataError: as `read_image`, or the file has another size than `original`.
    """
    data, name = _contents(path), str(path)
    declared = _declared_size(data, name)
    shape = scaled_size(*original, image_size)
    factor = next((factor for factor in (8, 4, 2) if training and max(original) >= factor * image_size), 1)
    image = decode_jpeg(data, factor, out) if factor > 1 and declared == original else None
    if image is None:
        image = _decoded(data, name, declared, out)
        if image.shape[:2] != original:
            expected, got = (f"{height}x{width}" for height, width in (original, image.shape[:2]))
            raise DataError(f"{name}: file changed while in use: expected {expected} pixels, got {got}")
    return _resized(image, shape, training=training, out=out)


def decode_image(data: bytes, name: str) -> Image:
    """As `read_image`, from the contents of a file; errors begin with `name`."""
    return _decoded(data, name, _declared_size(data, name), None)


def _contents(path: str | Path) -> bytes:
    try:
        return read_bytes(path, "image file", "IMAGE_BYTES")
    except MissingFileError as error:
        raise DataError(f"{path}: image file is missing") from error


def _declared_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) by the header, of a file that looks complete."""
    if not data:
        raise DataError(f"{name}: image file is empty")
    if _is_truncated(data):
        raise DataError(f"{name}: image file is truncated")
    size = image_size(data)
    if size is None:
        raise DataError(f"{name}: image file cannot be decoded (its header is cut off, or of an unknown format)")
    check_pixels(*size, name)
    return size


def _decoded(data: bytes, name: str, size: tuple[int, int], out: Image | None) -> Image:
    """The image of a file, in `out` if it is of that shape and decoded there."""
    decoded = decode_jpeg(data, out=out)
    if decoded is not None:
        return decoded
    cv2 = require("cv2")
    encoded = np.frombuffer(without_alpha_scaling(data), dtype=np.uint8)
    try:
        image: Image | None = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    except (cv2.error, MemoryError) as error:
        exceeded = re.search(r"CV_IO_MAX_IMAGE_(PIXELS|WIDTH|HEIGHT)", str(error))
        why = _above_opencv_limit(exceeded[1], size) if exceeded else f"cannot be decoded ({reason(error)})"
        raise DataError(f"{name}: image file {why}") from error
    if image is None:
        raise DataError(f"{name}: image file cannot be decoded")
    return image


def check_pixels(height: int, width: int, name: str) -> None:
    """Raise `DataError` for an image or video of more than `limit("IMAGE_PIXELS")`."""
    if height * width > limit("IMAGE_PIXELS"):
        raise DataError(f"{name}: image of {width}x{height}: {above_limit('IMAGE_PIXELS', height * width)}")


def _above_opencv_limit(what: str, size: tuple[int, int]) -> str:
    variable = f"OPENCV_IO_MAX_IMAGE_{what}"
    largest = os.environ.get(variable) or (1 << 30 if what == "PIXELS" else 1 << 20)
    return f"of {size[1]}x{size[0]} is above OpenCV's limit of {largest} {what.lower()} ({variable} raises the limit)"


def decoder() -> str:
    """What the pixels of a decoded image depend on besides its file, for the keys of caches."""
    jpeg = simplejpeg()
    by = f"OpenCV {require('cv2').__version__} simplejpeg {jpeg.__version__ if jpeg else 'none'}"
    return f"yolov9_fast {__version__} format {_FORMAT} {by}"


def _is_truncated(data: bytes) -> bool:
    if data[:2] == b"\xff\xd8":
        return not _jpeg_is_complete(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return b"IEND" not in data
    return False


def _jpeg_is_complete(data: bytes) -> bool:
    # Skip the segments before the first scan: an embedded thumbnail has an end marker of its own.
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:
            return data.find(b"\xff\xd9", position) >= 0
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8:
            position += 1 if marker == 0xFF else 2
            continue
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False


def scaled_size(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) when the long side is scaled to `size`; the short side is rounded down, to at least 1."""
    longest = max(height, width)
    return max(height * size // longest, 1), max(width * size // longest, 1)


def resize_long_side(image: Image, size: int, *, training: bool) -> Image:
    """Scale the long side of [H, W, 3] to `size`: bilinear in training or when enlarging, area average otherwise."""
    return _resized(image, scaled_size(image.shape[0], image.shape[1], size), training=training, out=None)


def _resized(image: Image, shape: tuple[int, int], *, training: bool, out: Image | None) -> Image:
    if image.shape[:2] != shape:
        cv2 = require("cv2")
        interpolation = cv2.INTER_LINEAR if training or max(shape) > max(image.shape[:2]) else cv2.INTER_AREA
        image = cv2.resize(image, shape[::-1], dst=out, interpolation=interpolation)
    if out is not None and image is not out:
        out[...] = image
        return out
    return image


@dataclass(frozen=True)
class Letterboxed:
    """An image on a grey canvas: `ratio` = (gain of height, gain of width), `pad` = (left, top) in canvas pixels."""

    image: Image
    ratio: tuple[float, float]
    pad: tuple[int, int]


def letterbox(
    image: Image, size: int, *, rectangle: bool = False, stride: int = STRIDES[-1], training: bool = False
) -> Letterboxed:
    """Scale the long side of uint8 [H, W, 3] to `size` and centre it on grey.

    The canvas is `size` × `size`; with `rectangle` both sides are rounded up to a multiple of `stride`.
    """
    check_size(size, stride)
    resized = resize_long_side(image, size, training=training)
    height, width = resized.shape[:2]
    shape = (_round_up(height, stride), _round_up(width, stride)) if rectangle else (size, size)
    canvas, pad = pad_to(resized, shape)
    return Letterboxed(canvas, (height / image.shape[0], width / image.shape[1]), pad)


def pad_to(image: Image, shape: tuple[int, int]) -> tuple[Image, tuple[int, int]]:
    """Centre [h, w, 3] on a grey canvas of `shape` (height, width) ≥ (h, w); returns it and the (left, top) padding."""
    height, width = image.shape[:2]
    if height > shape[0] or width > shape[1]:
        raise ValueError(f"shape: expected at least {height}x{width}, got {shape[0]}x{shape[1]}")
    if (height, width) == shape:
        return image, (0, 0)
    left, top = round((shape[1] - width) / 2 - 0.1), round((shape[0] - height) / 2 - 0.1)
    canvas = np.full((*shape, 3), GREY, dtype=np.uint8)
    canvas[top : top + height, left : left + width] = image
    return canvas, (left, top)


def scale_boxes_to_original(
    boxes: Tensor, ratio: tuple[float, float], pad: tuple[float, float], original_shape: tuple[int, int]
) -> Tensor:
    """Convert boxes from pixels of the letterboxed image to pixels of the original image.

    `boxes`: floating [n, ≥4], x1, y1, x2, y2 first (further columns are kept); `ratio` (height, width gain), `pad`
    (left, top) and `original_shape` (height, width) as in a `Sample`. Returns a new tensor, clipped to the image.
    """
    if boxes.ndim != 2 or boxes.shape[1] < 4:
        raise ValueError(f"boxes: expected [n, 4 or more], got {list(boxes.shape)}")
    height, width = original_shape
    result = boxes.clone()
    result[:, 0:4:2] = ((boxes[:, 0:4:2] - pad[0]) / ratio[1]).clamp(0, width)
    result[:, 1:4:2] = ((boxes[:, 1:4:2] - pad[1]) / ratio[0]).clamp(0, height)
    return result


def to_tensor(image: Image) -> Tensor:
    """uint8 BGR [H, W, 3] → uint8 RGB tensor [3, H, W], contiguous."""
    blue, green, red = require("cv2").split(image)
    return torch.from_numpy(np.stack((red, green, blue)))


def check_size(size: int, stride: int = STRIDES[-1]) -> None:
    """Raise `ValueError` unless `size` is a positive multiple of `stride`."""
    if size <= 0 or size % stride:
        raise ValueError(f"image_size: expected a positive multiple of {stride}, got {size}")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
