"""Task-aligned assignment: which ground truth each anchor learns, and with what weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from yolov9_fast.ops.boxes import aspect, ciou_of_sides

_INSIDE_EPS = 1e-9
_METRIC_EPS = 1e-9
# Pairs (image, ground truth, anchor) looked at together: bounds the memory at about 30 such float tensors.
_PAIRS_AT_ONCE = 1 << 22


class Assignment(NamedTuple):
    """`gt_index` [B, A] int64: ground truth of each anchor, −1 for background; `weight` [B, A]: score target ≥ 0."""

    gt_index: Tensor
    weight: Tensor


def assign(
    scores: Tensor,
    boxes: Tensor,
    anchor_points: Tensor,
    gt_labels: Tensor,
    gt_boxes: Tensor,
    gt_mask: Tensor,
    *,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
) -> Assignment:
    """Task-aligned assignment (TOOD, Feng et al. 2021) as in the published YOLOv9; no gradient.

    With s the score of the ground truth's class, o = max(CIoU(gt, box), 0) and m = s^alpha · o^beta: a ground truth
    claims those of its topk anchors by m (zero outside the box; ties by the lowest anchor index) whose centre lies
    strictly inside it. An anchor claimed more than once goes to the ground truth with the highest o of the whole image
    (ties by the lowest index). The weight is m · max o / (max m + 1e-9), maxima over the anchors of that ground truth.

    Args:
        scores: [B, A, nc] probabilities. A score or box that is not finite counts as m = o = 0.
        boxes: [B, A, 4] predicted x1, y1, x2, y2 in pixels.
        anchor_points: [A, 2] x, y in pixels.
        gt_labels: [B, N] or [B, N, 1], class in [0, nc).
        gt_boxes: [B, N, 4] x1, y1, x2, y2 in pixels.
        gt_mask: [B, N] or [B, N, 1]; true (positive) for a real ground truth, false for padding.
        topk, alpha, beta: as above.

    Returns:
        Assignment(gt_index [B, A] int64 with −1 for background, weight [B, A] in the dtype of `boxes`).

    Raises:
        ValueError: shapes that do not fit, topk < 1.
    """
    _check(scores, boxes, anchor_points, gt_labels, gt_boxes, gt_mask, topk)
    labels = gt_labels.reshape(gt_boxes.shape[:2])
    mask = gt_mask.reshape(gt_boxes.shape[:2])
    return assign_reference(scores, boxes, anchor_points, labels, gt_boxes, mask, topk=topk, alpha=alpha, beta=beta)


@torch.no_grad()
def assign_reference(
    scores: Tensor,
    boxes: Tensor,
    anchor_points: Tensor,
    gt_labels: Tensor,
    gt_boxes: Tensor,
    gt_mask: Tensor,
    *,
    topk: int,
    alpha: float,
    beta: float,
) -> Assignment:
    """`assign` in eager PyTorch, some ground truths at a time; labels and mask [B, N]."""
    batch, anchors = boxes.shape[:2]
    count = gt_boxes.shape[1]
    background = torch.full((batch, anchors), -1, dtype=torch.int64, device=boxes.device)
    if count == 0 or anchors == 0 or batch == 0:
        return Assignment(background, boxes.new_zeros(batch, anchors))
    labels = gt_labels.long()
    by_class = scores.transpose(1, 2)
    rows = torch.arange(batch, device=boxes.device)[:, None]
    predicted = [side[:, None] for side in boxes.unbind(-1)]
    predicted_aspect = aspect(boxes)[:, None]

    claims = torch.zeros_like(background)
    claimed_by = background.clone()
    best_overlap = boxes.new_full((batch, anchors), -1.0)
    best = torch.zeros_like(background)
    step = max(1, _PAIRS_AT_ONCE // (batch * anchors))
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        truth = [side[..., None] for side in gt_boxes[:, part].unbind(-1)]
        overlap = ciou_of_sides(truth, predicted, aspect(gt_boxes[:, part])[..., None], predicted_aspect)
        overlap = _finite_positive(overlap)
        metric = _metric(by_class[rows, labels[:, part]], overlap, alpha, beta)
        claimed = _claims(metric, _inside(anchor_points, truth), gt_mask[:, part] > 0, topk)

        claims += claimed.sum(1)
        number = torch.arange(part.start, part.stop, device=boxes.device)[None, :, None]
        claimed_by = torch.maximum(claimed_by, torch.where(claimed, number, -1).amax(1))
        part_overlap, part_best = overlap.max(1)
        better = part_overlap > best_overlap
        best_overlap = torch.where(better, part_overlap, best_overlap)
        best = torch.where(better, part_best + part.start, best)

    gt_index = torch.where(claims > 1, best, claimed_by)
    return Assignment(gt_index, _weights(gt_index, by_class, boxes, labels, gt_boxes, alpha, beta))


def _inside(points: Tensor, truth: list[Tensor]) -> Tensor:
    x, y = points.unbind(-1)
    x1, y1, x2, y2 = truth
    nearest = torch.minimum(torch.minimum(x - x1, y - y1), torch.minimum(x2 - x, y2 - y))
    return nearest > _INSIDE_EPS


def _finite_positive(values: Tensor) -> Tensor:
    return torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0).clamp_(min=0)


def _metric(score: Tensor, overlap: Tensor, alpha: float, beta: float) -> Tensor:
    """m = score^alpha · overlap^beta; the published exponents by roots and products, which every machine rounds alike."""
    score = _finite_positive(score.to(overlap.dtype))
    score = score.sqrt() if alpha == 0.5 else score.pow(alpha)
    if beta == 6:
        square = overlap * overlap
        return score * (square * square * square)
    return score * overlap.pow(beta)


def _claims(metric: Tensor, inside: Tensor, valid: Tensor, topk: int) -> Tensor:
    """[B, n, A] bool: the topk anchors by metric·inside of each ground truth, ties by the lowest index, that lie inside."""
    metric = metric * inside
    anchors = metric.shape[-1]
    # A non-negative float orders like its bits; the index below them makes every key unique.
    key = metric.float().view(torch.int32).long() << 32
    key |= torch.arange(anchors - 1, -1, -1, device=metric.device)
    top = key.topk(min(topk, anchors), dim=-1, sorted=False).indices
    chosen = torch.zeros_like(inside).scatter_(-1, top, True)
    return chosen & inside & valid[..., None]


def _weights(
    gt_index: Tensor, by_class: Tensor, boxes: Tensor, labels: Tensor, gt_boxes: Tensor, alpha: float, beta: float
) -> Tensor:
    image, anchor = torch.nonzero(gt_index >= 0, as_tuple=True)
    truth = gt_index[image, anchor]
    target, predicted = gt_boxes[image, truth], boxes[image, anchor]
    overlap = ciou_of_sides(target.unbind(-1), predicted.unbind(-1), aspect(target), aspect(predicted))
    overlap = _finite_positive(overlap)
    metric = _metric(by_class[image, labels[image, truth], anchor], overlap, alpha, beta)
    row = image * labels.shape[1] + truth
    empty = boxes.new_zeros(labels.numel())
    best_metric = empty.scatter_reduce(0, row, metric, "amax")[row]
    best_overlap = empty.scatter_reduce(0, row, overlap, "amax")[row]
    weight = boxes.new_zeros(gt_index.shape)
    weight[image, anchor] = metric * best_overlap / (best_metric + _METRIC_EPS)
    return weight


def _check(
    scores: Tensor,
    boxes: Tensor,
    anchor_points: Tensor,
    gt_labels: Tensor,
    gt_boxes: Tensor,
    gt_mask: Tensor,
    topk: int,
) -> None:
    if scores.dim() != 3:
        raise ValueError(f"scores: expected [B, A, nc], got {tuple(scores.shape)}")
    batch, anchors, _ = scores.shape
    if boxes.shape != (batch, anchors, 4):
        raise ValueError(f"boxes: expected {(batch, anchors, 4)} to fit scores, got {tuple(boxes.shape)}")
    if anchor_points.shape != (anchors, 2):
        raise ValueError(f"anchor_points: expected {(anchors, 2)}, got {tuple(anchor_points.shape)}")
    if gt_boxes.dim() != 3 or gt_boxes.shape[0] != batch or gt_boxes.shape[2] != 4:
        raise ValueError(f"gt_boxes: expected [{batch}, N, 4], got {tuple(gt_boxes.shape)}")
    for name, value in (("gt_labels", gt_labels), ("gt_mask", gt_mask)):
        if value.shape[:2] != gt_boxes.shape[:2] or value.numel() != gt_boxes.shape[0] * gt_boxes.shape[1]:
            expected = tuple(gt_boxes.shape[:2])
            raise ValueError(f"{name}: expected {expected} or {(*expected, 1)}, got {tuple(value.shape)}")
    if topk < 1:
        raise ValueError(f"topk: expected at least 1, got {topk}")
