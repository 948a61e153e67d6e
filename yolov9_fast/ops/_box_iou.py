"""Intersection over union of every box with every other: |a ∩ b| / |a ∪ b|."""

from __future__ import annotations

import torch
from torch import Tensor

from yolov9_fast.ops import _library as library
from yolov9_fast.ops._backend import Implementation, Operator, needs_gradient, not_on, register, select


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU matrix of boxes `a` [N, 4] and `b` [M, 4], both x1, y1, x2, y2 in any one unit: float32 [N, M].

    Any floating dtype, any strides; computed in float32. Boxes without area (x2 <= x1 or y2 <= y1) have IoU 0; a NaN
    coordinate gives NaN. Differentiable: under "auto", arguments that require a gradient run the eager form. Raises
    `TypeError` for what is no floating tensor, `ValueError` for a wrong shape or tensors on different devices.
    """
    _check(a, "a")
    _check(b, "b")
    if a.device != b.device:
        raise ValueError(f"box_iou: a and b must be on one device, got {a.device} and {b.device}")
    a, b = a.float(), b.float()
    result: Tensor = select(OPERATOR, a, b)(a, b)
    return result


def box_iou_reference(a: Tensor, b: Tensor) -> Tensor:
    """The definition, in eager PyTorch: float32 [N, 4], [M, 4] → [N, M]."""
    top_left = torch.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    both = _area(top_left, bottom_right)
    either = _area(a[:, :2], a[:, 2:])[:, None] + _area(b[:, :2], b[:, 2:])[None, :] - both
    empty = either == 0
    # The divisor is replaced too, not only the quotient: 0/0 would still send NaN into the gradient.
    return torch.where(empty, torch.zeros_like(both), both / torch.where(empty, torch.ones_like(either), either))


def _area(top_left: Tensor, bottom_right: Tensor) -> Tensor:
    size = (bottom_right - top_left).clamp(min=0)
    return size[..., 0] * size[..., 1]


def _check(boxes: Tensor, name: str) -> None:
    if not isinstance(boxes, Tensor) or not boxes.is_floating_point():
        got = boxes.dtype if isinstance(boxes, Tensor) else type(boxes).__name__
        raise TypeError(f"box_iou: {name} must be a floating-point tensor, got {got}")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"box_iou: {name} must have shape [n, 4], got {list(boxes.shape)}")


def _fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]))


_compiled = library.define("box_iou(Tensor a, Tensor b) -> Tensor", fake=_fake, reference=box_iou_reference)

OPERATOR = register(
    Operator(
        "box_iou",
        "IoU of every box with every other",
        {
            "eager": Implementation(box_iou_reference),
            "cpu": Implementation(
                _compiled, library.missing("box_iou", "cpu"), lambda a, b: not_on("cpu", a, b) or needs_gradient(a, b)
            ),
            "cuda": Implementation(
                _compiled, library.missing("box_iou", "cuda"), lambda a, b: not_on("cuda", a, b) or needs_gradient(a, b)
            ),
        },
    )
)
