"""assign: the compiled operator and the repository's eager reference against the dense eager form.

.venv/bin/python -m pytest bench/test_assign.py --benchmark-group-by=param:objects --benchmark-columns=median,iqr,ops
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import yolov9_fast as yf
from bench.dense_assigner import DenseAssigner
from yolov9_fast.ops import assign
from yolov9_fast.ops._backend import BackendUnavailable
from yolov9_fast.ops._boxes import anchor_points

BATCH, SIZE, CLASSES = 8, 640, 80


def scene(objects: int, batch: int = BATCH, seed: int = 0) -> tuple[Tensor, ...]:
    """A batch at 640 px as a network in training gives it: boxes around their anchors, COCO-like object sizes."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    cells = [(SIZE // stride, SIZE // stride) for stride in (8, 16, 32)]
    centres, stride = anchor_points(cells)
    points = centres * stride
    reach = stride * 8 * rand(batch, len(points), 4).pow(2)
    boxes = torch.cat((points - reach[..., :2], points + reach[..., 2:]), 2)
    scores = rand(batch, len(points), CLASSES).pow(4)
    size = 8 * (SIZE / 16) ** rand(batch, objects, 2)
    centre = rand(batch, objects, 2) * SIZE
    truths = torch.cat((centre - size / 2, centre + size / 2), 2).clamp(0, SIZE)
    labels = torch.randint(0, CLASSES, (batch, objects, 1), generator=generator)
    return scores, boxes, points, labels, truths, torch.ones(batch, objects, 1)


def _provider(name: str) -> Callable[..., Any]:
    return DenseAssigner(num_classes=CLASSES) if name == "dense" else assign


@pytest.mark.parametrize("objects", [30, 300])
@pytest.mark.parametrize("provider", ["dense", "eager", "cpu"])
def test_assign(benchmark: Callable[..., Any], provider: str, objects: int) -> None:
    case = scene(objects)
    with yf.backend("eager"):
        expected = assign(*case)
    with yf.backend("cpu" if provider == "cpu" else "eager", op="assign"):
        call = _provider(provider)
        try:
            result = call(*case)  # a wrong result has no speed
        except BackendUnavailable as reason:
            pytest.skip(str(reason))
        if provider == "dense":
            foreground, weight = result[3], result[2].sum(-1)
            # The dense form leaves the order of equal metrics open, which is only seen where they are 0.
            assert bool((foreground == (expected.gt_index >= 0))[expected.weight > 0].all())
            torch.testing.assert_close(weight, expected.weight, rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(result.gt_index, expected.gt_index)
            assert torch.equal(result.weight, expected.weight)
        benchmark(call, *case)
