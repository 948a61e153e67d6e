"""Pictures for the experiments: a user's files, or scenes drawn by program where none are given."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from yolov9_fast._untrusted import absence, user_path
from yolov9_fast.data.files import find_files
from yolov9_fast.data.images import IMAGE_SUFFIXES, Image, read_image, resize_long_side, to_tensor
from yolov9_fast.data.rendered import render_image
from yolov9_fast.errors import DataError, UserError

log = logging.getLogger(__name__)

SCENE = 39
"""Seed of the scene that stands in for a missing IMAGE: five shapes, some overlapping, on a textured ground."""
SCENE_SIZE = 320
_ROOM_TO_MOVE = 1.5


def open_picture(path: str | Path | None, size: int) -> Image:
    """uint8 BGR [H, W, 3], `size` pixels on its long side, from a file or drawn; `DataError` where it is unreadable."""
    if size < 8:
        raise UserError(f"size: expected at least 8 pixels, got {size}")
    if path is None:
        # Drawn at one size: another would draw other shapes.
        return resize_long_side(render_image(np.random.default_rng(SCENE), SCENE_SIZE).image, size, training=False)
    file = user_path(path, "image")
    if os.path.isdir(file):
        raise DataError(f"{path} is a folder; an image file is needed")
    return resize_long_side(read_image(file), size, training=False)


def as_input(image: Image) -> Tensor:
    """uint8 BGR [H, W, 3] → float32 RGB [1, 3, H, W] in [0, 1]."""
    return to_tensor(image)[None].float() / 255


def picture_files(sources: Sequence[str | Path]) -> list[Path]:
    """Image files among `sources`, folders opened (not those inside them), in alphabetical order per folder.

    Raises:
        DataError: a source that does not exist, or a folder without an image.
    """
    files: list[Path] = []
    for source in (user_path(source, "images") for source in sources):
        if os.path.isfile(source):
            files.append(source)
        elif os.path.isdir(source):
            found = find_files([source], IMAGE_SUFFIXES, deep=False)
            for path, problem in found.problems:
                log.warning("%s: skipped: %s", path, problem)
            if not found.files:
                raise DataError(f"no image in the folder {source}; ignored: {found.ignored() or 'nothing'}")
            files += found.files
        else:
            raise DataError(f"image file is missing: {source} {absence(source)}")
    return files


def crops(sources: Sequence[str | Path], count: int, size: int, seed: int = 0) -> Tensor:
    """`count` square crops, float32 RGB [count, 3, size, size] in [0, 1], of as many pictures as there are.

    A picture is brought to 1.5 times `size` on its short side, and a place drawn; where there are fewer files than
    crops the files come round again. Without files each crop is of a scene of its own.

    Raises:
        DataError: a file that is missing or unreadable.
    """
    files = picture_files(sources)
    taken = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        if files:
            image = read_image(files[number % len(files)])
            height, width = image.shape[:2]
            long_side = round(_ROOM_TO_MOVE * size * max(height, width) / min(height, width))
            image = resize_long_side(image, long_side, training=False)
        else:
            image = render_image(rng, round(_ROOM_TO_MOVE * size)).image
        top, left = (int(rng.integers(0, side - size + 1)) for side in image.shape[:2])
        taken.append(to_tensor(image[top : top + size, left : left + size]))
    return torch.stack(taken).float() / 255
