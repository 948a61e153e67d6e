"""Non-maximum suppression of given boxes and scores of one image: which of them are kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from yolov9_fast.ops._checks import check_floating, check_integers, check_one_device
from yolov9_fast.ops._nms import greedy
from yolov9_fast.ops._operator import Compiled, Kernel, Operator
from yolov9_fast.ops._supports import not_for_compiled

_MAX_BOXES = 2**31 - 1


class KeptBoxes(NamedTuple):
    """`index` [max_det] int64: the boxes that are kept, in descending order of score, −1 after the last; `count` []
    int64: their number."""

    index: Tensor  # type: ignore[assignment]
    count: Tensor  # type: ignore[assignment]


def nms_boxes(
    boxes: Tensor, scores: Tensor, labels: Tensor | None = None, *, iou: float, max_det: int | None = None
) -> KeptBoxes:
    """Greedy NMS: by descending score, a box is kept unless a kept one of its label overlaps it by over `iou`.

    Order: descending score, NaN first as in `torch.sort`, equal scores by index. IoU is inter / (area + area − inter)
    in float32; a box with a NaN neither suppresses nor is suppressed. No gradient, no synchronisation.

    Args:
        boxes: [n, 4] x1, y1, x2, y2 in any one unit, any floating dtype.
        scores: [n], any floating dtype.
        labels: [n] integers; boxes suppress each other within a label only. None: all have the same label.
        iou: threshold, at least 0; only values above count.
        max_det: how many boxes are kept at most, and the length of the result; None: n.

    Raises:
        TypeError: boxes or scores that are not floating-point tensors, labels that are not integers.
        ValueError: another shape, tensors on different devices, iou below 0, max_det below 0.
    """
    _check(boxes, scores, labels, iou, max_det)
    return KeptBoxes(
        *OPERATOR(
            boxes.detach().float().contiguous(),
            scores.detach().float().contiguous(),
            None if labels is None else labels.detach().long().contiguous(),
            iou,
            boxes.shape[0] if max_det is None else max_det,
        )
    )


def _check(boxes: Tensor, scores: Tensor, labels: Tensor | None, iou: float, max_det: int | None) -> None:
    check_floating("boxes", boxes)
    check_floating("scores", scores)
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes: expected [n, 4], got {list(boxes.shape)}")
    number = boxes.shape[0]
    if scores.dim() != 1 or scores.shape[0] != number:
        raise ValueError(f"scores: expected [{number}], got {list(scores.shape)}")
    if labels is not None:
        check_integers("labels", labels)
        if labels.shape != scores.shape:
            raise ValueError(f"labels: expected [{number}], got {list(labels.shape)}")
    check_one_device(boxes=boxes, scores=scores, labels=labels)
    if not iou >= 0:
        raise ValueError(f"iou: expected at least 0, got {iou}")
    if max_det is not None and max_det < 0:
        raise ValueError(f"max_det: expected at least 0, got {max_det}")


@torch.no_grad()
def nms_boxes_reference(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, iou: float, max_det: int
) -> tuple[Tensor, Tensor]:
    """`nms_boxes` in eager PyTorch."""
    order = scores.sort(descending=True, stable=True).indices
    kept = order[greedy(boxes[order], None if labels is None else labels[order], iou, max_det)]
    index = torch.full((max_det,), -1, dtype=torch.int64, device=boxes.device)
    index[: len(kept)] = kept
    return index, torch.tensor(len(kept), device=boxes.device)


# ---- kernels


def _fake(boxes: Tensor, scores: Tensor, labels: Tensor | None, iou: float, max_det: int) -> tuple[Tensor, Tensor]:
    return scores.new_empty((max_det,), dtype=torch.int64), scores.new_empty((), dtype=torch.int64)


class _Kernels(NamedTuple):
    forward: Callable[..., Any]


KERNELS = _Kernels(
    Kernel(
        "nms_boxes(Tensor boxes, Tensor scores, Tensor? labels, float iou, int max_det) "
        "-> (Tensor index, Tensor count)",
        nms_boxes_reference,
        _fake,
    )
)


# ---- backends


def _supports(device: str, boxes: Tensor, *rest: Any) -> str | None:
    if boxes.shape[0] > _MAX_BOXES:
        return f"it takes at most {_MAX_BOXES} boxes, got {boxes.shape[0]}"
    return not_for_compiled(device, boxes)


OPERATOR = Operator(
    "nms_boxes",
    "non-maximum suppression among given boxes",
    reference=nms_boxes_reference,
    kernels=KERNELS,
    backends={device: Compiled(functools.partial(_supports, device)) for device in ("cpu", "cuda")},
)
