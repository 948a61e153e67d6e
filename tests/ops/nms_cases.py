"""Random small inputs for nms and nms_boxes: ties, duplicates, degenerate boxes, NaN, infinities, empty tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

ODD = (math.nan, math.inf, -math.inf, 1e38, -1e38, 0.0, -0.0)


class Draw:
    """Choices from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """In [low, high]."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def choice(self, *options: Any) -> Any:
        return options[self.integer(0, len(options) - 1)]

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def boxes_xywh(self, count: int) -> Tensor:
        """[4, count]: clusters, some on a grid (exact overlaps, ties), duplicates, sizes of zero or less."""
        objects = self.rand(4, self.choice(1, 2, 5)) * torch.tensor([60.0, 60, 40, 40])[:, None] + 2
        at = torch.randint(objects.shape[1], (count,), generator=self.generator)
        boxes = objects[:, at] + self.choice(0.0, 2.0, 10.0) * (self.rand(4, count) - 0.5)
        if self.choice(True, False):
            boxes = (boxes / 4).round() * 4
        size = boxes[2:]
        if self.choice(True, False, False):
            size[self.rand(2, count) < 0.2] = 0
        if self.choice(True, False, False):
            size[self.rand(2, count) < 0.2] *= -1
        return boxes

    def insert_odd_values(self, values: Tensor) -> None:
        if self.choice(True, False, False) and values.numel():
            odd = torch.tensor(ODD)[torch.randint(len(ODD), values.shape, generator=self.generator)]
            values.copy_(torch.where(self.rand(*values.shape) < self.choice(0.02, 0.2), odd, values))


def nms_case(seed: int, most_anchors: int = 60) -> tuple[Tensor, dict[str, Any]]:
    """prediction [B, 4 + nc, A] and all options of `nms`."""
    draw = Draw(seed)
    images, classes = draw.choice(0, 1, 1, 2, 3), draw.choice(1, 1, 2, 5, 40)
    anchors = draw.choice(0, 1, 2, draw.integer(3, most_anchors), draw.integer(3, most_anchors), most_anchors)
    prediction = torch.cat(
        (
            torch.stack([draw.boxes_xywh(anchors) for _ in range(images)] or [torch.zeros(4, anchors)]),
            draw.rand(max(images, 1), classes, anchors),
        ),
        1,
    )[:images]
    scores = prediction[:, 4:]
    steps = draw.choice(1, 4, 50, 0)  # few distinct scores: many ties
    if steps:
        scores.copy_((scores * steps).ceil() / steps)
    scores.pow_(draw.choice(1, 1, 8))
    if draw.choice(True, False):
        scores[torch.rand(scores.shape, generator=draw.generator) < 0.6] = 0
    draw.insert_odd_values(prediction)
    return prediction, {
        "conf": draw.choice(0.0, 0.001, 0.001, 0.01, 0.25, 0.5, 0.9, 1.0),
        "iou": draw.choice(0.0, 0.25, 0.5, 0.7, 1.0),
        "multi_label": draw.choice(True, True, False),
        "agnostic": draw.choice(True, False),
        "classes": draw.choice(
            None, None, None, None, [], [0], [classes - 1, 0, classes - 1], list(range(0, classes, 2))
        ),
        "max_det": draw.choice(1, 2, 7, 40, 300),
        "max_candidates": draw.choice(1, 4, 17, 100, 30000, 30000),
    }


def nms_boxes_case(seed: int, most: int = 120) -> tuple[Tensor, Tensor, Tensor | None, float, int]:
    """Arguments of the kernel nms_boxes."""
    draw = Draw(seed)
    count = draw.choice(0, 1, draw.integer(2, most), draw.integer(2, most), most)
    centre, size = draw.boxes_xywh(count).T.chunk(2, 1)
    boxes = torch.cat((centre - size / 2, centre + size / 2), 1).contiguous()
    scores = draw.rand(count) - draw.choice(0.0, 0.5)
    steps = draw.choice(1, 4, 50, 0)
    if steps:
        scores = (scores * steps).round() / steps
    draw.insert_odd_values(boxes)
    draw.insert_odd_values(scores)
    labels = draw.choice(
        None,
        torch.zeros(count, dtype=torch.int64),
        torch.randint(-3, 3, (count,), generator=draw.generator),
        torch.randint(3, (count,), generator=draw.generator) * 2**40,
    )
    return boxes, scores, labels, draw.choice(0.0, 0.25, 0.5, 0.7, 1.0), draw.choice(0, 1, 5, 50, count)
