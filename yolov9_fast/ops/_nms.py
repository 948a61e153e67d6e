"""Class-aware non-maximum suppression of a batch, with a fixed-size result."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from yolov9_fast.ops._boxes import xywh_to_xyxy
from yolov9_fast.ops._checks import check_floating
from yolov9_fast.ops._operator import Compiled, Kernel, Operator
from yolov9_fast.ops._supports import not_for_compiled

_log = logging.getLogger(__name__)
_warned: set[str] = set()
# Candidates whose overlaps with each other are computed at once.
_BLOCK = 256
MAX_CANDIDATES = 30000
# Compiled kernels number the pairs of anchor and class in 32 bits; CUDA takes the chosen classes as kernel arguments.
_MAX_PAIRS = 2**32 - 1
_MAX_CHOSEN = 24576


class Detections(NamedTuple):
    """`boxes` [B, max_det, 6] float32: x1, y1, x2, y2 in pixels, score, class, by descending score, then zeros; `count`
    [B] int64: detections of each image; `candidates` [B] int64: candidates of each image before the cut to
    `max_candidates`; `anchor` [B, max_det] int64: the anchor of each row, −1 after the last detection."""

    boxes: Tensor
    count: Tensor  # type: ignore[assignment]
    candidates: Tensor | None = None
    anchor: Tensor | None = None


def nms(
    prediction: Tensor,
    *,
    conf: float = 0.001,
    iou: float = 0.7,
    multi_label: bool = True,
    agnostic: bool = False,
    classes: Sequence[int] | None = None,
    max_det: int = 300,
    max_candidates: int = MAX_CANDIDATES,
) -> Detections:
    """Greedy NMS: by descending score, a candidate is kept unless a kept one of its class overlaps it by over `iou`.

    A candidate is a pair (anchor, class) with score > conf. Candidates are sorted by descending score, equal scores by
    anchor, then class. IoU is inter / (area + area − inter) in float32; a pair without area suppresses nothing. No
    time limit. A candidate with a score or box that is not finite is ignored. Where an image has more than
    `max_candidates`, the best are used, `candidates` of the result counts all, and a warning is logged once per process
    (not on a GPU, where reading the count would synchronise: call `warn_if_cut` where the result is read).

    Args:
        prediction: [B, 4 + nc, A] of `decode`: centre x, y, width, height in pixels, scores. Computed in float32.
        conf, iou: thresholds in [0, 1]; only values above count.
        multi_label: every class above `conf` is a candidate; otherwise only the best class of each anchor.
        agnostic: boxes suppress each other across classes.
        classes: keep these classes only; None keeps all.
        max_det: rows of the result.
        max_candidates: candidates of one image before suppression.

    Returns:
        Detections(boxes [B, max_det, 6], count [B], candidates [B], anchor [B, max_det]).

    Raises:
        TypeError: a prediction that is not a floating-point tensor.
        ValueError: another shape, thresholds outside [0, 1], max_det or max_candidates below 1, a class ≥ nc.
    """
    chosen = _check(prediction, conf, iou, classes, max_det, max_candidates)
    found = Detections(
        *OPERATOR(prediction.detach(), conf, iou, multi_label, agnostic, chosen, max_det, max_candidates)
    )
    if not torch.compiler.is_compiling() and prediction.device.type == "cpu":
        warn_if_cut(found, max_candidates)
    return found


def warn_if_cut(found: Detections, max_candidates: int = MAX_CANDIDATES) -> None:
    """Log, once per process, that an image had more candidates than `nms` used; waits for a GPU's result."""
    if found.candidates is None or found.candidates.numel() == 0 or "max_candidates" in _warned:
        return
    most = int(found.candidates.max())
    if most > max_candidates:
        _warned.add("max_candidates")
        _log.warning(
            "nms: %d candidates in one image, only the best %d are used (max_candidates)", most, max_candidates
        )


