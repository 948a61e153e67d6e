"""The operators `nms` and `nms_boxes` with the signatures of other code."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from yolov9_fast.ops._nms import nms, warn_if_cut
from yolov9_fast.ops._nms_boxes import nms_boxes

Labels = Sequence[Tensor]
Classes = int | Iterable[Any] | Tensor | None
"""One class or several: int, sequence, set, array or tensor; None takes all."""


def non_max_suppression_wongkinyiu(
    prediction: Tensor | Sequence[Any],
    conf_thres: float = 0.25,
    iou_thres: float = 0.45,
    classes: Classes = None,
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
    classes: Classes = None,
    agnostic: bool = False,
    multi_label: bool = False,
    *positional: Any,
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

    The seventh positional argument is `labels` in some of its versions and `max_det` in others: a number is taken as
    `max_det`. Later arguments are given by name; `accelerate_nms(patch=...)` takes the order of what it replaces.

    Without effect: `max_time_img` (there is no time limit), `max_wh` (classes are compared, boxes are not shifted),
    `in_place` (the prediction is never changed).

    Args:
        prediction: [B, 4 + nc + nm, A], or a list or tuple whose first item is that; or, with `end2end` or a last
            dimension of 6, rows [B, n, 6 or more] (x1, y1, x2, y2, score, class, …), which are filtered only: the
            first `max_det` of those with more than `conf_thres` of the chosen classes.
        labels: as for `non_max_suppression_wongkinyiu`.
        nc: number of classes; 0 takes all channels behind the box as classes, otherwise the rest are mask coefficients.
        max_nms: candidates of an image before suppression.

    Returns:
        For each image [n, 6 + nm] float32: x1, y1, x2, y2, score, class, mask coefficients; descending scores.

    Raises:
        NotImplementedError: rotated boxes, or the indices of what was kept (`return_idxs`).
        TypeError: eight positional arguments or more.
    """
    if len(positional) > 1:
        raise TypeError(
            f"non_max_suppression: expected 7 positional arguments at most, got {6 + len(positional)}; the order "
            f"of the others differs between versions of Ultralytics, so give them by name"
        )
    if positional and isinstance(positional[0], Sequence):
        labels = positional[0]
    elif positional:
        max_det = int(positional[0])
    if rotated:
        raise NotImplementedError("non_max_suppression: rotated boxes are not supported")
    if return_idxs:
        raise NotImplementedError("non_max_suppression: return_idxs is not supported; ops.nms gives the anchors")
    prediction = _first_tensor(prediction)
    if end2end or prediction.shape[-1] == 6:
        chosen = _chosen(classes)
        return [_filtered(rows, conf_thres, chosen, max_det) for rows in prediction]
    return _per_image(
        prediction,
        nc or prediction.shape[1] - 4,
        conf_thres,
        iou_thres,
        classes,
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
        style: one of the four names above; None chooses by the signature of the replaced function, whose order, names
            and defaults of arguments hold.

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
    setattr(patch, attribute, _as_called(before, getattr(functions, _style_of(before, style))))

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


def _as_called(before: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the order, names and defaults of the arguments of `before`, where they are known."""
    try:
        signature = inspect.signature(before)
    except (TypeError, ValueError):
        return function
    known = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not parameter.VAR_POSITIONAL
    ]
    if not set(known[:2]) <= set(signature.parameters):  # its style was named, its arguments have other names
        return function

    @functools.wraps(before)
    def call(*positional: Any, **named: Any) -> Any:
        given = signature.bind(*positional, **named)
        unknown = [name for name in given.arguments if name not in known]
        if unknown:
            raise TypeError(f"{before.__name__}: the replacement has no argument {', '.join(unknown)}")
        given.apply_defaults()
        return function(**{name: value for name, value in given.arguments.items() if name in known})

    return call


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
    classes: Classes,
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
    chosen = _chosen(classes)
    found = nms(
        prediction[:, : 4 + number],
        conf=conf,
        iou=iou,
        multi_label=multi_label,
        agnostic=agnostic,
        classes=None if chosen is None else [label for label in chosen if label < number],
        max_det=max_det,
        max_candidates=max_candidates,
    )
    assert found.candidates is not None
    assert found.anchor is not None
    counts, candidates = torch.stack((found.count, found.candidates)).cpu()
    warn_if_cut(found._replace(candidates=candidates), max_candidates)
    rows = []
    for image, count in enumerate(counts.tolist()):
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
    """Rows [n, ≥ 6] float32 of a network that needs no NMS: the first `max_det` above `conf` of the chosen classes."""
    wanted = rows[:, 4] > conf
    if classes is not None:
        wanted &= torch.isin(rows[:, 5].float(), torch.tensor(classes, device=rows.device, dtype=torch.float32))
    return rows[wanted][:max_det].float()


def _chosen(classes: Classes) -> list[int] | None:
    """The classes that exist among `classes`, whose elements are numbers: what is no index matches nothing.

    Raises:
        TypeError: something other than numbers.
    """
    if classes is None:
        return None
    try:
        values = torch.as_tensor(
            classes if not isinstance(classes, Iterable) or hasattr(classes, "shape") else [*classes]
        )
        numbers = values.double().flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"classes: expected a number or several, got {classes!r:.100}") from None
    return [int(number) for number in numbers if number >= 0 and number == int(number)]
