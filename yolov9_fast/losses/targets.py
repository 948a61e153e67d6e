"""Target rows of a batch, padded to a fixed number of ground truths per image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from yolov9_fast.ops.boxes import xywh_to_xyxy


class PaddedTargets(NamedTuple):
    """`labels` [B, N] int64, `boxes` [B, N, 4] x1, y1, x2, y2 in pixels, `mask` [B, N] bool; zero where padded."""

    labels: Tensor
    boxes: Tensor
    mask: Tensor


def pad_targets(
    targets: Tensor, batch_size: int, num_classes: int, image_size: tuple[int, int], dtype: torch.dtype
) -> PaddedTargets:
    """Sort target rows into their images, keeping their order.

    Args:
        targets: [n, 6] rows (image, class, x, y, w, h), centre form normalised to the image.
        batch_size: B; every image index must be below it.
        num_classes: nc; every class must be below it.
        image_size: (height, width) in pixels.

    Returns:
        N is the largest number of rows of one image. A row is real when the sum of its corners is positive.

    Raises:
        ValueError: another shape, or an image index outside the batch, a class outside [0, nc).
    """
    if targets.dim() != 2 or targets.shape[1] != 6:
        raise ValueError(f"targets: expected [n, 6] rows (image, class, x, y, w, h), got {tuple(targets.shape)}")
    device = targets.device
    _check_indices(targets, batch_size, num_classes)
    image = targets[:, 0].long()
    counts = torch.bincount(image, minlength=batch_size)
    most = int(counts.max()) if len(targets) else 0
    labels = torch.zeros(batch_size, most, dtype=torch.int64, device=device)
    boxes = torch.zeros(batch_size, most, 4, dtype=dtype, device=device)
    image, order = image.sort(stable=True)
    rows = targets[order]
    slot = torch.arange(len(rows), device=device) - (counts.cumsum(0) - counts)[image]
    height, width = image_size
    scale = torch.tensor([width, height, width, height], dtype=dtype, device=device)
    labels[image, slot] = rows[:, 1].long()
    boxes[image, slot] = xywh_to_xyxy(rows[:, 2:].to(dtype) * scale)
    return PaddedTargets(labels, boxes, boxes.sum(-1) > 0)


def _check_indices(targets: Tensor, batch_size: int, num_classes: int) -> None:
    if len(targets) == 0:
        return
    low, high = torch.stack(targets[:, :2].aminmax(dim=0)).tolist()
    for column, (what, limit) in enumerate((("image indices", batch_size), ("classes", num_classes))):
        if not (low[column] >= 0 and high[column] < limit):
            raise ValueError(f"targets: {what} {low[column]:g}..{high[column]:g} must lie in [0, {limit})")
