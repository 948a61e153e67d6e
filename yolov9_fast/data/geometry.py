"""Boxes and polygons: conversion, overlap, resampling, transformation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

POLYGON_POINTS = 1000
_BRIDGE_POINTS = 256
_NEAR_PARTS = 16


def corners_from_normalised(boxes: Floats, width: float, height: float) -> Floats:
    """[n, 4] (cx, cy, w, h) normalised → (x1, y1, x2, y2) pixels."""
    return scaled_corners(boxes, np.array([width, height], dtype=np.float32))


def scaled_corners(boxes: Floats, scale: Floats) -> Floats:
    """[n, 4] (cx, cy, w, h) → (x1, y1, x2, y2), times `scale` (x, y) [2], or [n, 2] for each box its own."""
    centre, half = boxes[:, :2] * scale, boxes[:, 2:4] * scale / 2
    return np.concatenate((centre - half, centre + half), axis=1)


def normalised_from_corners(boxes: Floats, width: float, height: float) -> Floats:
    """[n, 4] (x1, y1, x2, y2) pixels → (cx, cy, w, h) normalised."""
    scale = np.array([width, height], dtype=np.float32)
    low, high = boxes[:, :2] / scale, boxes[:, 2:4] / scale
    return np.concatenate(((low + high) / 2, high - low), axis=1)


def clip(boxes: Floats, width: float, height: float) -> Floats:
    """Clip boxes [n, 4] (x1, y1, x2, y2) to the image."""
    # Several times as fast as np.clip on few boxes.
    return np.minimum(np.maximum(boxes, 0), np.array([width, height, width, height], dtype=np.float32))


def covered_share(box: Floats, boxes: Floats) -> Floats:
    """Share [n] of each of `boxes` [n, 4] that `box` [4] covers."""
    low = np.maximum(box[:2], boxes[:, :2])
    high = np.minimum(box[2:], boxes[:, 2:])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    share: Floats = np.clip(high - low, 0, None).prod(1) / (area + 1e-7)
    return share


def resample(polygon: Floats, points: int = POLYGON_POINTS) -> Floats:
    """`points` points [points, 2] spread over a closed polygon [k, 2]: evenly by vertex number, as published."""
    closed = np.concatenate((polygon, polygon[:1]))
    where = np.linspace(0, len(closed) - 1, points)
    knots = np.arange(len(closed))
    return np.stack([np.interp(where, knots, closed[:, axis]) for axis in (0, 1)], axis=1).astype(np.float32)


def join_polygons(parts: Sequence[Floats]) -> Floats:
    """One closed polygon [k, 2] of at least one [n, 2], joined by bridges of zero width.

    Bridges lie between points that are near: nearest among at most 256 of either side, so that time and memory do not
    grow with the product of lengths. More than 16 parts are joined by their first points, one after the other.
    """
    if len(parts) > _NEAR_PARTS:
        firsts = [part[:1] for part in parts]
        there = [points for part, first in zip(parts, firsts, strict=True) for points in (part, first)]
        return np.concatenate((*there, *reversed(firsts[:-1])))
    polygon = parts[0]
    for part in parts[1:]:
        steps = [-(-len(points) // _BRIDGE_POINTS) for points in (polygon, part)]
        distance = ((polygon[:: steps[0], None] - part[None, :: steps[1]]) ** 2).sum(-1)
        nearest = np.unravel_index(int(distance.argmin()), distance.shape)
        i, j = (int(place) * step for place, step in zip(nearest, steps, strict=True))
        polygon = np.concatenate((polygon[: i + 1], part[j:], part[: j + 1], polygon[i:]))
    return polygon


def transform(points: Floats, matrix: NDArray[np.float64]) -> Floats:
    """Apply a 3 × 3 homogeneous matrix to points [n, 2]."""
    result = points @ matrix[:2, :2].T + matrix[:2, 2]
    if matrix[2, 0] or matrix[2, 1]:
        result = result / (points @ matrix[2, :2] + matrix[2, 2])[:, None]
    return result.astype(np.float32)
