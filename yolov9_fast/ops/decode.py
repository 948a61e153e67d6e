"""Raw head maps to boxes and scores: the expectation of each side's distribution (DFL) around the anchor points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from yolov9_fast.ops.backend import Implementation, Operator, register, select
from yolov9_fast.ops.boxes import REG_MAX, STRIDES, anchor_points

MAP_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of the raw maps that compiled implementations take."""
MAX_LEVELS = 8


def decode(maps: Sequence[Tensor], strides: Sequence[int] = STRIDES) -> Tensor:
    """Boxes and scores of a batch; differentiable, computed in float32 (float64 stays).

    Args:
        maps: one raw map [B, 64 + nc, H/s, W/s] per stride: 4 sides (left, top, right, bottom) × 16 bins, side-major,
            then class logits. Any floating dtype and memory layout.
        strides: s in pixels.

    Returns:
        [B, 4 + nc, A]: centre x, y, width, height in pixels, sigmoid scores; anchors level by level, row-major.

    Raises:
        ValueError: maps that do not fit each other or the strides.
    """
    check_maps(maps, strides)
    result: Tensor = select(OPERATOR, maps, strides)(maps, strides)
    return result


def decode_reference(maps: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    """`decode` in eager PyTorch."""
    raw = flatten_maps(maps)
    points, stride = map_anchor_points(maps, strides, raw.dtype)
    bins, logits = split_maps(raw)
    sides = expected_sides(bins)
    low = points.T - sides[:, :2]
    high = points.T + sides[:, 2:]
    boxes = torch.cat(((low + high) / 2, high - low), 1) * stride.T
    return torch.cat((boxes, logits.sigmoid()), 1)


def expected_sides(bins: Tensor) -> Tensor:
    """Expectation Σ k · softmax(bins)_k of each side: [B, 64, A] logits to [B, 4, A] in units of the stride."""
    batch, _, anchors = bins.shape
    values = torch.arange(REG_MAX, device=bins.device, dtype=bins.dtype).view(REG_MAX, 1)
    return (bins.reshape(batch, 4, REG_MAX, anchors).softmax(2) * values).sum(2)


def flatten_maps(maps: Sequence[Tensor]) -> Tensor:
    """All levels side by side, [B, 64 + nc, A], in float32 (float64 stays)."""
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    return torch.cat([level.flatten(2).to(dtype) for level in maps], 2)


def split_maps(raw: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 64 + nc, A] to the bins' logits [B, 64, A] and the classes' [B, nc, A]."""
    bins, logits = raw.split((4 * REG_MAX, raw.shape[1] - 4 * REG_MAX), 1)
    return bins, logits


def map_anchor_points(maps: Sequence[Tensor], strides: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`anchor_points` of the levels of `maps`."""
    sizes = [(level.shape[2], level.shape[3]) for level in maps]
    return anchor_points(sizes, strides, device=maps[0].device, dtype=dtype)


def rows_in_step(level: Tensor) -> Tensor:
    """`level`, copied only where its rows of pixels do not follow each other at one step, as in a crop."""
    height, width = level.shape[2:]
    if height <= 1 or width <= 1 or level.stride(2) == width * level.stride(3):
        return level
    return level.contiguous()


def check_maps(maps: Sequence[Tensor], strides: Sequence[int]) -> None:
    """Raise `ValueError` unless `maps` are raw maps of one head, one per stride."""
    if len(maps) != len(strides) or not maps:
        raise ValueError(f"maps: expected one per stride {tuple(strides)}, got {len(maps)}")
    for level in maps:
        if level.dim() != 4 or level.shape[1] <= 4 * REG_MAX or level.shape[:2] != maps[0].shape[:2]:
            shapes = [tuple(each.shape) for each in maps]
            raise ValueError(f"maps: expected [B, {4 * REG_MAX} + nc, H, W] with the same B and nc ≥ 1, got {shapes}")


OPERATOR = register(Operator("decode", "head maps to boxes and scores", {"eager": Implementation(decode_reference)}))
