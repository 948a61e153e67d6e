"""The dense eager form of task-aligned assignment, [B, N, A] throughout: what `ops.assign` is measured against.

Written from the published definition in the form in which trainers run it: every ground truth with every anchor, the
top-k counted by one-hot vectors over the anchors, targets as [B, A, classes].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-7


class DenseAssigner(nn.Module):
    """Called as assigner(scores, boxes, points, labels [B, N, 1], gt_boxes, mask [B, N, 1]), as by published losses.

    Returns labels [B, A], boxes [B, A, 4], scores [B, A, classes], foreground [B, A], ground truth [B, A].
    `inside_only`: overlaps outside a ground truth's box count as 0, so that contests are among those that contain
    the anchor.
    """

    def __init__(
        self, topk: int = 10, num_classes: int = 80, alpha: float = 0.5, beta: float = 6.0, inside_only: bool = False
    ) -> None:
        super().__init__()
        self.topk, self.num_classes, self.bg_idx = topk, num_classes, num_classes
        self.alpha, self.beta, self.eps, self.inside_only = alpha, beta, 1e-9, inside_only

    def inside(self, points: Tensor, gt_boxes: Tensor) -> Tensor:
        """[B, N, A]: whether an anchor is a candidate of a ground truth."""
        low, high = gt_boxes[:, :, None].chunk(2, -1)
        return torch.cat((points - low, high - points), -1).amin(-1) > self.eps

    @torch.no_grad()
    def forward(
        self, scores: Tensor, boxes: Tensor, points: Tensor, labels: Tensor, gt_boxes: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        batch, anchors = boxes.shape[:2]
        count = gt_boxes.shape[1]
        if count == 0:
            nothing = torch.zeros(batch, anchors, dtype=torch.int64, device=boxes.device)
            return (
                torch.full_like(nothing, self.bg_idx),
                torch.zeros_like(boxes),
                torch.zeros_like(scores),
                nothing.bool(),
                nothing,
            )
        inside = self.inside(points, gt_boxes)
        score = scores.gather(2, labels[:, None, :, 0].long().expand(-1, anchors, -1)).transpose(1, 2)
        overlap = _ciou(gt_boxes[:, :, None], boxes[:, None]).clamp(min=0)
        if self.inside_only:
            overlap = overlap * (inside & (mask > 0))
        metric = score.pow(self.alpha) * overlap.pow(self.beta)

        top = (metric * inside).topk(min(self.topk, anchors), dim=-1).indices
        top = torch.where(mask.bool(), top, 0)
        chosen = F.one_hot(top, anchors).sum(-2)
        positive = (chosen == 1) & inside & mask.bool()
        claims = positive.sum(1)
        highest = F.one_hot(overlap.argmax(1), count).transpose(1, 2).bool()
        positive = torch.where((claims > 1)[:, None], highest, positive)
        foreground = positive.any(1)
        gt_index = positive.int().argmax(1)

        metric = metric * positive
        overlap = overlap * positive
        weight = (metric * overlap.amax(-1, keepdim=True) / (metric.amax(-1, keepdim=True) + self.eps)).amax(1)
        target_labels = labels[..., 0].long().gather(1, gt_index)
        target_boxes = gt_boxes.gather(1, gt_index[..., None].expand(-1, -1, 4))
        target_scores = F.one_hot(target_labels, self.num_classes) * (weight * foreground)[..., None]
        return target_labels, target_boxes, target_scores, foreground, gt_index


def _ciou(first: Tensor, second: Tensor) -> Tensor:
    ax1, ay1, ax2, ay2 = first.unbind(-1)
    bx1, by1, bx2, by2 = second.unbind(-1)
    aw, ah, bw, bh = ax2 - ax1, ay2 - ay1 + _EPS, bx2 - bx1, by2 - by1 + _EPS
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    both = width * height
    iou = both / (aw * ah + bw * bh - both + _EPS)
    enclosing_w = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)
    enclosing_h = torch.maximum(ay2, by2) - torch.minimum(ay1, by1)
    diagonal = enclosing_w.square() + enclosing_h.square() + _EPS
    distance = ((bx1 + bx2 - ax1 - ax2).square() + (by1 + by2 - ay1 - ay2).square()) / 4
    v = (4 / math.pi**2) * (torch.atan(bw / bh) - torch.atan(aw / ah)).square()
    alpha = v / (v - iou + (1 + _EPS))
    return iou - (distance / diagonal + v * alpha)