def _check(
    prediction: Tensor, conf: float, iou: float, classes: Sequence[int] | None, max_det: int, max_candidates: int
) -> list[int] | None:
    check_floating("prediction", prediction)
    if prediction.dim() != 3 or prediction.shape[1] < 5:
        raise ValueError(f"prediction: expected [B, 4 + nc, A] with nc of at least 1, got {list(prediction.shape)}")
    for name, value in (("conf", conf), ("iou", iou)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a value in [0, 1], got {value}")
    for name, value in (("max_det", max_det), ("max_candidates", max_candidates)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if classes is None:
        return None
    if isinstance(classes, str):
        raise ValueError(f"classes: expected integers, got the text {classes[:20]!r}")
    chosen = [int(label) for label in classes]
    number = prediction.shape[1] - 4
    if any(not 0 <= label < number for label in chosen):
        raise ValueError(f"classes: expected indices in [0, {number}), got {chosen}")
    return chosen


@torch.no_grad()
def nms_reference(
    prediction: Tensor,
    conf: float,
    iou: float,
    multi_label: bool,
    agnostic: bool,
    classes: list[int] | None,
    max_det: int,
    max_candidates: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`nms` in eager PyTorch, image by image."""
    prediction = prediction.float()
    boxes = prediction.new_zeros(prediction.shape[0], max_det, 6)
    count = torch.zeros(prediction.shape[0], dtype=torch.int64, device=prediction.device)
    candidates = torch.zeros_like(count)
    anchors = torch.full(boxes.shape[:2], -1, dtype=torch.int64, device=prediction.device)
    for image, values in enumerate(prediction):
        found, anchor, number = _candidates(values, conf, multi_label, classes, max_candidates)
        kept = greedy(found[:, :4], None if agnostic else found[:, 5], iou, max_det)
        boxes[image, : len(kept)] = found[kept]
        anchors[image, : len(kept)] = anchor[kept]
        count[image] = len(kept)
        candidates[image] = number
    return boxes, count, candidates, anchors


def _candidates(
    prediction: Tensor, conf: float, multi_label: bool, classes: list[int] | None, limit: int
) -> tuple[Tensor, Tensor, int]:
    """Of one image [4 + nc, A]: rows [n, 6] (x1, y1, x2, y2, score, class), best first; their anchors [n]; and the
    number of candidates before the limit."""
    scores = prediction[4:].T
    if multi_label:
        anchor, label = torch.nonzero(scores > conf, as_tuple=True)
        score = scores[anchor, label]
    else:
        # A NaN would win the maximum over the anchor's other classes.
        score, label = torch.where(scores.isfinite(), scores, -1.0).max(1)
        anchor = torch.nonzero(score > conf)[:, 0]
        score, label = score[anchor], label[anchor]
    boxes = xywh_to_xyxy(prediction[:4].T)
    valid = score.isfinite() & boxes.isfinite().all(1)[anchor]
    if classes is not None:
        valid &= torch.isin(label, torch.tensor(classes, device=label.device, dtype=label.dtype))
    anchor, label, score = anchor[valid], label[valid], score[valid]
    number = len(score)
    if number > limit:
        above = score >= score.topk(limit, sorted=False).values.min()
        anchor, label, score = anchor[above], label[above], score[above]
    score, order = score.sort(descending=True, stable=True)
    best = order[:limit]
    rows = torch.cat((boxes[anchor[best]], score[:limit, None], label[best, None].to(boxes.dtype)), 1)
    return rows, anchor[best], number


def greedy(boxes: Tensor, labels: Tensor | None, iou: float, max_det: int) -> Tensor:
    """Indices of the boxes that are kept of [n, 4], sorted by descending score, at most `max_det`."""
    kept = torch.empty(0, dtype=torch.int64, device=boxes.device)
    for block in torch.split(torch.arange(len(boxes), device=boxes.device), _BLOCK):
        alive = ~_suppresses(boxes, labels, kept, block, iou).any(0)
        block = block[alive]
        within = _suppresses(boxes, labels, block, block, iou).triu(diagonal=1)
        kept = torch.cat((kept, block[_resolve(within)]))
        if len(kept) >= max_det:
            break
    return kept[:max_det]


def _resolve(suppresses: Tensor) -> Tensor:
    """Which elements [n] are kept, for a strictly upper triangular matrix: [i, j] if i, where kept, suppresses j.

    Repeats "kept unless a kept one suppresses it": after r iterations every element whose chain of suppressors is
    shorter than r is final, so the loop ends at the only solution, mostly after a few iterations.
    """
    kept = ~suppresses.any(0)
    while True:
        again = ~(suppresses & kept[:, None]).any(0)
        if torch.equal(again, kept):
            return kept
        kept = again


def _suppresses(boxes: Tensor, labels: Tensor | None, first: Tensor, second: Tensor, iou: float) -> Tensor:
    """[len(first), len(second)] bool: whether the boxes of these indices overlap by more than `iou` in one class."""
    a, b = boxes[first], boxes[second]
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    inter_w, inter_h = (high - low).clamp_(min=0).unbind(-1)
    inter = inter_w * inter_h
    union = _area(a)[:, None] + _area(b)[None] - inter
    over = inter / union > iou
    return over if labels is None else over & (labels[first][:, None] == labels[second][None])


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


# ---- kernels


def _fake(
    prediction: Tensor,
    conf: float,
    iou: float,
    multi_label: bool,
    agnostic: bool,
    classes: list[int] | None,
    max_det: int,
    max_candidates: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images = prediction.shape[0]
    return (
        prediction.new_empty((images, max_det, 6), dtype=torch.float32),
        prediction.new_empty((images,), dtype=torch.int64),
        prediction.new_empty((images,), dtype=torch.int64),
        prediction.new_empty((images, max_det), dtype=torch.int64),
    )


class _Kernels(NamedTuple):
    forward: Callable[..., Any]


KERNELS = _Kernels(
    Kernel(
        "nms(Tensor prediction, float conf, float iou, bool multi_label, bool agnostic, int[]? classes, int max_det, "
        "int max_candidates) -> (Tensor boxes, Tensor count, Tensor candidates, Tensor anchor)",
        nms_reference,
        _fake,
    )
)


# ---- backends


def _run(kernels: _Kernels, prediction: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    prediction = prediction.float()
    if prediction.stride(2) != 1:  # any other stride is read as it is; `contiguous` leaves an empty tensor's
        prediction = prediction.clone(memory_format=torch.contiguous_format)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = kernels.forward(prediction, *options)
    return result


def _supports(
    device: str,
    prediction: Tensor,
    conf: float,
    iou: float,
    multi_label: bool,
    agnostic: bool,
    classes: list[int] | None,
    *rest: Any,
) -> str | None:
    number = prediction.shape[1] - 4
    pairs = number * prediction.shape[2]
    if pairs > _MAX_PAIRS:
        return f"it numbers at most {_MAX_PAIRS} pairs of anchor and class, got {pairs}"
    if device == "cuda" and classes is not None and number > _MAX_CHOSEN:
        return f"it selects from at most {_MAX_CHOSEN} classes, got {number}"
    return not_for_compiled(device, prediction)


OPERATOR = Operator(
    "nms",
    "class-aware non-maximum suppression",
    reference=nms_reference,
    kernels=KERNELS,
    run=_run,
    backends={device: Compiled(functools.partial(_supports, device)) for device in ("cpu", "cuda")},
)
