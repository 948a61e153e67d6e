"""Raw head maps to boxes and scores: the expectation of each side's distribution (DFL) around the anchor points."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from yolov9_fast._layout import dense
from yolov9_fast.ops._boxes import REG_MAX, STRIDES, anchor_points
from yolov9_fast.ops._checks import FLOATING, check_floating, check_integers, check_one_device, described, maps_of
from yolov9_fast.ops._operator import Compiled, Kernel, Operator
from yolov9_fast.ops._recording import unless_recorded
from yolov9_fast.ops._supports import needs_gradient, not_for_compiled

_MAX_LEVELS = 8


def decode(maps: Sequence[Tensor], strides: Sequence[int] = STRIDES) -> Tensor:
    """Boxes and scores of a batch; differentiable, computed in float32, or float64 for float64 maps.

    Args:
        maps: one raw map [B, 64 + nc, H/s, W/s] per stride: 4 sides (left, top, right, bottom) × 16 bins, side-major,
            then class logits. Any floating dtype and memory format.
        strides: s in pixels.

    Returns:
        [B, 4 + nc, A]: centre x, y, width, height in pixels, sigmoid scores; anchors level by level, row-major.

    Raises:
        ValueError: maps that do not fit each other or the strides.
    """
    check_maps(maps, strides)
    result: Tensor = unless_recorded(OPERATOR)(maps, strides)
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


class AssignmentInputs(NamedTuple):
    """What `assign` reads: `scores` [B, A, K], `boxes` [B, A, 4] and `points` [A, 2] in pixels, and for each ground
    truth the column of `scores` that is its class, `columns` [B, N]."""

    scores: Tensor
    boxes: Tensor
    points: Tensor
    columns: Tensor


@torch.no_grad()
def decode_for_assignment(maps: Sequence[Tensor], labels: Tensor, strides: Sequence[int] = STRIDES) -> AssignmentInputs:
    """Raw maps decoded for `assign`, without gradient; in float32, or float64 for float64 maps.

    Args:
        maps, strides: as for `decode`.
        labels: [B, N] class of each ground truth; for one outside [0, nc) the score is 0. Where N is less than the
            number of classes, compiled kernels compute only the scores of these classes, K = max(N, 1); else K = nc.

    Raises:
        ValueError: maps or labels that do not fit.
    """
    check_maps(maps, strides)
    check_integers("labels", labels)
    check_one_device(maps=maps[0], labels=labels)
    if labels.dim() != 2 or labels.shape[0] != maps[0].shape[0]:
        raise ValueError(f"labels: expected [{maps[0].shape[0]}, N], got {list(labels.shape)}")
    maps = [level.detach() for level in maps]
    result: AssignmentInputs = unless_recorded(ASSIGNMENT_OPERATOR)(maps, labels, strides)
    return result


def decode_for_assignment_reference(maps: Sequence[Tensor], labels: Tensor, strides: Sequence[int]) -> AssignmentInputs:
    """`decode_for_assignment` in eager PyTorch, all classes."""
    raw = flatten_maps(maps)
    points, stride = map_anchor_points(maps, strides, raw.dtype)
    bins, logits = split_maps(raw)
    sides = expected_sides(bins)
    boxes = torch.cat((points.T - sides[:, :2], points.T + sides[:, 2:]), 1) * stride.T
    return AssignmentInputs(logits.sigmoid().transpose(1, 2), boxes.transpose(1, 2), points * stride, labels)


def expected_sides(bins: Tensor) -> Tensor:
    """Expectation Σ k · softmax(bins)_k of each side: [B, 64, A] logits to [B, 4, A] in units of the stride."""
    batch, _, anchors = bins.shape
    values = torch.arange(REG_MAX, device=bins.device, dtype=bins.dtype).view(REG_MAX, 1)
    return (bins.reshape(batch, 4, REG_MAX, anchors).softmax(2) * values).sum(2)


def flatten_maps(maps: Sequence[Tensor]) -> Tensor:
    """All levels concatenated, [B, 64 + nc, A], in float32, or float64 for float64 maps."""
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    return torch.cat([level.flatten(2).to(dtype) for level in maps], 2)


def split_maps(raw: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 64 + nc, A] to the bins' logits [B, 64, A] and the classes' [B, nc, A]."""
    bins, logits = torch.split(raw, [4 * REG_MAX, raw.shape[1] - 4 * REG_MAX], 1)
    return bins, logits


