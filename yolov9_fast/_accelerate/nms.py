"""The operators `nms` and `nms_boxes` with the signatures of other code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from yolov9_fast.ops._nms import nms, warn_if_cut
from yolov9_fast.ops._nms_boxes import nms_boxes

Labels = Sequence[Tensor]


def non_max_suppression_wongkinyiu(
    prediction: Tensor | Sequence[Any],
    conf_thres: float = 0.25,
    iou_thres: float = 0.45,
    classes: Sequence[int] | None = None,
    agnostic: bool = False,
    multi_label: bool = False,
    labels: Labels = (),
    max_det: int = 300,
    nm: int = 0,
) -> list[Tensor]:
    """NMS as the YOLOv5 to YOLOv9 family of repositories calls it.

    Args:
        prediction: [B, 4 + nc + nm, A] (centre x, y, width, height, class scores, mask coefficients), or a list or
            tuple whose first item is that.
        labels: for each image [n, 5] rows (class, centre x, y, width, height) that join the candidates with score 1.
        nm: mask coefficients behind the scores.

    Returns:
        For each image [n, 6 + nm] float32: x1, y1, x2, y2, score, class, mask coefficients; descending scores.
    """
    prediction = _first_tensor(prediction)
    return _per_image(
        prediction, prediction.shape[1] - 4 - nm, conf_thres, iou_thres, classes, agnostic, multi_label, labels, max_det
    )


def non_max_suppression_ultralytics(
    prediction: Tensor | Sequence[Any],
    conf_thres: float = 0.25,
    iou_thres: float = 0.45,
    classes: Sequence[int] | Tensor | None = None,
    agnostic: bool = False,
    multi_label: bool = False,
    labels: Labels = (),
    max_det: int = 300,
    nc: int = 0,
    max_time_img: float = 0.05,
    max_nms: int = 30000,
    max_wh: int = 7680,
    in_place: bool = True,
    rotated: bool = False,
    end2end: bool = False,
    return_idxs: bool = False,
) -> list[Tensor]:
    """NMS as the Ultralytics package calls it.

    Without effect: `max_time_img` (there is no time limit), `max_wh` (classes are compared, boxes are not shifted),
    `in_place` (the prediction is never changed).

    Args:
        prediction: [B, 4 + nc + nm, A], or a list or tuple whose first item is that; or, with `end2end` or a last
            dimension of 6, rows [B, n, 6 or more] (x1, y1, x2, y2, score, class, …), which are filtered only.
        labels: as for `non_max_suppression_wongkinyiu`.
        nc: number of classes; 0 takes all channels behind the box as classes, otherwise the rest are mask coefficients.
        max_nms: candidates of an image before suppression.

    Returns:
        For each image [n, 6 + nm] float32: x1, y1, x2, y2, score, class, mask coefficients; descending scores.

    Raises:
        NotImplementedError: rotated boxes, or the indices of what was kept (`return_idxs`).
    """
    if rotated:
        raise NotImplementedError("non_max_suppression: rotated boxes are not supported")
    if return_idxs:
        raise NotImplementedError("non_max_suppression: return_idxs is not supported; ops.nms gives the anchors")
    prediction = _first_tensor(prediction)
    chosen = classes.flatten().tolist() if isinstance(classes, Tensor) else classes
    if end2end or prediction.shape[-1] == 6:
        return [_filtered(rows, conf_thres, chosen, max_det) for rows in prediction]
    return _per_image(
        prediction,
        nc or prediction.shape[1] - 4,
        conf_thres,
        iou_thres,
        chosen,
        agnostic,
        multi_label,
        labels,
        max_det,
        max_nms,
    )


def torchvision_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices int64 [k] of the boxes [n, 4] (x1, y1, x2, y2) that stay, descending scores; float32 arithmetic."""
    kept = nms_boxes(boxes, scores, iou=iou_threshold)
    return kept.index[: int(kept.count)]


def torchvision_batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """As `torchvision_nms`; boxes suppress each other only where their `idxs` [n] are equal."""
    kept = nms_boxes(boxes, scores, idxs, iou=iou_threshold)
    return kept.index[: int(kept.count)]


@dataclass(frozen=True)
class NMSFunctions:
    """What `accelerate_nms` returns: one function for each signature."""

    wongkinyiu: Callable[..., list[Tensor]] = non_max_suppression_wongkinyiu
    ultralytics: Callable[..., list[Tensor]] = non_max_suppression_ultralytics
    nms: Callable[..., Tensor] = torchvision_nms
    batched_nms: Callable[..., Tensor] = torchvision_batched_nms


@overload
def accelerate_nms() -> NMSFunctions: ...


@overload
def accelerate_nms(*, patch: Any, attribute: str = ..., style: str | None = ...) -> Callable[[], None]: ...


