"""What `Predictor` takes, as frames: sources of files, arrays, tensors, PIL images, encoded files in memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from yolov9_fast._lazy import require
from yolov9_fast._untrusted import reason, shown
from yolov9_fast.data import Frame, open_source
from yolov9_fast.data.images import Image, check_pixels, decode_image
from yolov9_fast.data.sources import is_webcam
from yolov9_fast.errors import DataError
from yolov9_fast.limits import above_limit, limit

_DEEPEST = 8
# Of values in 0..1, which resizing by an interpolating filter leaves a little outside.
_TOLERANCE = 1e-2


def frames_of(images: object) -> Iterator[Frame]:
    """A frame for each image of anything that `Predictor` takes.

    Raises:
        DataError: something that is no image or source; names its type and shape, never its contents.
    """
    return _frames(images, 0)


def _frames(part: object, depth: int) -> Iterator[Frame]:
    # Deeper numbers are pixels, not webcams.
    is_number = isinstance(part, Integral) and not isinstance(part, bool) and depth <= 1
    if isinstance(part, str | os.PathLike) or is_number:
        source: Any = int(part) if isinstance(part, Integral) else part
        frames = open_source(source)
        if is_webcam(source):
            raise DataError(f"images: a webcam never ends, use `predictor.stream(open_source({shown(source)}))`")
        yield from frames
    elif isinstance(part, np.ndarray):
        yield from (Frame(image, "", 0) for image in (part if part.ndim == 4 else [part]))
    elif isinstance(part, Tensor):
        yield from (Frame(_from_tensor(image), "", 0) for image in (part if part.ndim == 4 else [part]))
    elif isinstance(part, bytes | bytearray | memoryview) or hasattr(part, "read"):
        yield Frame(decode_image(_contents(part), "images"), "", 0)
    elif _is_pillow(part):
        yield Frame(_from_pillow(part), "", 0)
    elif isinstance(part, Iterable) and not isinstance(part, Mapping) and depth < _DEEPEST:
        for each in part:
            yield from _frames(each, depth + 1)
    else:
        raise DataError(
            "images: expected paths, addresses, uint8 BGR arrays [H, W, 3], RGB tensors [3, H, W], PIL images or the "
            f"bytes of image files, got {type(part).__name__}"
        )


def _contents(part: Any) -> bytes:
    """The bytes of a buffer or of an open file."""
    if not hasattr(part, "read"):
        return bytes(part)
    try:
        content = part.read(limit("IMAGE_BYTES") + 1)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"images: file object cannot be read: {reason(error)}") from error
    if not isinstance(content, bytes):
        raise DataError(f"images: expected a file opened in binary mode, got one that gives {type(content).__name__}")
    if len(content) > limit("IMAGE_BYTES"):
        raise DataError(f"images: {above_limit('IMAGE_BYTES')}")
    return content


def _from_tensor(image: Tensor) -> Image:
    """uint8 or floating RGB, [3, H, W] or [H, W, 3] → uint8 BGR [H, W, 3]."""
    kind = f"{str(image.dtype).removeprefix('torch.')} {list(image.shape)}"
    expected = "images: expected an RGB tensor, uint8 or floating in 0..1, of [3, H, W], [H, W, 3] or a batch"
    if image.ndim != 3 or 3 not in (image.shape[0], image.shape[2]) or not image.numel():
        raise DataError(f"{expected}, got {kind}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise DataError(f"{expected}, got {kind}")
    try:
        image = image.detach().cpu()
        if image.is_floating_point():
            image = image.float()
            low, high = image.min().item(), image.max().item()
            if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):
                raise DataError(f"{expected}, got {kind} in {low:g}..{high:g}")
            image = (image.clamp(0, 1) * 255).round().byte()
        if image.shape[0] == 3:
            image = image.permute(1, 2, 0)
        return np.ascontiguousarray(image.numpy()[..., ::-1])
    except (RuntimeError, TypeError) as error:  # a meta, sparse or quantized tensor
        raise DataError(f"{expected}, got {kind} that cannot be copied: {reason(error)}") from error


def _is_pillow(part: object) -> bool:
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(part, module.Image)


def _from_pillow(image: Any) -> Image:
    """A PIL image, upright, as uint8 BGR [H, W, 3]; its alpha is left out, as that of a file."""
    check_pixels(image.height, image.width, "images")
    if image.mode in ("I", "F"):
        raise DataError(f"images: expected a PIL image of 8 or 16 bits a channel, got mode {image.mode}")
    try:
        image = require("PIL.ImageOps").exif_transpose(image)
        if image.mode.startswith("I;16"):
            grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        return np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise DataError(f"images: PIL image cannot be decoded: {reason(error)}") from error
