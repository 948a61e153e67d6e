"""Task-aligned assignment: which ground truth each anchor learns, and with what weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from yolov9_fast.ops import _library as library
from yolov9_fast.ops._backend import Implementation, Operator, not_on, register, select
from yolov9_fast.ops._boxes import REG_MAX, ciou_of_sides
from yolov9_fast.ops._boxes import aspect as aspect_by_atan

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
) -> Assignment:
    """Task-aligned assignment (TOOD, Feng et al. 2021) as in the published YOLOv9; no gradient.

    With s the score of the ground truth's class, o = max(CIoU(gt, box), 0) and m = s^alpha · o^beta: a ground truth
    claims those of its topk anchors by m (zero outside the box; ties by the lowest anchor index) whose centre lies
    strictly inside it. An anchor claimed more than once goes to the ground truth with the highest o of the whole image
    (ties by the lowest index). The weight is m · max o / (max m + 1e-9), maxima over the anchors of that ground truth.

    `rule` names the published variant:
    - "yolov9": the above; a contested anchor may go to a ground truth that did not claim it, or to padding.
    - "ultralytics": o and m are 0 outside the ground truth's box and for padding, so that contests are among those
      that contain the anchor.
    - "mit": the centre may lie on the border and no side may be farther than 14.99 strides; only anchors with m > 0
      are claimed; a ground truth that claims none gets the anchor with its highest m > 0, wherever it lies; contests
      are among those that claim.

    The same bits on every backend. Computed in float32 (float64 for float64 boxes). `alpha` and `beta` that are no
    multiples of 1/2 go through a float64 power.

    Args:
        scores: [B, A, nc] probabilities. A score or box that is not finite counts as m = o = 0.
        boxes: [B, A, 4] predicted x1, y1, x2, y2 in pixels.
        anchor_points: [A, 2] x, y in pixels, in any arrangement; neighbours in the list should be neighbours in space.
        gt_labels: [B, N] or [B, N, 1], class in [0, nc); outside of it the score counts as 0.
        gt_boxes: [B, N, 4] x1, y1, x2, y2 in pixels.
        gt_mask: [B, N] or [B, N, 1]; true (positive) for a real ground truth, false for padding.
        topk, alpha, beta: as above.
        rule: "yolov9", "ultralytics" or "mit".
        strides: [A] or [A, 1], pixels per cell of each anchor; rule "mit" needs it, the others ignore it.

    Returns:
        Assignment(gt_index [B, A] int64 with −1 for background, weight [B, A] in the dtype of `boxes`).

    Raises:
        ValueError: shapes that do not fit, an unknown rule, topk < 1, alpha < 0, beta <= 0, no strides for "mit".
        TypeError: scores, boxes, anchor points or ground-truth boxes that are no floating-point tensors.
    """
    _check_tensors(scores, boxes, anchor_points, gt_labels, gt_boxes, gt_mask)
    _check_options(boxes, topk, alpha, beta, rule, strides)
    dtype = torch.float64 if boxes.dtype == torch.float64 else torch.float32
    truths = gt_boxes.shape[:2]
    args = (
        scores.detach(),
        boxes.detach().to(dtype),
        anchor_points.detach().to(dtype),
        gt_labels.detach().reshape(truths).long(),
        gt_boxes.detach().to(dtype),
        gt_mask.detach().reshape(truths) > 0,
        None if strides is None or rule != "mit" else strides.detach().reshape(-1).to(dtype),
        int(topk),
        float(alpha),
        float(beta),
        RULES.index(rule),
    )
    gt_index, weight = select(OPERATOR, *args)(*args)
    return Assignment(gt_index, weight.to(boxes.dtype))


@torch.no_grad()
def assign_reference(
    scores: Tensor,
    boxes: Tensor,
    anchor_points: Tensor,
    gt_labels: Tensor,
    gt_boxes: Tensor,
    gt_mask: Tensor,
    strides: Tensor | None,
    topk: int,
    alpha: float,
    beta: float,
    rule: int,
) -> tuple[Tensor, Tensor]:
    """`assign` in eager PyTorch: a few ground truths at a time, padding left out; gt_index and weight [B, A]."""
    batch, anchors = boxes.shape[:2]
    gt_index = torch.full((batch, anchors), -1, dtype=torch.int64, device=boxes.device)
    weight = boxes.new_zeros(batch, anchors)
    image, truth = torch.nonzero(gt_mask, as_tuple=True)
    if len(image) == 0 or anchors == 0:
        return gt_index, weight
    reach = None if strides is None else strides * _REACH
    places = _Places(anchor_points, reach, rule)
    scene = _Scene(scores, boxes, aspect(boxes), gt_labels, gt_boxes, aspect(gt_boxes), alpha, beta)

    claimed = []
    for part in torch.arange(len(image), device=boxes.device).split(_rows_at_once(boxes)):
        row, anchor = _claims(scene, places, image[part], truth[part], topk)
        claimed.append(torch.stack((image[part][row], anchor, truth[part][row])))
    image, anchor, truth = torch.cat(claimed, 1)
    gt_index[image, anchor] = truth

    if rule == _MIT:
        _settle_among_claims(scene, gt_index, image, anchor, truth)
    else:
        claims = torch.bincount(image * anchors + anchor, minlength=batch * anchors).view(batch, anchors)
        image, anchor = torch.nonzero(claims > 1, as_tuple=True)
        step = max(1, _pairs_at_once(boxes) // gt_boxes.shape[1])
        for one, other in zip(image.split(step), anchor.split(step), strict=True):
            gt_index[one, other] = _best_overlap(scene, places, gt_mask, one, other)

    image, anchor = torch.nonzero(gt_index >= 0, as_tuple=True)
    weight[image, anchor] = _weights(scene, places, gt_mask, image, anchor, gt_index[image, anchor])
    return gt_index, weight


class _Scene(NamedTuple):
    scores: Tensor
    boxes: Tensor
    aspects: Tensor
    labels: Tensor
    gt_boxes: Tensor
    gt_aspects: Tensor
    alpha: float
    beta: float

    def overlap(self, image: Tensor, truth: Tensor, anchor: Tensor | None = None) -> Tensor:
        """o of triples (image, truth, anchor) [n], or of every anchor: [n, A]."""
        target, turn = self.gt_boxes[image, truth], self.gt_aspects[image, truth]
        if anchor is None:
            target, turn, boxes, aspects = target[:, None], turn[:, None], self.boxes[image], self.aspects[image]
        else:
            boxes, aspects = self.boxes[image, anchor], self.aspects[image, anchor]
        return _finite_positive(ciou_of_sides(target.unbind(-1), boxes.unbind(-1), turn, aspects))

    def metric(self, image: Tensor, truth: Tensor, overlap: Tensor, anchor: Tensor | None = None) -> Tensor:
        """m of the triples that `overlap` belongs to."""
        label, classes = self.labels[image, truth], self.scores.shape[2]
        column = label.clamp(0, classes - 1)
        score = self.scores[image, :, column] if anchor is None else self.scores[image, anchor, column]
        known = (label >= 0) & (label < classes)
        score = _finite_positive(score.to(overlap.dtype)) * (known if anchor is not None else known[:, None])
        return _finite_positive(_power(score, self.alpha) * _power(overlap, self.beta))


class _Places(NamedTuple):
    points: Tensor
    reach: Tensor | None
    rule: int

    def may_learn(self, target: Tensor, anchor: Tensor | None = None) -> Tensor:
        """Whether anchors lie where the rule lets them learn boxes [n, 4] (each of every anchor: [n, 1, 4])."""
        x, y = (self.points if anchor is None else self.points[anchor]).unbind(-1)
        x1, y1, x2, y2 = target.unbind(-1)
        left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
        nearest = torch.minimum(torch.minimum(left, top), torch.minimum(right, bottom))
        if self.rule != _MIT:
            return nearest > _INSIDE_EPS
        farthest = torch.maximum(torch.maximum(left, top), torch.maximum(right, bottom))
        assert self.reach is not None
        return (nearest >= 0) & (farthest <= (self.reach if anchor is None else self.reach[anchor]))


def _pairs_at_once(tensor: Tensor) -> int:
    """Pairs (ground truth, anchor) looked at together: what a CPU's cache holds, or what fills another device."""
    return 1 << 17 if tensor.device.type == "cpu" else 1 << 23


