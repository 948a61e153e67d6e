"""`accelerate_loss` and `restore_loss`: the label assigner of another code's loss is replaced by `ops.assign`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from yolov9_fast.ops._assign import RULES, Assignment, assign
from yolov9_fast.ops._boxes import REG_MAX

_ASSIGNERS = ("assigner", "assigner2", "assigner3")
_MATCHERS = ("matcher",)
_INNER_LOSSES = ("loss", "criterion", "one2many", "one2one")
_EPS = 1e-9


@dataclass
class LossReport:
    """What `accelerate_loss` or `restore_loss` did; paths are attributes of the criterion, as "loss.matcher"."""

    swapped: list[tuple[str, str]] = field(default_factory=list)
    """(path, rule)"""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """(path, why nothing was done)"""

    def __str__(self) -> str:
        lines = [f"{path}: rule {rule}" for path, rule in self.swapped]
        return "\n".join(lines + [f"{path}: unchanged, {reason}" for path, reason in self.skipped])


def accelerate_loss(criterion: Any, *, rule: str | None = None, returns_index: bool | None = None) -> LossReport:
    """Replace the label assigners inside `criterion` by `ops.assign`, in place; `restore_loss` undoes it.

    It looks for the attributes `assigner`, `assigner2`, `assigner3` (modules called with scores, boxes, anchor points,
    labels, ground-truth boxes and mask) and `matcher` (called with targets and (class logits, boxes)), of the criterion
    and of its `loss`, `criterion`, `one2many`, `one2one`. Topk, alpha, beta and the least side of a box that looks for
    candidates (`stride_val`, or the first `stride`, of Ultralytics) are those of the replaced assigner. The outputs
    have the published form: labels [B, A], boxes [B, A, 4], scores [B, A, classes], foreground [B, A], and with
    `returns_index` the index of the ground truth [B, A]; of a matcher: [B, A, classes + 4] and foreground [B, A].

    A second call changes nothing. The criterion can still be pickled and copied.

    Args:
        rule: "yolov9", "ultralytics" or "mit" (see `ops.assign`). None: by the assigner's class and module; classes
            of unknown origin are then taken when they are called TaskAlignedAssigner (rule "yolov9") or BoxMatcher.
        returns_index: whether a fifth output is expected. None: where the class comes from ultralytics.

    Returns:
        What was replaced by which rule, and what was not and why.

    Raises:
        ValueError: an unknown rule.
    """
    if rule is not None and rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)} or None, got {rule!r}")
    report = LossReport()
    for path, owner, name in _assigners_of(criterion):
        original = getattr(owner, name)
        if isinstance(original, (FastAssigner, FastMatcher)):
            report.skipped.append((path, f"already replaced, rule {original.rule}"))
            continue
        replacement = _matcher(original, rule) if name in _MATCHERS else _assigner(original, rule, returns_index)
        if isinstance(replacement, str):
            report.skipped.append((path, replacement))
            continue
        setattr(owner, name, replacement)
        report.swapped.append((path, replacement.rule))
    if not report.swapped and not report.skipped:
        report.skipped.append(("", f"no attribute {', '.join(_ASSIGNERS + _MATCHERS)} found"))
    return report


def restore_loss(criterion: Any) -> LossReport:
    """Undo `accelerate_loss`: `criterion` has its own assigners again."""
    report = LossReport()
    for path, owner, name in _assigners_of(criterion):
        current = getattr(owner, name)
        if isinstance(current, (FastAssigner, FastMatcher)):
            setattr(owner, name, current.original)
            report.swapped.append((path, current.rule))
        else:
            report.skipped.append((path, "never replaced"))
    return report


class FastAssigner(nn.Module):
    """Replaces a task-aligned assigner module; other attributes are those of `original`."""

    def __init__(self, original: Any, rule: str, returns_index: bool) -> None:
        super().__init__()
        # Not registered as a child: the original does not run.
        self.__dict__["original"] = original
        self.rule, self.returns_index = rule, returns_index
        self.topk, self.num_classes = int(original.topk), int(original.num_classes)
        self.alpha, self.beta, self.eps = float(original.alpha), float(original.beta), _EPS
        self.bg_idx = int(getattr(original, "bg_idx", self.num_classes))

    def __getattr__(self, name: str) -> Any:
        original = self.__dict__.get("original")
        if original is None or (name.startswith("__") and name.endswith("__")):
            return super().__getattr__(name)
        return getattr(original, name)

    @torch.no_grad()
    def forward(
        self,
        pd_scores: Tensor,
        pd_bboxes: Tensor,
        anc_points: Tensor,
        gt_labels: Tensor,
        gt_bboxes: Tensor,
        mask_gt: Tensor,
    ) -> tuple[Tensor, ...]:
        found = assign(
            pd_scores,
            pd_bboxes,
            anc_points,
            gt_labels,
            gt_bboxes,
            mask_gt,
            topk=self.topk,
            alpha=self.alpha,
            beta=self.beta,
            rule=self.rule,
            min_side=_min_side(self),
        )
        labels, boxes, scores, foreground, index = dense_targets(
            found, gt_labels, gt_bboxes, self.num_classes, self.bg_idx
        )
        return (labels, boxes, scores, foreground, index) if self.returns_index else (labels, boxes, scores, foreground)


class FastMatcher:
    """Replaces a matcher called with targets [B, N, 5] (class, x1, y1, x2, y2; padding has class −1)."""

    rule = "mit"

    def __init__(self, original: Any) -> None:
        self.original = original

    def __getattr__(self, name: str) -> Any:
        if name == "original" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self.original, name)

    @torch.no_grad()
    def __call__(self, target: Tensor, predict: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        logits, boxes = predict
        labels, gt_boxes = target[..., 0], target[..., 1:].to(boxes.dtype).contiguous()
        grid = self.original.vec2box
        found = assign(
            logits.sigmoid(),
            boxes,
            grid.anchor_grid.to(boxes),
            labels,
            gt_boxes,
            labels >= 0,
            topk=int(self.original.topk),
            alpha=float(self.original.factor["cls"]),
            beta=float(self.original.factor["iou"]),
            rule=self.rule,
            strides=grid.scaler.to(boxes).reshape(-1),
        )
        _, boxes, scores, foreground, _ = dense_targets(found, labels, gt_boxes, int(self.original.class_num), 0)
        return torch.cat((scores, boxes), -1), foreground


def dense_targets(
    assignment: Assignment, gt_labels: Tensor, gt_boxes: Tensor, num_classes: int, background: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The published dense form of an assignment, computed without synchronising with a GPU.

    labels [B, A] int64, boxes [B, A, 4], scores [B, A, classes], foreground [B, A] bool, ground truth [B, A] int64.
    A background anchor has the label and box of the first ground truth; in a batch without ground truth the label
    `background` and zeros.
    """
    index, weight = assignment
    batch, anchors = index.shape
    foreground = index >= 0
    scores = weight.new_zeros(batch, anchors, num_classes)
    index = index.clamp(min=0)
    if gt_boxes.shape[1] == 0:
        labels = torch.full_like(index, background)
        return labels, gt_boxes.new_zeros(batch, anchors, 4), scores, foreground, index
    labels = gt_labels.reshape(batch, -1).long().clamp(min=0).gather(1, index)
    boxes = gt_boxes.gather(1, index[..., None].expand(-1, -1, 4))
    scores.scatter_(2, labels.clamp(max=num_classes - 1)[..., None], weight[..., None])
    return labels, boxes, scores, foreground, index


