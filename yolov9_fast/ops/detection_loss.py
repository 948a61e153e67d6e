"""Loss of one branch given its assignment: BCE on classes, complete IoU on boxes, DFL on their sides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov9_fast.ops.assign import Assignment
from yolov9_fast.ops.backend import Implementation, Operator, register, select
from yolov9_fast.ops.boxes import REG_MAX, STRIDES, ciou
from yolov9_fast.ops.decode import check_maps, flatten_maps, map_anchor_points, split_maps

_FOCAL_ALPHA = 0.25


def detection_loss(
    maps: Sequence[Tensor],
    assignment: Assignment,
    gt_labels: Tensor,
    gt_boxes: Tensor,
    normaliser: Tensor,
    *,
    strides: Sequence[int] = STRIDES,
    class_pos_weight: float = 1.0,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
) -> Tensor:
    """Box, class and DFL loss of one branch, before gains; gradients flow to `maps`. Computed in float32.

    With w the assignment's weight and S the normaliser: box = Σ w (1 − CIoU) / S over assigned anchors, both boxes in
    units of the stride; cls = Σ BCE(logit, target) / S over all anchors and classes, the target being w at the class
    of an assigned anchor and 0 elsewhere; dfl = Σ w · mean over sides of the cross entropy of the two bins around the
    target's distance, clamped to [0, 14.99] (Li et al., 2020).

    Args:
        maps: raw maps [B, 64 + nc, H/s, W/s] as for `decode`.
        assignment: gt_index [B, A] and weight [B, A] of `assign`.
        gt_labels: [B, N] class of each ground truth.
        gt_boxes: [B, N, 4] x1, y1, x2, y2 in pixels.
        normaliser: S > 0, 0-dimensional.
        class_pos_weight: factor on the positive part of the BCE.
        label_smoothing: ε: the target of an assigned anchor becomes w (1 − ε/2) at its class and w ε/2 elsewhere.
        focal_gamma: γ > 0 multiplies the BCE by focal loss' (1 − p_t)^γ and its α = 0.25.

    Returns:
        [3]: box, cls, dfl.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_maps(maps, strides)
    anchors = sum(level.shape[2] * level.shape[3] for level in maps)
    expected = (maps[0].shape[0], anchors)
    if assignment.gt_index.shape != expected or assignment.weight.shape != expected:
        raise ValueError(f"assignment: expected {expected} to fit maps, got {tuple(assignment.gt_index.shape)}")
    if gt_boxes.dim() != 3 or gt_labels.shape != gt_boxes.shape[:2] or gt_boxes.shape[2] != 4:
        raise ValueError(
            f"gt_boxes: expected [B, N, 4] with gt_labels [B, N], got {tuple(gt_boxes.shape)}, {tuple(gt_labels.shape)}"
        )
    options = (tuple(strides), class_pos_weight, label_smoothing, focal_gamma)
    args = (maps, assignment, gt_labels, gt_boxes, normaliser, *options)
    result: Tensor = select(OPERATOR, *args)(*args)
    return result


def detection_loss_reference(
    maps: Sequence[Tensor],
    assignment: Assignment,
    gt_labels: Tensor,
    gt_boxes: Tensor,
    normaliser: Tensor,
    strides: Sequence[int],
    class_pos_weight: float,
    label_smoothing: float,
    focal_gamma: float,
) -> Tensor:
    """`detection_loss` in eager PyTorch."""
    with torch.autocast(maps[0].device.type, enabled=False):
        raw = flatten_maps(maps)
        all_bins, logits = split_maps(raw)
        image, anchor = torch.nonzero(assignment.gt_index >= 0, as_tuple=True)
        truth = assignment.gt_index[image, anchor]
        weight = assignment.weight[image, anchor].to(raw.dtype)
        label = gt_labels[image, truth].long()

        target = torch.zeros_like(logits)
        if label_smoothing:
            spread = weight * (0.5 * label_smoothing)
            target[image, :, anchor] = spread[:, None].expand(-1, logits.shape[1])
        target[image, label, anchor] = weight * (1 - 0.5 * label_smoothing)
        cls = class_loss(logits, target, class_pos_weight, focal_gamma)

        points, stride = map_anchor_points(maps, strides, raw.dtype)
        point = points[anchor]
        wanted = gt_boxes[image, truth].to(raw.dtype) / stride[anchor]
        bins = all_bins.permute(0, 2, 1)[image, anchor].view(-1, 4, REG_MAX)
        values = torch.arange(REG_MAX, device=raw.device, dtype=raw.dtype)
        sides = (bins.softmax(-1) * values).sum(-1)
        boxes = torch.cat((point - sides[:, :2], point + sides[:, 2:]), 1)
        box = ((1 - ciou(boxes, wanted)) * weight).sum()

        distance = torch.cat((point - wanted[:, :2], wanted[:, 2:] - point), 1)
        dfl = (dfl_loss(bins, distance) * weight).sum()
        return torch.stack((box, cls, dfl)) / normaliser


def class_loss(logits: Tensor, target: Tensor, pos_weight: float = 1.0, focal_gamma: float = 0.0) -> Tensor:
    """Sum of the binary cross entropies with logits, focal for `focal_gamma` > 0."""
    positive = None if pos_weight == 1 else torch.tensor(pos_weight, device=logits.device, dtype=logits.dtype)
    if focal_gamma == 0:
        return F.binary_cross_entropy_with_logits(logits, target, pos_weight=positive, reduction="sum")
    loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=positive, reduction="none")
    probability = logits.sigmoid()
    missed = target * (1 - probability) + (1 - target) * probability
    balance = target * _FOCAL_ALPHA + (1 - target) * (1 - _FOCAL_ALPHA)
    return (loss * balance * missed**focal_gamma).sum()


def dfl_loss(bins: Tensor, distance: Tensor) -> Tensor:
    """Distribution focal loss of [F, 4, 16] logits against [F, 4] distances in stride units: [F], mean of the sides."""
    distance = distance.clamp(0, REG_MAX - 1 - 0.01)
    lower = distance.floor()
    fraction = distance - lower
    log_probability = bins.log_softmax(-1)
    index = lower.long()[..., None]
    below = log_probability.gather(-1, index)[..., 0]
    above = log_probability.gather(-1, index + 1)[..., 0]
    return -((1 - fraction) * below + fraction * above).mean(-1)


OPERATOR = register(
    Operator("detection_loss", "BCE, CIoU and DFL of one branch", {"eager": Implementation(detection_loss_reference)})
)
