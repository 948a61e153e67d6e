"""Targets of the operators on boxes and head maps: decode, assignment, loss, IoU and suppression."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from tests.fuzz.frame import Case, target
from tests.fuzz.operators import DTYPES, LIMITS, SPECIAL, Invocation, Made, check, finite, side, spoil, tensor
from yolov9_fast import ops
from yolov9_fast.ops import Assignment

ODD_COUNTS = [-1, 0, 10**9, 2**31, 2**40]
"""Counts that must be refused, or must not be allocated."""


def boxes(case: Case, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **fixed: Any) -> Made:
    scale = case.draw(st.sampled_from([0.0, 1.0, 20.0, 1e4]), f"{name}.scale")
    return tensor(case, name, shape, dtype, kinds=["boxes", "normal"], scale=scale, shift=scale / 2, **fixed)


def float_dtype(case: Case, name: str = "dtype") -> torch.dtype:
    return case.draw(st.sampled_from(DTYPES), name)


@target("box_iou", **LIMITS)
def box_iou(case: Case) -> None:
    a, b = (
        boxes(case, name, (side(case, "n", 20), 4), float_dtype(case), gradient=True)
        for name in ("a", "b")
    )  # fmt: skip
    check(Invocation("box_iou", ops.box_iou, spoil(case, [a, b]), gradients=False))


@target("nms", **LIMITS)
def nms(case: Case) -> None:
    batch, classes, anchors = side(case, "batch", 3), side(case, "classes", 6), side(case, "anchors", 60)
    prediction = tensor(
        case, "prediction", (batch, 4 + classes, anchors), float_dtype(case), kinds=["uniform", "ties", "normal"],
        scale=case.draw(st.sampled_from([1.0, 30.0]), "scale"),
    )  # fmt: skip
    options = {
        "conf": case.draw(st.sampled_from([0.0, 0.001, 0.5, 1.0, -1.0, float("nan")]), "conf"),
        "iou": case.draw(st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.0, float("nan")]), "iou"),
        "multi_label": case.draw(st.booleans(), "multi_label"),
        "agnostic": case.draw(st.booleans(), "agnostic"),
        "classes": case.draw(st.none() | st.lists(st.integers(-1, 7), max_size=3), "classes"),
        "max_det": case.draw(st.integers(1, 70) | st.sampled_from([-1, 0]), "max_det"),
        "max_candidates": case.draw(st.integers(1, 300) | st.sampled_from(ODD_COUNTS), "max_candidates"),
    }
    arguments = spoil(case, [prediction])
    check(Invocation("nms", lambda prediction: ops.nms(prediction, **options), arguments, exact=True))


@target("nms_boxes", **LIMITS)
def nms_boxes(case: Case) -> None:
    count = side(case, "count", 80)
    given = boxes(case, "boxes", (count, 4), float_dtype(case))
    scores = tensor(case, "scores", (count,), float_dtype(case), kinds=["uniform", "ties", "normal"])
    has_labels = case.draw(st.booleans(), "has labels")
    labels = (
        tensor(case, "labels", (count,), torch.int64, kinds=["integers"], specials=(), scale=3) if has_labels else None
    )
    iou = case.draw(st.sampled_from([0.0, 0.5, 1.0, float("inf"), -1.0, float("nan")]), "iou")
    max_det = case.draw(st.none() | st.integers(-1, 100), "max_det")

    def call(boxes: Any, scores: Any, labels: Any) -> Any:
        return ops.nms_boxes(boxes, scores, labels, iou=iou, max_det=max_det)

    check(Invocation("nms_boxes", call, spoil(case, [given, scores, labels]), exact=True))


@target("assign", **LIMITS)
def assign(case: Case) -> None:
    batch, anchors = side(case, "batch", 3), side(case, "anchors", 50)
    classes, count = side(case, "classes", 5), side(case, "count", 8)
    dtype = case.draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.float64]), "dtype")
    label_shape = (batch, count, 1) if case.draw(st.booleans(), "column") else (batch, count)
    rule = case.draw(st.sampled_from(["yolov9", "ultralytics", "mit", "mit", "other"]), "rule")
    strides = tensor(case, "strides", (anchors,), kinds=["uniform"], scale=16) if rule == "mit" else None
    options = {
        "topk": case.draw(st.integers(1, 13) | st.sampled_from(ODD_COUNTS), "topk"),
        "alpha": case.draw(st.sampled_from([0.5, 0.0, 1.0, 0.3, -1.0, float("nan"), 1e30]), "alpha"),
        "beta": case.draw(st.sampled_from([6.0, 0.5, 1.7, 0.0, float("inf"), 1e30]), "beta"),
        "rule": rule,
    }
    arguments = [
        tensor(case, "scores", (batch, anchors, classes), dtype, kinds=["uniform", "ties"]),
        boxes(case, "boxes", (batch, anchors, 4), dtype),
        tensor(case, "points", (anchors, 2), kinds=["normal", "uniform"], scale=30.0, shift=10.0),
        tensor(case, "labels", label_shape, torch.int64, kinds=["integers"], specials=(), scale=classes + 1),
        boxes(case, "gt_boxes", (batch, count, 4), dtype),
        tensor(case, "mask", label_shape, torch.bool, kinds=["booleans"], specials=()),
        strides,
    ]

    def call(*tensors: Any) -> Any:
        return ops.assign(*tensors[:6], strides=tensors[6], **options)

    check(Invocation("assign", call, spoil(case, arguments), exact=True))


def head_maps(case: Case, *, gradient: bool = False, specials: Any = SPECIAL) -> tuple[list[Made], list[int], int]:
    """Raw maps of a head, their strides, and the number of classes."""
    batch, classes, dtype = side(case, "batch", 2), side(case, "classes", 4), float_dtype(case)
    levels = case.draw(st.integers(0, 3), "levels")
    sizes = [(side(case, "h", 4), side(case, "w", 4)) for _ in range(levels)]
    maps = [
        tensor(case, f"map{n}", (batch, 64 + classes, *hw), dtype, gradient=gradient, specials=specials, scale=2.0)
        for n, hw in enumerate(sizes)
    ]
    return maps, [8, 16, 32][:levels], classes


@target("decode", **LIMITS)
def decode(case: Case) -> None:
    maps, strides, _ = head_maps(case, gradient=True)
    check(Invocation("decode", ops.decode, spoil(case, [maps, strides]), gradients=False))


@target("decode_for_assignment", **LIMITS)
def decode_for_assignment(case: Case) -> None:
    maps, strides, classes = head_maps(case)
    batch = maps[0].shape[0] if maps else 1
    count = side(case, "count", 6)
    low = case.draw(st.sampled_from([0, 0, 0, -1, 1]), "lowest label")
    integers: dict[str, Any] = {"kinds": ["integers"], "specials": (), "scale": classes, "shift": low}
    labels = tensor(case, "labels", (batch, count), torch.int64, **integers)
    arguments = spoil(case, [maps, labels, strides])

    def call(maps: Any, labels: Any, strides: Any) -> Any:
        """The scores of the ground truths' classes, which all forms have; eager has the others too."""
        scores, boxes, points, columns = ops.decode_for_assignment(maps, labels, strides)
        index = columns[:, None].clamp(0, scores.shape[2] - 1).expand(-1, scores.shape[1], -1)
        known = (columns >= 0) & (columns < scores.shape[2])
        return scores.gather(2, index) * known[:, None], boxes, points

    check(Invocation("decode_for_assignment", call, arguments))


