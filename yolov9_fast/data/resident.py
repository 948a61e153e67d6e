"""Training images that stay in a device's memory, where the training step augments them: workers send no pixels."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yolov9_fast.data.dataset import DetectionDataset
from yolov9_fast.data.images import Image
from yolov9_fast.data.stores import available_memory
from yolov9_fast.ops._augment import OPERATOR

log = logging.getLogger(__name__)
_MEMORY_SHARE = 0.5
"""Largest share of the device's free memory for images."""
_PART = 1 << 28
"""Bytes that are decoded on the host before they are copied to the device; more where one image has more."""


def hold_images(dataset: DetectionDataset, device: torch.device) -> Tensor | None:
    """Decode and resize all images of a training set into the memory of `device`; its samples are plans from then on.

    Returns the images one after the other, uint8 [n]. Where they take more than half of the free memory, or no kernel
    runs on the device, it logs a line, changes nothing and returns None.
    """
    offsets = dataset.offsets()
    needed, count = int(offsets[-1]), len(offsets) - 1
    text = f"{count} images at {dataset.image_size} px need {needed / 2**30:.2f} GiB on {device}"
    why = _why_not(needed, device)
    if why:
        log.warning(f"{text}, {why}: images are augmented on the CPU")
        return None
    log.info(text)
    pixels = torch.empty(needed, dtype=torch.uint8, device=device)
    first = 0
    while first < count:
        last = max(int(np.searchsorted(offsets, offsets[first] + _PART, "right")) - 1, first + 1)
        own = pixels[offsets[first] : offsets[last]]
        part = own if device.type == "cpu" else torch.empty(len(own), dtype=torch.uint8)
        _read(dataset, range(first, last), part.numpy(), offsets[first:])
        if part is not own:
            own.copy_(part)
        first = last
    dataset.leave_out_pixels()
    return pixels


def _read(dataset: DetectionDataset, indices: range, pixels: Image, offsets: NDArray[np.int64]) -> None:
    """Images of these records into `pixels`, whose first byte is that of the first of `offsets`; by threads."""

    def read(number: int) -> None:
        start, end = offsets[number : number + 2] - offsets[0]
        dataset.read(indices[number], pixels[start:end].reshape(*dataset.resized(indices[number]), 3))

    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 16)) as pool:
        list(pool.map(read, range(len(indices))))


def _why_not(needed: int, device: torch.device) -> str | None:
    if device.type != "cuda":
        free = available_memory()
    else:
        if not OPERATOR.has_kernels(device):
            return f"which has no kernel for them ({OPERATOR.why_not('triton')})"
        free = torch.cuda.mem_get_info(device)[0]
    if free is not None and needed > _MEMORY_SHARE * free:
        return f"where half of the free memory is {_MEMORY_SHARE * free / 2**30:.2f} GiB"
    return None