def accelerate_nms(
    *, patch: Any = None, attribute: str = "non_max_suppression", style: str | None = None
) -> NMSFunctions | Callable[[], None]:
    """NMS functions for other code; nothing is changed unless `patch` is given.

    Without arguments: `NMSFunctions` with `wongkinyiu` and `ultralytics` (their `non_max_suppression`), `nms` and
    `batched_nms` (torchvision's).

    Args:
        patch: a module (or object) whose `attribute` is replaced. A module that has already imported the function by
            name keeps the old one: patch the module that calls it.
        attribute: the name of the function in `patch`.
        style: one of the four names above; None chooses by the signature of the replaced function.

    Returns:
        With `patch`: a function that restores the old one.

    Raises:
        AttributeError: `patch` has no such attribute.
        ValueError: an unknown style, or a function whose signature is none of the four.
    """
    functions = NMSFunctions()
    if patch is None:
        return functions
    before = getattr(patch, attribute)
    setattr(patch, attribute, getattr(functions, _style_of(before, style)))

    def undo() -> None:
        setattr(patch, attribute, before)

    return undo


_STYLES = {
    "ultralytics": {"prediction", "conf_thres", "max_nms"},
    "wongkinyiu": {"prediction", "conf_thres", "nm"},
    "batched_nms": {"boxes", "scores", "idxs", "iou_threshold"},
    "nms": {"boxes", "scores", "iou_threshold"},
}


def _style_of(function: Any, style: str | None) -> str:
    if style is not None:
        if style not in _STYLES:
            raise ValueError(f"style: expected one of {', '.join(_STYLES)}, got {style!r}")
        return style
    try:
        parameters = set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        parameters = set()
    for name, needed in _STYLES.items():
        if needed <= parameters:
            return name
    raise ValueError(f"style: expected one of {', '.join(_STYLES)}, as {function!r} has none of their signatures")


def _first_tensor(prediction: Any) -> Tensor:
    first = prediction[0] if isinstance(prediction, list | tuple) and prediction else prediction
    if not isinstance(first, Tensor):
        raise TypeError(
            f"prediction: expected a tensor or a list or tuple that begins with one, got {type(prediction).__name__}"
            + (f" of {type(first).__name__}; pass the one of the main branch" if first is not prediction else "")
        )
    if first.dim() != 3:
        raise ValueError(f"prediction: expected three dimensions, got shape {list(first.shape)}")
    return first


@torch.no_grad()
def _per_image(
    prediction: Tensor,
    number: int,
    conf: float,
    iou: float,
    classes: Sequence[int] | None,
    agnostic: bool,
    multi_label: bool,
    labels: Labels,
    max_det: int,
    max_candidates: int = 30000,
) -> list[Tensor]:
    """`nms` over the first `number` classes; for each image rows with the channels after the classes appended."""
    if not 1 <= number <= prediction.shape[1] - 4:
        raise ValueError(
            f"prediction: expected 1 class or more and at least {4 + number} channels, "
            f"got {number} and {prediction.shape[1]}"
        )
    if len(labels):
        prediction = torch.cat((prediction, _as_candidates(labels, prediction, number)), 2)
    found = nms(
        prediction[:, : 4 + number],
        conf=conf,
        iou=iou,
        multi_label=multi_label,
        agnostic=agnostic,
        classes=None if classes is None else [label for label in map(int, classes) if 0 <= label < number],
        max_det=max_det,
        max_candidates=max_candidates,
    )
    counts = found.count.tolist()
    warn_if_cut(found, max_candidates)
    assert found.anchor is not None
    rows = []
    for image, count in enumerate(counts):
        extra = prediction[image, 4 + number :, found.anchor[image, :count]].T.float()
        rows.append(torch.cat((found.boxes[image, :count], extra), 1))
    return rows


def _as_candidates(labels: Labels, prediction: Tensor, number: int) -> Tensor:
    """[B, channels, most labels of an image]: known boxes with score 1 in their class, zero elsewhere."""
    if len(labels) != len(prediction):
        raise ValueError(f"labels: expected one tensor for each of {len(prediction)} images, got {len(labels)}")
    known = prediction.new_zeros(*prediction.shape[:2], max(len(rows) for rows in labels))
    for image, rows in enumerate(labels):
        if len(rows) == 0:
            continue
        rows = rows.to(known)
        label = rows[:, 0].long()
        if bool((label < 0).any()) or bool((label >= number).any()):
            raise ValueError(f"labels: expected classes in [0, {number}), got {label.tolist()}")
        position = torch.arange(len(rows), device=known.device)
        known[image, :4, : len(rows)] = rows[:, 1:5].T
        known[image, 4 + label, position] = 1
    return known


def _filtered(rows: Tensor, conf: float, classes: Sequence[int] | None, max_det: int) -> Tensor:
    """Rows [n, ≥ 6] of a network that needs no NMS: those above `conf` of the chosen classes."""
    rows = rows[rows[:, 4] > conf][:max_det]
    if classes is None:
        return rows
    return rows[torch.isin(rows[:, 5], torch.tensor(list(classes), device=rows.device, dtype=rows.dtype))]
