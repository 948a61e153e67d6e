"""Target rows of a batch, padded to a fixed number of ground truths per image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from yolov9_fast.ops._boxes import xywh_to_xyxy


class PaddedTargets(NamedTuple):
    """`labels` [B, N] int64, `boxes` [B, N, 4] x1, y1, x2, y2 in pixels, `mask` [B, N] bool; zero where padded.

    `fits`: 0-dimensional bool where nobody waited to check the rows; false when one of them had no place.
    """

    labels: Tensor
    boxes: Tensor
    mask: Tensor
    fits: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> PaddedTargets:
        """On `device`, boxes in `dtype`; sent without waiting."""
        fits = None if self.fits is None else self.fits.to(device, non_blocking=True)
        return PaddedTargets(
            self.labels.to(device, non_blocking=True),
            self.boxes.to(device, dtype, non_blocking=True),
            self.mask.to(device, non_blocking=True),
            fits,
        )


def pad_targets(
    targets: Tensor,
    batch_size: int,
    num_classes: int,
    image_size: tuple[int, int],
    dtype: torch.dtype,
    max_objects: int | None = None,
) -> PaddedTargets:
    """Sort target rows into their images, keeping their order, on the device where they are.

    Args:
        targets: [n, 6] rows (image, class, x, y, w, h), centre form normalised to the image.
        batch_size: B; every image index must be below it.
        num_classes: nc; every class must be below it.
        image_size: (height, width) in pixels.
        max_objects: N. Without it N is the largest number of rows of one image, for which a GPU has to be waited.

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
        return place_rows(targets, batch_size, num_classes, image_size, dtype, max_objects)
    _check_indices(targets, batch_size, num_classes)
    most = int(torch.bincount(targets[:, 0].long()).max()) if len(targets) else 0
    if max_objects is not None and most > max_objects:
        raise ValueError(f"targets: {most} rows of one image, more than max_objects {max_objects}")
    count = most if max_objects is None else max_objects
    return place_rows(targets, batch_size, num_classes, image_size, dtype, count)._replace(fits=None)


def place_rows(
    targets: Tensor, batch_size: int, num_classes: int, image_size: tuple[int, int], dtype: torch.dtype, count: int
) -> PaddedTargets:
    """Rows into `count` places per image, without looking at a value on the host: what has no place is left out."""
    device = targets.device
    image, label = targets[:, 0], targets[:, 1]
    known = (image >= 0) & (image < batch_size) & (label >= 0) & (label < num_classes)
    # Rows without an image sort behind all others.
    image, order = torch.where(known, image, batch_size).long().sort(stable=True)
    rows, known = targets[order], known[order]
    number = torch.arange(len(rows), device=device)
    place = number - torch.searchsorted(image, image)
    known = known & (place < count)
    # One place more than is kept takes the rows that are left out.
    place = torch.where(known, place, count)
    image = torch.where(known, image, 0)
    labels = torch.zeros(batch_size, count + 1, dtype=torch.int64, device=device)
    boxes = torch.zeros(batch_size, count + 1, 4, dtype=dtype, device=device)
    height, width = image_size
    labels[image, place] = rows[:, 1].long()
    boxes[image, place] = xywh_to_xyxy(_in_pixels(rows[:, 2:].to(dtype), width, height))
    boxes = boxes[:, :count].contiguous()
    return PaddedTargets(labels[:, :count].contiguous(), boxes, boxes.sum(-1) > 0, known.all())


def _in_pixels(boxes: Tensor, width: int, height: int) -> Tensor:
    """Centre form [n, 4] times the image's sides, which stay numbers of the host."""
    return torch.stack((boxes[:, 0] * width, boxes[:, 1] * height, boxes[:, 2] * width, boxes[:, 3] * height), 1)


def _check_indices(targets: Tensor, batch_size: int, num_classes: int) -> None:
    if len(targets) == 0:
        return
    low, high = torch.stack(targets[:, :2].aminmax(dim=0)).tolist()
    for column, (what, limit) in enumerate((("image indices", batch_size), ("classes", num_classes))):
        if not (low[column] >= 0 and high[column] < limit):
            raise ValueError(f"targets: {what} {low[column]:g}..{high[column]:g} must lie in [0, {limit})")
