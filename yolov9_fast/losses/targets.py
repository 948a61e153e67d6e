"""Target rows of a batch, padded to a fixed number of ground truths per image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from yolov9_fast.ops._boxes import xywh_to_xyxy


class PaddedTargets(NamedTuple):
    """`labels` [B, N] int64, `boxes` [B, N, 4] x1, y1, x2, y2 in pixels, `mask` [B, N] bool; zero where padded.

    `fits`: 0-dimensional bool when the rows were not checked on the host; false if a row was left out.
    """

    labels: Tensor
    boxes: Tensor
    mask: Tensor
    fits: Tensor | None = None

    def copy_(self, other: PaddedTargets) -> None:
        """Become `other`, of the same shapes, in place and without synchronisation."""
        for own, value in zip(self[:3], other[:3], strict=True):
            own.copy_(_pinned(value, own.device), non_blocking=True)

    def to(self, device: torch.device, dtype: torch.dtype) -> PaddedTargets:
        """Copied to `device` without synchronisation, boxes in `dtype`."""
        return PaddedTargets(
            _copied(self.labels, device),
            _copied(self.boxes.to(dtype), device),
            _copied(self.mask, device),
            None if self.fits is None else _copied(self.fits, device),
        )


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return _pinned(tensor, device).to(device, non_blocking=True)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """In page-locked memory if it is to be copied to a GPU: a copy from other memory waits for the GPU."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def pad_targets(
    targets: Tensor,
    batch_size: int,
    num_classes: int,
    image_size: tuple[int, int],
    dtype: torch.dtype,
    max_objects: int | None = None,
    smallest: int | None = None,
) -> PaddedTargets:
    """Sort target rows into their images, keeping their order, on the device where they are.

    Args:
        targets: [n, 6] rows (image, class, x, y, w, h), centre form normalised to the image.
        batch_size: B; every image index must be below it.
        num_classes: nc; every class must be below it.
        image_size: (height, width) in pixels.
        max_objects: N. Without it N is the largest number of rows of one image, which synchronises with a GPU.
        smallest: without `max_objects` take for N this number or the first of its doubles that is large enough, so that
            few shapes occur.

    Returns:
        A row is real when the sum of its corners is positive.

    Raises:
        ValueError: another shape; on the CPU or without `max_objects` an image index outside the batch, a class outside
            [0, nc), more than `max_objects` rows of one image. On a GPU with `max_objects` such rows are left out and
            `fits` is false.
    """
    if targets.dim() != 2 or targets.shape[1] != 6:
        raise ValueError(f"targets: expected [n, 6] rows (image, class, x, y, w, h), got {tuple(targets.shape)}")
    if max_objects is not None and targets.device.type != "cpu":
        return sort_rows(targets, batch_size, num_classes, image_size, dtype, max_objects)
    _check_indices(targets, batch_size, num_classes)
    most = int(torch.bincount(targets[:, 0].long()).max()) if len(targets) else 0
    if max_objects is not None and most > max_objects:
        raise ValueError(f"targets: expected at most {max_objects} (max_objects) rows per image, got {most}")
    count = most if max_objects is None else max_objects
    if max_objects is None and smallest is not None:
        count = smallest
        while count < most:
            count *= 2
    return sort_rows(targets, batch_size, num_classes, image_size, dtype, count)._replace(fits=None)


def sort_rows(
    targets: Tensor, batch_size: int, num_classes: int, image_size: tuple[int, int], dtype: torch.dtype, count: int
) -> PaddedTargets:
    """Put the rows into `count` slots per image, leaving out what has no slot; reads no value on the host."""
    device = targets.device
    image, label = targets[:, 0], targets[:, 1]
    known = (image >= 0) & (image < batch_size) & (label >= 0) & (label < num_classes)
    # Rows of no image are sorted to the end.
    image, order = torch.where(known, image, batch_size).long().sort(stable=True)
    rows, known = targets[order], known[order]
    number = torch.arange(len(rows), device=device)
    slot = number - torch.searchsorted(image, image)
    known = known & (slot < count)
    # An additional slot, dropped below, takes the rows that are left out.
    slot = torch.where(known, slot, count)
    image = torch.where(known, image, 0)
    labels = torch.zeros(batch_size, count + 1, dtype=torch.int64, device=device)
    boxes = torch.zeros(batch_size, count + 1, 4, dtype=dtype, device=device)
    height, width = image_size
    labels[image, slot] = rows[:, 1].long()
    boxes[image, slot] = xywh_to_xyxy(_in_pixels(rows[:, 2:].to(dtype), width, height))
    boxes = boxes[:, :count].contiguous()
    return PaddedTargets(labels[:, :count].contiguous(), boxes, boxes.sum(-1) > 0, known.all())


def _in_pixels(boxes: Tensor, width: int, height: int) -> Tensor:
    """Boxes [n, 4] in centre form times the image's sides, without copying these to the device."""
    return torch.stack((boxes[:, 0] * width, boxes[:, 1] * height, boxes[:, 2] * width, boxes[:, 3] * height), 1)


def _check_indices(targets: Tensor, batch_size: int, num_classes: int) -> None:
    if len(targets) == 0:
        return
    low, high = torch.stack(targets[:, :2].aminmax(dim=0)).tolist()
    for column, (what, limit) in enumerate((("image indices", batch_size), ("classes", num_classes))):
        if not (low[column] >= 0 and high[column] < limit):
            raise ValueError(f"targets: expected {what} in [0, {limit}), got {low[column]:g}..{high[column]:g}")
