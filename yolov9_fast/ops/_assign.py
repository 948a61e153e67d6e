"""Task-aligned assignment: the ground truth that each anchor learns, and its weight."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from yolov9_fast.ops._boxes import REG_MAX, ciou_of_sides
from yolov9_fast.ops._boxes import aspect as aspect_by_atan
from yolov9_fast.ops._checks import check_floating, check_one_device, described
from yolov9_fast.ops._operator import Compiled, Kernel, Operator
from yolov9_fast.ops._recording import unless_recorded
from yolov9_fast.ops._supports import not_for_compiled

RULES = ("yolov9", "ultralytics", "mit")
_YOLOV9, _ULTRALYTICS, _MIT = range(3)
_INSIDE_EPS = 1e-9
_METRIC_EPS = 1e-9
_ASPECT_EPS = 1e-7
_REACH = REG_MAX - 1.01
_MAX_TOPK = 128


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
    rule: str = "yolov9",
    strides: Tensor | None = None,
    min_side: float = 0.0,
) -> Assignment:
    """Task-aligned assignment (TOOD, Feng et al. 2021) as in the published YOLOv9; no gradient.

    With s the score of the ground truth's class, o = max(CIoU(gt, box), 0) and m = s^alpha · o^beta: a ground truth
    claims those of its topk anchors by m (zero outside the box; ties by the lowest anchor index) whose centre is
    strictly inside it. An anchor claimed more than once is assigned to the ground truth with the highest o of the image
    (ties by the lowest index). The weight is m · max o / (max m + 1e-9), maxima over the anchors of that ground truth.

    `rule` names the published variant:
    - "yolov9": the above; an anchor claimed more than once may be assigned to a ground truth that did not claim it, or
      to padding.
    - "ultralytics": o and m are 0 outside the ground truth's box and for padding, so that an anchor is assigned to a
      ground truth that contains it. With `min_side`, the box that has to contain the anchor is the ground truth's with
      shorter sides lengthened to `min_side` about their middle; o is that of the ground truth's own box.
    - "mit": the centre may be on the border and no side may be farther than 14.99 strides; only anchors with m > 0
      are claimed; a ground truth that claims none gets the anchor with its highest m > 0, inside or outside; an anchor
      is assigned to one of the ground truths that claim it.

    Bitwise identical on every backend. Computed in float32 (float64 for float64 boxes). `alpha` and `beta` that are not
    multiples of 1/2 are computed by a float64 power.

    Args:
        scores: [B, A, nc] probabilities. Where a score or box is not finite, m = o = 0.
        boxes: [B, A, 4] predicted x1, y1, x2, y2 in pixels.
        anchor_points: [A, 2] x, y in pixels, in any order; fastest where consecutive points are close to each other.
        gt_labels: [B, N] or [B, N, 1], class in [0, nc); for any other the score is 0.
        gt_boxes: [B, N, 4] x1, y1, x2, y2 in pixels.
        gt_mask: [B, N] or [B, N, 1]; true (positive) for a real ground truth, false for padding.
        topk, alpha, beta: as above.
        rule: "yolov9", "ultralytics" or "mit".
        strides: [A] or [A, 1], pixels per cell of each anchor; required by rule "mit", ignored by the others.
        min_side: pixels; for rule "ultralytics" only.

    Returns:
        Assignment(gt_index [B, A] int64 with −1 for background, weight [B, A] in the dtype of `boxes`).

    Raises:
        ValueError: shapes that do not fit, an unknown rule, topk < 1, alpha < 0, beta <= 0, no strides for "mit",
            a negative or infinite min_side, or one with another rule than "ultralytics".
        TypeError: scores, boxes, anchor points or ground-truth boxes that are not floating-point tensors.
    """
    _check_tensors(scores, boxes, anchor_points, gt_labels, gt_boxes, gt_mask)
    _check_options(boxes, topk, alpha, beta, rule, strides, min_side)
    check_one_device(
        scores=scores,
        boxes=boxes,
        anchor_points=anchor_points,
        gt_labels=gt_labels,
        gt_boxes=gt_boxes,
        gt_mask=gt_mask,
        strides=strides if rule == "mit" else None,
    )
    dtype = torch.float64 if boxes.dtype == torch.float64 else torch.float32
    gt_shape = gt_boxes.shape[:2]
    sizes = boxes.new_full((1,), min_side, dtype=dtype) if min_side else None
    if rule == "mit" and strides is not None:
        sizes = strides.detach().reshape(-1).to(dtype)
    gt_index, weight = unless_recorded(OPERATOR)(
        scores.detach(),
        boxes.detach().to(dtype),
        anchor_points.detach().to(dtype),
        gt_labels.detach().reshape(gt_shape).long(),
        gt_boxes.detach().to(dtype),
        gt_mask.detach().reshape(gt_shape) > 0,
        sizes,
        int(topk),
        float(alpha),
        float(beta),
        RULES.index(rule),
    )
    return Assignment(gt_index, weight.to(boxes.dtype))


def _check_tensors(
    scores: Tensor, boxes: Tensor, anchor_points: Tensor, gt_labels: Tensor, gt_boxes: Tensor, gt_mask: Tensor
) -> None:
    floating = {"scores": scores, "boxes": boxes, "anchor_points": anchor_points, "gt_boxes": gt_boxes}
    for name, value in floating.items():
        check_floating(name, value)
    if scores.dim() != 3 or scores.shape[2] == 0:
        raise ValueError(f"scores: expected [B, A, nc] with nc of at least 1, got {list(scores.shape)}")
    batch, anchors, _ = scores.shape
    if boxes.shape != (batch, anchors, 4):
        raise ValueError(f"boxes: expected {[batch, anchors, 4]} to fit scores, got {list(boxes.shape)}")
    if anchor_points.shape != (anchors, 2):
        raise ValueError(f"anchor_points: expected {[anchors, 2]}, got {list(anchor_points.shape)}")
    if gt_boxes.dim() != 3 or gt_boxes.shape[0] != batch or gt_boxes.shape[2] != 4:
        raise ValueError(f"gt_boxes: expected [{batch}, N, 4], got {list(gt_boxes.shape)}")
    for name, value in (("gt_labels", gt_labels), ("gt_mask", gt_mask)):
        if not isinstance(value, Tensor) or value.is_complex():
            raise TypeError(f"{name}: expected a tensor of numbers, got {described(value)}")
        if value.shape[:2] != gt_boxes.shape[:2] or value.numel() != gt_boxes.shape[0] * gt_boxes.shape[1]:
            expected = list(gt_boxes.shape[:2])
            raise ValueError(f"{name}: expected {expected} or {[*expected, 1]}, got {list(value.shape)}")


def _check_options(
    boxes: Tensor, topk: int, alpha: float, beta: float, rule: str, strides: Tensor | None, min_side: float
) -> None:
    if topk < 1:
        raise ValueError(f"topk: expected at least 1, got {topk}")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha: expected a number of at least 0, got {alpha}")
    if not 0 < beta < math.inf:  # with 0, anchors without overlap would have a metric
        raise ValueError(f"beta: expected a number above 0, got {beta}")
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if not 0 <= min_side < math.inf or (min_side and rule != "ultralytics"):
        raise ValueError(f"min_side: expected 0, or a number above 0 for rule 'ultralytics', got {min_side}")
    anchors = boxes.shape[1]
    if rule == "mit" and strides is not None:
        check_floating("strides", strides)
    if rule == "mit" and (strides is None or tuple(strides.shape) not in ((anchors,), (anchors, 1))):
        got = None if strides is None else list(strides.shape)
        raise ValueError(f"strides: expected {[anchors]} or {[anchors, 1]} for rule 'mit', got {got}")


@torch.no_grad()
def assign_reference(
    scores: Tensor,
    boxes: Tensor,
    anchor_points: Tensor,
    gt_labels: Tensor,
    gt_boxes: Tensor,
    gt_mask: Tensor,
    sizes: Tensor | None,
    topk: int,
    alpha: float,
    beta: float,
    rule: int,
) -> tuple[Tensor, Tensor]:
    """`assign` in eager PyTorch: a few ground truths at a time, without padding; gt_index and weight [B, A].

    `sizes`: the strides [A] of rule "mit", or the least side [1] of rule "ultralytics".
    """
    batch, anchors = boxes.shape[:2]
    gt_index = torch.full((batch, anchors), -1, dtype=torch.int64, device=boxes.device)
    weight = boxes.new_zeros(batch, anchors)
    image, gt = torch.nonzero(gt_mask, as_tuple=True)
    if len(image) == 0 or anchors == 0:
        return gt_index, weight
    anchor_filter = _AnchorFilter(anchor_points, sizes, rule)
    alignment = _Alignment(scores, boxes, aspect(boxes), gt_labels, gt_boxes, aspect(gt_boxes), alpha, beta)

    claimed = []
    for part in torch.split(torch.arange(len(image), device=boxes.device), _rows_at_once(boxes)):
        row, anchor = _claims(alignment, anchor_filter, image[part], gt[part], topk)
        claimed.append(torch.stack((image[part][row], anchor, gt[part][row])))
    image, anchor, gt = torch.cat(claimed, 1)
    gt_index[image, anchor] = gt

    if rule == _MIT:
        _assign_among_claims(alignment, gt_index, image, anchor, gt)
    else:
        claims = torch.bincount(image * anchors + anchor, minlength=batch * anchors).view(batch, anchors)
        image, anchor = torch.nonzero(claims > 1, as_tuple=True)
        step = max(1, _pairs_at_once(boxes) // gt_boxes.shape[1])
        for image_part, anchor_part in zip(torch.split(image, step), torch.split(anchor, step), strict=True):
            gt_index[image_part, anchor_part] = _best_overlap(
                alignment, anchor_filter, gt_mask, image_part, anchor_part
            )

    image, anchor = torch.nonzero(gt_index >= 0, as_tuple=True)
    weight[image, anchor] = _weights(alignment, anchor_filter, gt_mask, image, anchor, gt_index[image, anchor])
    return gt_index, weight


class _Alignment(NamedTuple):
    """The metric m and the overlap o of pairs of a ground truth and an anchor."""

    scores: Tensor
    boxes: Tensor
    aspects: Tensor
    labels: Tensor
    gt_boxes: Tensor
    gt_aspects: Tensor
    alpha: float
    beta: float

    def overlap(self, image: Tensor, gt: Tensor, anchor: Tensor | None = None) -> Tensor:
        """o of triples (image, gt, anchor) [n], or of all anchors: [n, A]."""
        gt_boxes, gt_aspects = self.gt_boxes[image, gt], self.gt_aspects[image, gt]
        if anchor is None:
            gt_boxes, gt_aspects = gt_boxes[:, None], gt_aspects[:, None]
            boxes, aspects = self.boxes[image], self.aspects[image]
        else:
            boxes, aspects = self.boxes[image, anchor], self.aspects[image, anchor]
        return _finite_positive(ciou_of_sides(gt_boxes.unbind(-1), boxes.unbind(-1), gt_aspects, aspects))

    def metric(self, image: Tensor, gt: Tensor, overlap: Tensor, anchor: Tensor | None = None) -> Tensor:
        """m of the triples that `overlap` belongs to."""
        label, classes = self.labels[image, gt], self.scores.shape[2]
        column = label.clamp(0, classes - 1)
        score = self.scores[image, :, column] if anchor is None else self.scores[image, anchor, column]
        known = (label >= 0) & (label < classes)
        score = _finite_positive(score.to(overlap.dtype)) * (known if anchor is not None else known[:, None])
        return _finite_positive(_power(score, self.alpha) * _power(overlap, self.beta))


class _AnchorFilter(NamedTuple):
    """Which anchors the rule lets a ground truth claim, by their centres."""

    points: Tensor
    sizes: Tensor | None
    rule: int

    def __call__(self, gt_boxes: Tensor, anchor: Tensor | None = None) -> Tensor:
        """Whether anchors [n] are allowed for boxes [n, 4], or all anchors for boxes [n, 1, 4]."""
        x, y = (self.points if anchor is None else self.points[anchor]).unbind(-1)
        x1, y1, x2, y2 = gt_boxes.unbind(-1)
        if self.rule == _ULTRALYTICS and self.sizes is not None:
            (x1, x2), (y1, y2) = _lengthened(x1, x2, self.sizes), _lengthened(y1, y2, self.sizes)
        left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
        nearest = torch.minimum(torch.minimum(left, top), torch.minimum(right, bottom))
        if self.rule != _MIT:
            return nearest > _INSIDE_EPS
        farthest = torch.maximum(torch.maximum(left, top), torch.maximum(right, bottom))
        assert self.sizes is not None
        return (nearest >= 0) & (farthest <= _REACH * (self.sizes if anchor is None else self.sizes[anchor]))


def _lengthened(low: Tensor, high: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Both ends of sides that are at least `least` long."""
    middle, half = (low + high) * 0.5, least * 0.5
    short = high - low < least
    return torch.where(short, middle - half, low), torch.where(short, middle + half, high)