def _rows_at_once(boxes: Tensor) -> int:
    return max(1, _pairs_at_once(boxes) // boxes.shape[1])


def _claims(scene: _Scene, places: _Places, image: Tensor, truth: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Pairs (row, anchor) of the ground truths (image, truth) [r] and the anchors that they claim."""
    inside = places.may_learn(scene.gt_boxes[image, truth][:, None])
    anywhere = scene.metric(image, truth, scene.overlap(image, truth))
    metric = torch.where(inside, anywhere, torch.zeros_like(anywhere))
    anchors = metric.shape[-1]
    # The anchor's complement below the metric makes every key unique, ties going to the lowest anchor.
    top = _keys(metric, torch.arange(anchors, device=metric.device)).topk(min(topk, anchors), sorted=False).indices
    if places.rule != _MIT:
        row, column = torch.nonzero(inside.gather(-1, top), as_tuple=True)
        return row, top[row, column]
    row, column = torch.nonzero(metric.gather(-1, top) > 0, as_tuple=True)
    highest, best = anywhere.max(-1)
    best = torch.where(anywhere == highest[:, None], torch.arange(anchors, device=metric.device), anchors).amin(-1)
    without = torch.nonzero((metric.amax(-1) == 0) & (highest > 0))[:, 0]
    return torch.cat((row, without)), torch.cat((top[row, column], best[without]))


def _keys(values: Tensor, index: Tensor) -> Tensor:
    """int64 that order like the values ≥ 0 (in float32), equal ones by falling index: [..., n] with [n] or [..., n]."""
    return (values.float().view(torch.int32).long() << 32) | (0xFFFFFFFF - index)


def _settle_among_claims(scene: _Scene, gt_index: Tensor, image: Tensor, anchor: Tensor, truth: Tensor) -> None:
    """Rule "mit": each claimed anchor goes to that one of its claimants with the highest overlap."""
    keys = _keys(scene.overlap(image, truth, anchor), truth)
    flat = image * gt_index.shape[1] + anchor
    best = torch.zeros_like(gt_index.view(-1)).scatter_reduce(0, flat, keys, "amax")
    gt_index.view(-1)[flat] = 0xFFFFFFFF - (best[flat] & 0xFFFFFFFF)


def _best_overlap(scene: _Scene, places: _Places, gt_mask: Tensor, image: Tensor, anchor: Tensor) -> Tensor:
    """For anchors (image, anchor) [K]: the ground truth of the image, padding included, with the highest overlap."""
    predicted = scene.boxes[image, anchor][:, None].unbind(-1)
    aspects = scene.aspects[image, anchor][:, None]
    overlap = ciou_of_sides(scene.gt_boxes[image].unbind(-1), predicted, scene.gt_aspects[image], aspects)
    overlap = _finite_positive(overlap)
    if places.rule == _ULTRALYTICS:
        overlap = overlap * (places.may_learn(scene.gt_boxes[image], anchor[:, None]) & gt_mask[image])
    count = overlap.shape[1]
    number = torch.arange(count, device=overlap.device)
    return torch.where(overlap == overlap.amax(1, keepdim=True), number, count).amin(1)


def _weights(scene: _Scene, places: _Places, gt_mask: Tensor, image: Tensor, anchor: Tensor, truth: Tensor) -> Tensor:
    """Weights [F] of the assigned triples (image, anchor, truth)."""
    overlap = scene.overlap(image, truth, anchor)
    if places.rule == _ULTRALYTICS:
        overlap = overlap * (places.may_learn(scene.gt_boxes[image, truth], anchor) & gt_mask[image, truth])
    metric = scene.metric(image, truth, overlap, anchor)
    row = image * scene.labels.shape[1] + truth
    zero = overlap.new_zeros(scene.labels.numel())
    best_metric = zero.scatter_reduce(0, row, metric, "amax")[row]
    best_overlap = zero.scatter_reduce(0, row, overlap, "amax")[row]
    return _finite_positive(metric * best_overlap / (best_metric + _METRIC_EPS)).to(scene.boxes.dtype)


def aspect(boxes: Tensor) -> Tensor:
    """atan(w / h) of boxes [..., 4], float32 by a polynomial (relative error 1e-7) whose bits are the same everywhere.

    Libraries differ in the last bits of the arc tangent, and ties between overlaps would then depend on the device.
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
    """base ≥ 0 to the exponent ≥ 0: multiples of 1/2 by roots and products, which every machine rounds alike."""
    halves = 2 * exponent
    if halves > 64 or halves != int(halves):
        return base.double().pow(exponent).to(base.dtype)
    # torch's float32 root may be off by a unit in the last place; through float64 it is the correctly rounded one.
    result = base.double().sqrt().to(base.dtype) if int(halves) & 1 else torch.ones_like(base)
    whole = int(halves) >> 1
    while whole:
        if whole & 1:
            result = result * base
        whole >>= 1
        base = base * base
    return result


def _check_tensors(
    scores: Tensor, boxes: Tensor, anchor_points: Tensor, gt_labels: Tensor, gt_boxes: Tensor, gt_mask: Tensor
) -> None:
    floating = {"scores": scores, "boxes": boxes, "anchor_points": anchor_points, "gt_boxes": gt_boxes}
    for name, value in floating.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
    if scores.dim() != 3 or scores.shape[2] == 0:
        raise ValueError(f"scores: expected [B, A, nc] with nc of at least 1, got {tuple(scores.shape)}")
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


def _check_options(boxes: Tensor, topk: int, alpha: float, beta: float, rule: str, strides: Tensor | None) -> None:
    if topk < 1:
        raise ValueError(f"topk: expected at least 1, got {topk}")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha: expected a number of at least 0, got {alpha}")
    if not 0 < beta < math.inf:  # else anchors without overlap would have a metric
        raise ValueError(f"beta: expected a number above 0, got {beta}")
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    anchors = boxes.shape[1]
    if rule == "mit" and (strides is None or tuple(strides.shape) not in ((anchors,), (anchors, 1))):
        got = None if strides is None else tuple(strides.shape)
        raise ValueError(f"strides: rule 'mit' expects {(anchors,)} or {(anchors, 1)}, got {got}")


def _fake(scores: Tensor, boxes: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = boxes.shape[:2]
    return boxes.new_empty(shape, dtype=torch.int64), boxes.new_empty(shape)


def _supports(device: str) -> Any:
    def supports(scores: Tensor, boxes: Tensor, *rest: Any) -> str | None:
        tensors: Sequence[Any] = rest[:5]
        if boxes.dtype != torch.float32:
            return f"it computes in float32, boxes are {boxes.dtype}"
        if min(rest[5], boxes.shape[1]) > _MAX_TOPK:
            return f"it keeps at most {_MAX_TOPK} anchors of a ground truth, topk is {rest[5]}"
        return not_on(device, scores, boxes, *(each for each in tensors if each is not None))

    return supports


_ARGUMENTS = (
    "Tensor scores, Tensor boxes, Tensor anchor_points, Tensor gt_labels, Tensor gt_boxes, Tensor gt_mask, "
    "Tensor? strides, int topk, float alpha, float beta, int rule"
)
_compiled = library.define(f"assign({_ARGUMENTS}) -> (Tensor, Tensor)", fake=_fake, reference=assign_reference)

OPERATOR = register(
    Operator(
        "assign",
        "task-aligned assignment",
        {
            "eager": Implementation(assign_reference),
            "cpu": Implementation(_compiled, library.missing("assign", "cpu"), _supports("cpu")),
            "cuda": Implementation(_compiled, library.missing("assign", "cuda"), _supports("cuda")),
        },
    )
)
