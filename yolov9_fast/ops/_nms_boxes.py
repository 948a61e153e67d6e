"""Non-maximum suppression among given boxes and scores of one image: which of them stay."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from yolov9_fast.ops import _library as library
from yolov9_fast.ops._backend import Implementation, Operator, not_on, register, select
from yolov9_fast.ops._nms import greedy

_MAX_BOXES = 2**31 - 1


class KeptBoxes(NamedTuple):
    """`index` [max_det] int64: the boxes that stay, score falling, −1 after the end; `count` [] int64: how many."""

    index: Tensor  # type: ignore[assignment]
    count: Tensor  # type: ignore[assignment]


def nms_boxes(
    boxes: Tensor, scores: Tensor, labels: Tensor | None = None, *, iou: float, max_det: int | None = None
) -> KeptBoxes:
    """Greedy NMS: the best box stays, those of its label that overlap it by more than `iou` go, and so on.

    Order: falling score, NaN first as in sorting, equal scores by index. IoU is inter / (area + area − inter) in
    float32; a box with a NaN neither suppresses nor is suppressed. No gradient, no synchronisation.

    Args:
        boxes: [n, 4] x1, y1, x2, y2 in any one unit, any floating dtype.
        scores: [n], any floating dtype.
        labels: [n] integers; boxes suppress each other within a label only. None: all are of one.
        iou: threshold, at least 0; strictly above counts.
        max_det: at most so many stay, and the length of the result; None: n.

    Raises:
        TypeError: boxes or scores that are no floating tensors, labels that are no integers.
        ValueError: another shape, tensors on different devices, iou below 0, max_det below 0.
    """
    _check(boxes, scores, labels, iou, max_det)
    number = None if labels is None else labels.detach().long().contiguous()
    args = (
        boxes.detach().float().contiguous(),
        scores.detach().float().contiguous(),
        number,
        iou,
        boxes.shape[0] if max_det is None else max_det,
    )
    return KeptBoxes(*select(OPERATOR, *args)(*args))


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


def _check(boxes: Tensor, scores: Tensor, labels: Tensor | None, iou: float, max_det: int | None) -> None:
    for name, tensor in (("boxes", boxes), ("scores", scores)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"nms_boxes: {name} must be a floating-point tensor, got {got}")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"nms_boxes: boxes must have shape [n, 4], got {list(boxes.shape)}")
    if scores.dim() != 1 or scores.shape[0] != boxes.shape[0]:
        raise ValueError(f"nms_boxes: scores must have shape [{boxes.shape[0]}], got {list(scores.shape)}")
    if labels is not None:
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
            got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"nms_boxes: labels must be an integer tensor, got {got}")
        if labels.shape != scores.shape:
            raise ValueError(f"nms_boxes: labels must have shape [{boxes.shape[0]}], got {list(labels.shape)}")
    for other in (scores, labels):
        if other is not None and other.device != boxes.device:
            raise ValueError(f"nms_boxes: tensors must be on one device, got {boxes.device} and {other.device}")
    if not iou >= 0:
        raise ValueError(f"nms_boxes: iou must be at least 0, got {iou}")
    if max_det is not None and max_det < 0:
        raise ValueError(f"nms_boxes: max_det must be at least 0, got {max_det}")


def _fake(boxes: Tensor, scores: Tensor, labels: Tensor | None, iou: float, max_det: int) -> tuple[Tensor, Tensor]:
    return scores.new_empty((max_det,), dtype=torch.int64), scores.new_empty((), dtype=torch.int64)


_ARGUMENTS = "Tensor boxes, Tensor scores, Tensor? labels, float iou, int max_det"
_compiled = library.define(
    f"nms_boxes({_ARGUMENTS}) -> (Tensor index, Tensor count)", fake=_fake, reference=nms_boxes_reference
)


def _cannot(device: str, boxes: Tensor) -> str | None:
    if boxes.shape[0] > _MAX_BOXES:
        return f"it takes at most {_MAX_BOXES} boxes, got {boxes.shape[0]}"
    return not_on(device, boxes)


OPERATOR = register(
    Operator(
        "nms_boxes",
        "non-maximum suppression among given boxes",
        {
            "eager": Implementation(nms_boxes_reference),
            "cpu": Implementation(
                _compiled, library.missing("nms_boxes", "cpu"), lambda boxes, *args: _cannot("cpu", boxes)
            ),
            "cuda": Implementation(
                _compiled, library.missing("nms_boxes", "cuda"), lambda boxes, *args: _cannot("cuda", boxes)
            ),
        },
    )
)