def _pairs_at_once(tensor: Tensor) -> int:
    """Pairs (ground truth, anchor) computed at once: as many as fit a CPU's cache, or keep another device busy."""
    return 1 << 17 if tensor.device.type == "cpu" else 1 << 23


def _rows_at_once(boxes: Tensor) -> int:
    return max(1, _pairs_at_once(boxes) // boxes.shape[1])


def _claims(
    alignment: _Alignment, anchor_filter: _AnchorFilter, image: Tensor, gt: Tensor, topk: int
) -> tuple[Tensor, Tensor]:
    """Pairs (row, anchor) of the ground truths (image, gt) [r] and the anchors that they claim."""
    inside = anchor_filter(alignment.gt_boxes[image, gt][:, None])
    anywhere = alignment.metric(image, gt, alignment.overlap(image, gt))
    metric = torch.where(inside, anywhere, torch.zeros_like(anywhere))
    anchors = metric.shape[-1]
    # The complement of the anchor's index in the low bits makes every key unique: ties go to the lowest index.
    top = _keys(metric, torch.arange(anchors, device=metric.device)).topk(min(topk, anchors), sorted=False).indices
    if anchor_filter.rule != _MIT:
        row, column = torch.nonzero(inside.gather(-1, top), as_tuple=True)
        return row, top[row, column]
    row, column = torch.nonzero(metric.gather(-1, top) > 0, as_tuple=True)
    highest, best = anywhere.max(-1)
    best = torch.where(anywhere == highest[:, None], torch.arange(anchors, device=metric.device), anchors).amin(-1)
    without = torch.nonzero((metric.amax(-1) == 0) & (highest > 0))[:, 0]
    return torch.cat((row, without)), torch.cat((top[row, column], best[without]))


def _keys(values: Tensor, index: Tensor) -> Tensor:
    """int64 in the order of values ≥ 0 [..., n] (as float32), equal values by descending index ([n] or [..., n])."""
    return (values.float().view(torch.int32).long() << 32) | (0xFFFFFFFF - index)


def _assign_among_claims(alignment: _Alignment, gt_index: Tensor, image: Tensor, anchor: Tensor, gt: Tensor) -> None:
    """Rule "mit": each claimed anchor is assigned to the ground truth with the highest overlap that claims it."""
    keys = _keys(alignment.overlap(image, gt, anchor), gt)
    flat = image * gt_index.shape[1] + anchor
    best = torch.zeros_like(gt_index.view(-1)).scatter_reduce(0, flat, keys, "amax")
    gt_index.view(-1)[flat] = 0xFFFFFFFF - (best[flat] & 0xFFFFFFFF)


def _best_overlap(
    alignment: _Alignment, anchor_filter: _AnchorFilter, gt_mask: Tensor, image: Tensor, anchor: Tensor
) -> Tensor:
    """For anchors (image, anchor) [K]: the ground truth of the image, padding included, with the highest overlap."""
    predicted = alignment.boxes[image, anchor][:, None].unbind(-1)
    aspects = alignment.aspects[image, anchor][:, None]
    overlap = ciou_of_sides(alignment.gt_boxes[image].unbind(-1), predicted, alignment.gt_aspects[image], aspects)
    overlap = _finite_positive(overlap)
    if anchor_filter.rule == _ULTRALYTICS:
        overlap = overlap * (anchor_filter(alignment.gt_boxes[image], anchor[:, None]) & gt_mask[image])
    count = overlap.shape[1]
    number = torch.arange(count, device=overlap.device)
    return torch.where(overlap == overlap.amax(1, keepdim=True), number, count).amin(1)


def _weights(
    alignment: _Alignment, anchor_filter: _AnchorFilter, gt_mask: Tensor, image: Tensor, anchor: Tensor, gt: Tensor
) -> Tensor:
    """Weights [F] of the assigned triples (image, anchor, gt)."""
    overlap = alignment.overlap(image, gt, anchor)
    if anchor_filter.rule == _ULTRALYTICS:
        overlap = overlap * (anchor_filter(alignment.gt_boxes[image, gt], anchor) & gt_mask[image, gt])
    metric = alignment.metric(image, gt, overlap, anchor)
    row = image * alignment.labels.shape[1] + gt
    zero = overlap.new_zeros(alignment.labels.numel())
    best_metric = zero.scatter_reduce(0, row, metric, "amax")[row]
    best_overlap = zero.scatter_reduce(0, row, overlap, "amax")[row]
    return _finite_positive(metric * best_overlap / (best_metric + _METRIC_EPS)).to(alignment.boxes.dtype)


def aspect(boxes: Tensor) -> Tensor:
    """atan(w / h) of boxes [..., 4], float32 by a polynomial (relative error 1e-7), bitwise identical on every device.

    The arc tangents of libraries differ in the last bits, and ties between overlaps would depend on the device.
    """
    if boxes.dtype != torch.float32:
        return aspect_by_atan(boxes)
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1, y2 - y1 + _ASPECT_EPS
    w, h = width.abs(), height.abs()
    wide = h < w
    t = torch.where(wide, h, w) / torch.where(wide, w, h)
    s = t * t
    p = torch.full_like(s, _ATAN[0])
    for coefficient in _ATAN[1:]:
        p = p * s + coefficient
    angle = t + t * (s * p)
    angle = torch.where(wide, math.pi / 2 - angle, angle)
    return torch.where((width < 0) != (height < 0), -angle, angle)


# Minimax on [0, 1] of (atan(t) / t - 1) / t² in s = t², highest power first; the same numbers as csrc/common/assign.h.
_ATAN = (
    0.002920687897130847,
    -0.01636791042983532,
    0.04321183264255524,
    -0.07552211731672287,
    0.10666003823280334,
    -0.14211055636405945,
    0.19993773102760315,
    -0.33333152532577515,
)


def _finite_positive(values: Tensor) -> Tensor:
    return torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0).clamp_(min=0)


