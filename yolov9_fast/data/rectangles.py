"""Rectangular evaluation batches: images of similar aspect ratio share a batch with a canvas as small as possible."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def rectangular_batches(
    sizes: NDArray[np.int32], batch_size: int, image_size: int, stride: int, pad: float
) -> tuple[list[int], list[tuple[int, int]]]:
    """Order of the images by height / width, and the canvas (height, width) of each image by its index.

    Per batch of that order: shape = [largest ratio, 1] if all images are wide, [1, 1 / smallest ratio] if all are tall,
    else [1, 1]; canvas = ceil(shape · image_size / stride + pad) · stride per side.
    """
    ratios = sizes[:, 0] / sizes[:, 1]
    order = np.argsort(ratios, kind="stable").tolist()
    shapes = [(0, 0)] * len(order)
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        low, high = float(ratios[members].min()), float(ratios[members].max())
        relative = (high, 1.0) if high < 1 else (1.0, 1 / low) if low > 1 else (1.0, 1.0)
        height, width = (math.ceil(side * image_size / stride + pad) * stride for side in relative)
        for index in members:
            shapes[index] = (height, width)
    return order, shapes