@target("detection_loss", **LIMITS)
def detection_loss(case: Case) -> None:
    """Classes and ground truths of the assignment may be out of range, boxes anything, the maps too."""
    maps, strides, classes = head_maps(case, gradient=True, specials=SPECIAL[:3])
    batch = maps[0].shape[0] if maps else 1
    anchors = sum(level.shape[2] * level.shape[3] for level in maps)
    count = side(case, "count", 4)
    low = case.draw(st.sampled_from([0, 0, 0, 1]), "index above")
    options = {
        "class_pos_weight": case.draw(st.sampled_from([1.0, 2.0]), "class_pos_weight"),
        "label_smoothing": case.draw(st.sampled_from([0.0, 0.1]), "label_smoothing"),
        "focal_gamma": case.draw(st.sampled_from([0.0, 1.5]), "focal_gamma"),
        "gains": case.draw(st.sampled_from([(1.0, 1.0, 1.0), (7.5, 0.5, 1.5), (1.0, 2.0)]), "gains"),
    }
    integers: dict[str, Any] = {"kinds": ["integers"], "specials": ()}
    arguments = [
        maps,
        tensor(case, "gt_index", (batch, anchors), torch.int64, scale=count + 1 + low, shift=-1, **integers),
        tensor(case, "weight", (batch, anchors), kinds=["uniform"], specials=SPECIAL[:1]),
        tensor(case, "labels", (batch, count), torch.int64, scale=classes + low, **integers),
        boxes(case, "gt_boxes", (batch, count, 4), specials=SPECIAL[:3]),
        tensor(case, "normaliser", (), kinds=["uniform"], specials=[0.0], shift=0.5),
    ]

    def call(maps: Any, gt_index: Any, weight: Any, *others: Any) -> Any:
        return ops.detection_loss(maps, Assignment(gt_index, weight), *others, strides=strides, **options)

    # An infinite ground truth makes the loss infinite or NaN, and then any element of the gradient may be NaN.
    check(Invocation("detection_loss", call, spoil(case, arguments), gradients=finite(arguments[4])))
