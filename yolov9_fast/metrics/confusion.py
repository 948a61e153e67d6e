"""Confusion matrix of a detector."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from yolov9_fast.ops._box_iou import box_iou


class ConfusionMatrix:
    """Counts [nc + 1, nc + 1], int64: row the predicted class, column the true class, the last of each the background.

    Detections with a score of at least `conf` are matched with labels whose IoU is above `iou`, regardless of class:
    in descending order of IoU, then of score, each detection and each label at most once. A label without a detection
    (false negative) counts in the last row, a detection without a label (false positive) in the last column.
    """

    def __init__(self, num_classes: int, conf: float = 0.25, iou: float = 0.45) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
        for name, value in (("conf", conf), ("iou", iou)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
        self.num_classes = num_classes
        self.conf = conf
        self.iou = iou
        self.matrix = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)

    def update(self, detections: Tensor, labels: Tensor) -> None:
        """Add one image: `detections` [n, 6] x1, y1, x2, y2, score, class; `labels` [m, 5] class, x1, y1, x2, y2.

        Both in the same pixels. Raises `ValueError` for other shapes or a class outside 0..nc-1.
        """
        detections = _rows(detections, 6, "detections")
        labels = _rows(labels, 5, "labels")
        detections = detections[detections[:, 4] >= self.conf]
        predicted = self._classes(detections[:, 5], "detections")
        true = self._classes(labels[:, 0], "labels")
        pairs = self._match(detections, labels)
        background = self.num_classes
        for d, g in pairs:
            self.matrix[predicted[d], true[g]] += 1
        matched_detections = {d for d, _ in pairs}
        matched_labels = {g for _, g in pairs}
        for d, cls in enumerate(predicted):
            if d not in matched_detections:
                self.matrix[cls, background] += 1
        for g, cls in enumerate(true):
            if g not in matched_labels:
                self.matrix[background, cls] += 1

    def _match(self, detections: Tensor, labels: Tensor) -> list[tuple[int, int]]:
        if not len(detections) or not len(labels):
            return []
        overlap = box_iou(detections[:, :4].contiguous(), labels[:, 1:].contiguous()).numpy()  # [n, m]
        d, g = np.nonzero(overlap > self.iou)
        scores = detections[:, 4].numpy()
        used_detections: set[int] = set()
        used_labels: set[int] = set()
        pairs = []
        for k in np.lexsort((g, -scores[d], -overlap[d, g])):
            detection, label = int(d[k]), int(g[k])
            if detection not in used_detections and label not in used_labels:
                used_detections.add(detection)
                used_labels.add(label)
                pairs.append((detection, label))
        return pairs

    def _classes(self, values: Tensor, what: str) -> list[int]:
        classes = [int(value) for value in values.tolist()]
        for value in classes:
            if not 0 <= value < self.num_classes:
                raise ValueError(f"{what}: expected classes in 0..{self.num_classes - 1}, got {value}")
        return classes


def _rows(values: Tensor, width: int, what: str) -> Tensor:
    if values.ndim != 2 or values.shape[1] != width:
        raise ValueError(f"{what}: expected shape [n, {width}], got {list(values.shape)}")
    return values.detach().to(device="cpu", dtype=torch.float32)