def _assigners_of(criterion: Any, path: str = "", seen: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any, str]]:
    """(path, owner, attribute) of every assigner and matcher of the criterion and of its inner losses."""
    seen = seen | {id(criterion)}
    for name in (*_ASSIGNERS, *_MATCHERS):
        if getattr(criterion, name, None) is not None:
            yield path + name, criterion, name
    for name in _INNER_LOSSES:
        inner = getattr(criterion, name, None)
        if inner is not None and hasattr(inner, "__dict__") and id(inner) not in seen and not isinstance(inner, type):
            yield from _assigners_of(inner, f"{path}{name}.", seen)


def _assigner(original: Any, rule: str | None, returns_index: bool | None) -> FastAssigner | str:
    """What replaces `original`, or why nothing can."""
    kind = type(original)
    name, of_ultralytics = f"{kind.__module__}.{kind.__qualname__}", "ultralytics" in kind.__module__.lower()
    if "rotated" in kind.__name__.lower():
        return f"{name} assigns rotated boxes"
    if rule == "mit":
        return f"{name} is given no strides, which rule 'mit' needs"
    if rule is None and kind.__name__ != "TaskAlignedAssigner":
        return f"{name} is no TaskAlignedAssigner; name its rule to replace it"
    missing = [each for each in ("topk", "num_classes", "alpha", "beta") if not hasattr(original, each)]
    if missing:
        return f"{name} has no {', '.join(missing)}"
    if abs(float(getattr(original, "eps", _EPS)) - _EPS) > 1e-3 * _EPS:
        return f"{name} has eps {original.eps}, ops.assign {_EPS}"
    second = getattr(original, "topk2", None)
    if second is not None and second != original.topk:
        return f"{name} selects a second time, with topk2 {second}"
    if float(original.alpha) < 0 or float(original.beta) <= 0 or int(original.topk) < 1:
        return (
            f"{name} has topk {original.topk}, alpha {original.alpha}, beta {original.beta}, which ops.assign refuses"
        )
    chosen = rule or ("ultralytics" if of_ultralytics else "yolov9")
    try:
        min_side = _min_side(original)
    except (TypeError, ValueError, LookupError):
        min_side = math.nan
    if not 0 <= min_side < math.inf:
        return f"{name} has no number as {' or '.join(_MIN_SIDES)}"
    if min_side and chosen != "ultralytics":
        return f"{name} lengthens short sides to {min_side}, rule {chosen!r} does not"
    return FastAssigner(original, chosen, of_ultralytics if returns_index is None else returns_index)


