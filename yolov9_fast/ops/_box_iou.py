"""Intersection over union of every box with every other: |a ∩ b| / |a ∪ b|."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from yolov9_fast.ops._checks import check_floating, check_one_device
from yolov9_fast.ops._operator import Compiled, Kernel, Operator
from yolov9_fast.ops._supports import needs_gradient, not_for_compiled


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU matrix of boxes `a` [N, 4] and `b` [M, 4], both x1, y1, x2, y2 in any one unit: float32 [N, M].

    Any floating dtype, any strides; computed in float32. Boxes without area (x2 <= x1 or y2 <= y1) have IoU 0; a NaN
    coordinate gives NaN. Differentiable: under "auto", arguments that require a gradient run the eager implementation.
    Raises `TypeError` for anything but a floating-point tensor, `ValueError` for a wrong shape or different devices.
    """
    for name, boxes in (("a", a), ("b", b)):
        check_floating(name, boxes)
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{name}: expected [N, 4], got {list(boxes.shape)}")
    check_one_device(a=a, b=b)
    result: Tensor = OPERATOR(a.float(), b.float())
    return result


def box_iou_reference(a: Tensor, b: Tensor) -> Tensor:
    """The definition, in eager PyTorch: float32 [N, 4], [M, 4] → [N, M]."""
    top_left = torch.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = _area(top_left, bottom_right)
    union = _area(a[:, :2], a[:, 2:])[:, None] + _area(b[:, :2], b[:, 2:])[None, :] - intersection
    empty = union == 0
    # The divisor is replaced too, not only the quotient: 0/0 would still give a gradient of NaN.
    divisor = torch.where(empty, torch.ones_like(union), union)
    return torch.where(empty, torch.zeros_like(intersection), intersection / divisor)


def _area(top_left: Tensor, bottom_right: Tensor) -> Tensor:
    size = (bottom_right - top_left).clamp(min=0)
    return size[..., 0] * size[..., 1]


# ---- kernels


def _fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]))


class _Kernels(NamedTuple):
    forward: Callable[..., Any]


KERNELS = _Kernels(Kernel("box_iou(Tensor a, Tensor b) -> Tensor", box_iou_reference, _fake))


# ---- backends


def _supports(device: str, a: Tensor, b: Tensor) -> str | None:
    return not_for_compiled(device, a, b) or needs_gradient(a, b)


OPERATOR = Operator(
    "box_iou",
    "IoU of every box with every other",
    reference=box_iou_reference,
    kernels=KERNELS,
    backends={device: Compiled(functools.partial(_supports, device)) for device in ("cpu", "cuda")},
)