def map_anchor_points(maps: Sequence[Tensor], strides: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`anchor_points` of the levels of `maps`."""
    sizes = [(level.shape[2], level.shape[3]) for level in maps]
    return anchor_points(sizes, strides, device=maps[0].device, dtype=dtype)


def with_one_pixel_stride(level: Tensor) -> Tensor:
    """`level`; a copy where the stride from pixel to pixel changes at the end of a row, as in a crop."""
    height, width = level.shape[2:]
    if height <= 1 or width <= 1 or level.stride(2) == width * level.stride(3):
        return level
    return level.contiguous()


def check_maps(maps: Sequence[Tensor], strides: Sequence[int]) -> None:
    """Raise `TypeError` or `ValueError` unless `maps` are raw maps of one head, one per stride."""
    maps = maps_of("maps", maps)
    if not isinstance(strides, list | tuple):
        raise TypeError(f"strides: expected a list of numbers, got {described(strides)}")
    if len(maps) != len(strides) or not maps:
        raise ValueError(f"maps: expected one per stride {list(strides)}, got {len(maps)}")
    for level in maps:
        check_floating("maps", level)
    check_one_device(**{f"maps[{number}]": level for number, level in enumerate(maps)})
    for level in maps:
        if level.dim() != 4 or level.shape[1] <= 4 * REG_MAX or level.shape[:2] != maps[0].shape[:2]:
            shapes = [list(each.shape) for each in maps]
            raise ValueError(
                f"maps: expected [B, {4 * REG_MAX} + nc, H, W] with one B and nc of at least 1, got {shapes}"
            )


# ---- kernels


def forward_reference_for_assignment(
    maps: Sequence[Tensor], labels: Tensor | None, strides: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel `decode_for_assignment`: scores [B, K, A] of the classes `labels` [B, K] or of all, boxes and points."""
    scores, boxes, points, _ = decode_for_assignment_reference(maps, torch.empty(0), strides)
    scores = scores.transpose(1, 2)
    if labels is not None:
        scores = scores.gather(1, labels[:, :, None].expand(-1, -1, scores.shape[2]))
    return dense(scores), dense(boxes), points


def _fake(maps: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    batch, channels = maps[0].shape[:2]
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    return maps[0].new_empty((batch, channels - 4 * REG_MAX + 4, _anchors(maps)), dtype=dtype)


def _fake_for_assignment(
    maps: Sequence[Tensor], labels: Tensor | None, strides: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels = maps[0].shape[:2]
    anchors = _anchors(maps)
    rows = channels - 4 * REG_MAX if labels is None else labels.shape[1]
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    shapes = ((batch, rows, anchors), (batch, anchors, 4), (anchors, 2))
    scores, boxes, points = (maps[0].new_empty(shape, dtype=dtype) for shape in shapes)
    return scores, boxes, points


def _anchors(maps: Sequence[Tensor]) -> int:
    return sum(level.shape[2] * level.shape[3] for level in maps)


class _Kernels(NamedTuple):
    forward: Callable[..., Any]


KERNELS = _Kernels(Kernel("decode_forward(Tensor[] maps, int[] strides) -> Tensor", decode_reference, _fake))
ASSIGNMENT_KERNELS = _Kernels(
    Kernel(
        "decode_for_assignment(Tensor[] maps, Tensor? labels, int[] strides) -> (Tensor, Tensor, Tensor)",
        forward_reference_for_assignment,
        _fake_for_assignment,
    )
)


# ---- backends


def _run(kernels: _Kernels, maps: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    result: Tensor = kernels.forward([with_one_pixel_stride(level) for level in maps], strides)
    return result


def _run_for_assignment(
    kernels: _Kernels, maps: Sequence[Tensor], labels: Tensor, strides: Sequence[int]
) -> AssignmentInputs:
    if maps[0].shape[0] == 0:  # kernels write the points with the boxes of the first image
        return decode_for_assignment_reference(maps, labels, strides)
    count, classes = labels.shape[1], maps[0].shape[1] - 4 * REG_MAX
    labels = labels.long().contiguous()
    wanted, columns = None, labels
    if count < classes:
        # `assign` expects at least one column, also without ground truths.
        wanted = labels.clamp(0, classes - 1) if count else labels.new_zeros(labels.shape[0], 1)
        columns = torch.where(wanted == labels, torch.arange(count, device=labels.device), -1) if count else labels
    scores, boxes, points = kernels.forward([with_one_pixel_stride(level) for level in maps], wanted, strides)
    return AssignmentInputs(scores.transpose(1, 2), boxes, points, columns)


def why_not_maps(device: str, maps: Sequence[Tensor]) -> str | None:
    """For `supports`: why compiled kernels for `device` cannot take these maps, None when they can."""
    if maps[0].dtype not in FLOATING or any(level.dtype != maps[0].dtype for level in maps):
        return f"it needs maps of one floating dtype, got {[level.dtype for level in maps]}"
    if len(maps) > _MAX_LEVELS:
        return f"it takes up to {_MAX_LEVELS} levels, got {len(maps)}"
    return not_for_compiled(device, *maps)


def _supports(device: str, maps: Sequence[Tensor], strides: Sequence[int]) -> str | None:
    return why_not_maps(device, maps) or needs_gradient(*maps)


def _supports_for_assignment(device: str, maps: Sequence[Tensor], labels: Tensor, strides: Sequence[int]) -> str | None:
    return why_not_maps(device, maps) or not_for_compiled(device, labels)


OPERATOR = Operator(
    "decode",
    "head maps to boxes and scores",
    reference=decode_reference,
    kernels=KERNELS,
    run=_run,
    backends={device: Compiled(functools.partial(_supports, device)) for device in ("cpu", "cuda")},
)
ASSIGNMENT_OPERATOR = Operator(
    "decode_for_assignment",
    "head maps to the inputs of the assignment",
    reference=decode_for_assignment_reference,
    kernels=ASSIGNMENT_KERNELS,
    run=_run_for_assignment,
    backends={device: Compiled(functools.partial(_supports_for_assignment, device)) for device in ("cpu", "cuda")},
)