_MIN_SIDES = ("stride_val", "stride")


def _min_side(assigner: Any) -> float:
    """Pixels to which an assigner lengthens shorter sides when it looks for candidates; 0 for one that does not.

    In Ultralytics the instance holds them: as `stride_val`, in earlier versions as the first `stride`.
    """
    value = next((found for name in _MIN_SIDES if (found := getattr(assigner, name, None)) is not None), 0.0)
    first = value if isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0) else value[0]
    return float(first)


def _matcher(original: Any, rule: str | None) -> FastMatcher | str:
    kind = type(original)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if rule not in (None, "mit"):
        return f"{name} is a matcher, which follows rule 'mit', not {rule!r}"
    if rule is None and kind.__name__ != "BoxMatcher":
        return f"{name} is no BoxMatcher; name its rule to replace it"
    needed: dict[str, Callable[[Any], Any]] = {
        "topk": lambda each: int(each.topk),
        "class_num": lambda each: int(each.class_num),
        "factor['cls'], factor['iou']": lambda each: (float(each.factor["cls"]), float(each.factor["iou"])),
        "vec2box.anchor_grid": lambda each: each.vec2box.anchor_grid.shape,
        "vec2box.scaler": lambda each: each.vec2box.scaler.shape,
    }
    for what, read in needed.items():
        try:
            read(original)
        except (AttributeError, KeyError, TypeError, ValueError):
            return f"{name} has no {what}"
    if int(getattr(original, "reg_max", REG_MAX)) != REG_MAX:
        return f"{name} has reg_max {original.reg_max}, ops.assign {REG_MAX}"
    if "ciou" not in str(getattr(original, "iou", "CIoU")).lower():
        return f"{name} measures overlap by {original.iou}, ops.assign by CIoU"
    return FastMatcher(original)
