"""Task-aligned assignment: which ground truth each anchor learns, and with what weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from yolov9_fast.ops.backend import Implementation, Operator, register, select
from yolov9_fast.ops.boxes import aspect, ciou_of_sides

_INSIDE_EPS = 1e-9
_METRIC_EPS = 1e-9


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
    args = (scores, boxes, anchor_points, labels, gt_boxes, mask, topk, alpha, beta)
    result: Assignment = select(OPERATOR, *args)(*args)
    return result


@torch.no_grad()
def assign_reference(
    scores: Tensor,
    boxes: Tensor,
    anchor_points: Tensor,
    gt_labels: Tensor,
    gt_boxes: Tensor,
    gt_mask: Tensor,
    topk: int,
    alpha: float,
    beta: float,
) -> Assignment:
    """`assign` in eager PyTorch: a few ground truths at a time, padding left out; labels and mask [B, N]."""
    batch, anchors = boxes.shape[:2]
    gt_index = torch.full((batch, anchors), -1, dtype=torch.int64, device=boxes.device)
    weight = boxes.new_zeros(batch, anchors)
    image, truth = torch.nonzero(gt_mask > 0, as_tuple=True)
    if len(image) == 0 or anchors == 0:
        return Assignment(gt_index, weight)
    scene = _Scene(scores.transpose(1, 2), boxes, aspect(boxes), gt_labels.long(), gt_boxes, aspect(gt_boxes))

    claimed = []
    for part in torch.arange(len(image), device=boxes.device).split(_rows_at_once(boxes)):
        row, anchor = _claims(scene, anchor_points, image[part], truth[part], topk, alpha, beta)
        claimed.append(torch.stack((image[part][row], anchor, truth[part][row])))
    image, anchor, truth = torch.cat(claimed, 1)
    gt_index[image, anchor] = truth

    claims = torch.bincount(image * anchors + anchor, minlength=batch * anchors).view(batch, anchors)
    image, anchor = torch.nonzero(claims > 1, as_tuple=True)
    step = max(1, _pairs_at_once(boxes) // gt_boxes.shape[1])
    for one, other in zip(image.split(step), anchor.split(step), strict=True):
        gt_index[one, other] = _best_overlap(scene, one, other)

    image, anchor = torch.nonzero(gt_index >= 0, as_tuple=True)
    weight[image, anchor] = _weights(scene, image, anchor, gt_index[image, anchor], alpha, beta)
    return Assignment(gt_index, weight)


class _Scene(NamedTuple):
    by_class: Tensor
    boxes: Tensor
    aspects: Tensor
    labels: Tensor
    gt_boxes: Tensor
    gt_aspects: Tensor


def _pairs_at_once(tensor: Tensor) -> int:
    """Pairs (ground truth, anchor) looked at together: what a CPU's cache holds, or what fills another device."""
    return 1 << 17 if tensor.device.type == "cpu" else 1 << 23


def _rows_at_once(boxes: Tensor) -> int:
    return max(1, _pairs_at_once(boxes) // boxes.shape[1])


def _claims(
    scene: _Scene, points: Tensor, image: Tensor, truth: Tensor, topk: int, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """Pairs (row, anchor) of the ground truths (image, truth) [r] and the anchors that they claim."""
    target = scene.gt_boxes[image, truth][:, None].unbind(-1)
    inside = _inside(points, target)
    overlap = ciou_of_sides(
        target, scene.boxes[image].unbind(-1), scene.gt_aspects[image, truth][:, None], scene.aspects[image]
    )
    score = scene.by_class[image, scene.labels[image, truth]]
    metric = _metric(score, _finite_positive(overlap), alpha, beta) * inside
    # A non-negative float orders like its bits; the index below them makes every key unique.
    anchors = metric.shape[-1]
    key = metric.float().view(torch.int32).long() << 32
    key |= torch.arange(anchors - 1, -1, -1, device=metric.device)
    top = key.topk(min(topk, anchors), dim=-1, sorted=False).indices
    row, column = torch.nonzero(inside.gather(-1, top), as_tuple=True)
    return row, top[row, column]


def _inside(points: Tensor, target: Sequence[Tensor]) -> Tensor:
    x, y = points.unbind(-1)
    x1, y1, x2, y2 = target
    nearest = torch.minimum(torch.minimum(x - x1, y - y1), torch.minimum(x2 - x, y2 - y))
    return nearest > _INSIDE_EPS


def _best_overlap(scene: _Scene, image: Tensor, anchor: Tensor) -> Tensor:
    """For anchors (image, anchor) [K]: the ground truth of the image, padding included, with the highest overlap."""
    predicted = scene.boxes[image, anchor][:, None].unbind(-1)
    aspects = scene.aspects[image, anchor][:, None]
    overlap = ciou_of_sides(scene.gt_boxes[image].unbind(-1), predicted, scene.gt_aspects[image], aspects)
    overlap = _finite_positive(overlap)
    count = overlap.shape[1]
    number = torch.arange(count, device=overlap.device)
    return torch.where(overlap == overlap.amax(1, keepdim=True), number, count).amin(1)


def _weights(scene: _Scene, image: Tensor, anchor: Tensor, truth: Tensor, alpha: float, beta: float) -> Tensor:
    """Weights [F] of the assigned triples (image, anchor, truth)."""
    overlap = ciou_of_sides(
        scene.gt_boxes[image, truth].unbind(-1),
        scene.boxes[image, anchor].unbind(-1),
        scene.gt_aspects[image, truth],
        scene.aspects[image, anchor],
    )
    overlap = _finite_positive(overlap)
    metric = _metric(scene.by_class[image, scene.labels[image, truth], anchor], overlap, alpha, beta)
    row = image * scene.labels.shape[1] + truth
    zero = overlap.new_zeros(scene.labels.numel())
    best_metric = zero.scatter_reduce(0, row, metric, "amax")[row]
    best_overlap = zero.scatter_reduce(0, row, overlap, "amax")[row]
    return (metric * best_overlap / (best_metric + _METRIC_EPS)).to(scene.boxes.dtype)


def _finite_positive(values: Tensor) -> Tensor:
    return torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0).clamp_(min=0)


def _metric(score: Tensor, overlap: Tensor, alpha: float, beta: float) -> Tensor:
    """score^alpha · overlap^beta; the published exponents by roots and products, which every machine rounds alike."""
    score = _finite_positive(score.to(overlap.dtype))
    score = score.sqrt() if alpha == 0.5 else score.pow(alpha)
    if beta == 6:
        square = overlap * overlap
        return score * (square * square * square)
    return score * overlap.pow(beta)


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


OPERATOR = register(Operator("assign", "task-aligned assignment", {"eager": Implementation(assign_reference)}))