def _power(base: Tensor, exponent: float) -> Tensor:
    """base ≥ 0 to the exponent ≥ 0: multiples of 1/2 by roots and products, which round identically everywhere."""
    halves = 2 * exponent
    if halves > 64 or halves != int(halves):
        return base.double().pow(exponent).to(base.dtype)
    # torch's float32 root may be wrong by one unit in the last place; by way of float64 it is correctly rounded.
    result = base.double().sqrt().to(base.dtype) if int(halves) & 1 else torch.ones_like(base)
    power = int(halves) >> 1
    while power:
        if power & 1:
            result = result * base
        power >>= 1
        base = base * base
    return result


# ---- kernels


def _fake(scores: Tensor, boxes: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = boxes.shape[:2]
    return boxes.new_empty(shape, dtype=torch.int64), boxes.new_empty(shape)


class _Kernels(NamedTuple):
    forward: Callable[..., Any]


KERNELS = _Kernels(
    Kernel(
        "assign(Tensor scores, Tensor boxes, Tensor anchor_points, Tensor gt_labels, Tensor gt_boxes, Tensor gt_mask, "
        "Tensor? sizes, int topk, float alpha, float beta, int rule) -> (Tensor, Tensor)",
        assign_reference,
        _fake,
    )
)


# ---- backends


def _supports(
    device: str,
    scores: Tensor,
    boxes: Tensor,
    anchor_points: Tensor,
    gt_labels: Tensor,
    gt_boxes: Tensor,
    gt_mask: Tensor,
    sizes: Tensor | None,
    topk: int,
    *rest: Any,
) -> str | None:
    if boxes.dtype != torch.float32:
        return f"it computes in float32, got boxes of {boxes.dtype}"
    if min(topk, boxes.shape[1]) > _MAX_TOPK:
        return f"it takes a topk of at most {_MAX_TOPK}, got {topk}"
    tensors = (scores, boxes, anchor_points, gt_labels, gt_boxes, gt_mask)
    return not_for_compiled(device, *tensors) or (None if sizes is None else not_for_compiled(device, sizes))


OPERATOR = Operator(
    "assign",
    "task-aligned assignment",
    reference=assign_reference,
    kernels=KERNELS,
    backends={device: Compiled(functools.partial(_supports, device)) for device in ("cpu", "cuda")},
)
