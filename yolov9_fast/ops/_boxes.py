"""Box geometry shared by the operators: anchor points, corner and centre form, complete IoU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

STRIDES = (8, 16, 32)
REG_MAX = 16
_EPS = 1e-7


def anchor_points(
    sizes: Sequence[tuple[int, int]],
    strides: Sequence[int] = STRIDES,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Centres of the cells of each level, levels in the order given, row-major.

    Args:
        sizes: (height, width) in cells of each level.
        strides: pixels per cell of each level.

    Returns:
        points [A, 2] (x, y) in units of the level's stride, and stride [A, 1] in pixels.
    """
    if len(sizes) != len(strides):
        raise ValueError(f"sizes: expected one (height, width) per stride {tuple(strides)}, got {len(sizes)}")
    points, pixels = [], []
    for (height, width), stride in zip(sizes, strides, strict=True):
        x = torch.arange(width, device=device, dtype=dtype) + 0.5
        y = torch.arange(height, device=device, dtype=dtype) + 0.5
        points.append(torch.stack((x.repeat(height), y.repeat_interleave(width)), 1))
        pixels.append(torch.full((height * width, 1), float(stride), device=device, dtype=dtype))
    return torch.cat(points), torch.cat(pixels)


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre form [..., 4] (x, y, w, h) to corners (x1, y1, x2, y2), same unit."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centre - half, centre + half), -1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """Corners [..., 4] (x1, y1, x2, y2) to centre form (x, y, w, h), same unit."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), -1)


def ciou(first: Tensor, second: Tensor) -> Tensor:
    """Complete IoU of boxes [..., 4] (x1, y1, x2, y2), broadcast against each other; in (-1.5, 1].

    CIoU = IoU − ρ²/c² − αv with ρ the distance of the centres, c the diagonal of the enclosing box,
    v = 4/π² (atan(w₂/h₂) − atan(w₁/h₁))² and α = v/(v − IoU + 1) without gradient (Zheng et al., 2020).
    Heights, union, c² and α carry ε = 1e-7 as in the published YOLOv9.
    """
    return ciou_of_sides(first.unbind(-1), second.unbind(-1), aspect(first), aspect(second))


def aspect(boxes: Tensor) -> Tensor:
    """atan(w / h) of boxes [..., 4] (x1, y1, x2, y2): [...]."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.atan((x2 - x1) / (y2 - y1 + _EPS))


def ciou_of_sides(first: Sequence[Tensor], second: Sequence[Tensor], aspect1: Tensor, aspect2: Tensor) -> Tensor:
    """`ciou` of boxes given as four coordinates and their `aspect`, so that pairs need no arc tangent of their own."""
    ax1, ay1, ax2, ay2 = first
    bx1, by1, bx2, by2 = second
    inter_w = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    inter_h = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    inter = inter_w * inter_h
    area1 = (ax2 - ax1) * (ay2 - ay1 + _EPS)
    area2 = (bx2 - bx1) * (by2 - by1 + _EPS)
    iou = inter / (area1 + area2 - inter + _EPS)
    enclosing_w = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)
    enclosing_h = torch.maximum(ay2, by2) - torch.minimum(ay1, by1)
    diagonal = enclosing_w.square() + enclosing_h.square() + _EPS
    distance = ((bx1 + bx2 - (ax1 + ax2)).square() + (by1 + by2 - (ay1 + ay2)).square()) / 4
    v = (4 / math.pi**2) * (aspect2 - aspect1).square()
    with torch.no_grad():
        alpha = v / (v - iou + (1 + _EPS))
    return iou - (distance / diagonal + v * alpha)
