"""detection_loss of one branch, forward and backward: eager, torch.compile and the compiled operator on the same maps.

.venv/bin/python -m pytest bench/test_detection_loss.py --benchmark-group-by=param:layout --benchmark-columns=median,iqr
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import yolov9_fast as yf
from yolov9_fast.ops import Assignment, detection_loss
from yolov9_fast.ops._backend import BackendUnavailable

BATCH, CLASSES, SIZE, OBJECTS = 8, 80, 320, 7
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _arguments(layout: str, dtype: torch.dtype) -> tuple[list[Tensor], tuple[Assignment, Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, 64 + CLASSES, SIZE // s, SIZE // s) for s in (8, 16, 32)]
    maps = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    anchors = sum(shape[2] * shape[3] for shape in shapes)
    assigned = torch.rand(BATCH, anchors, generator=generator) < 10 * OBJECTS / anchors
    index = torch.where(assigned, torch.randint(0, OBJECTS, (BATCH, anchors), generator=generator), -1)
    weight = torch.rand(BATCH, anchors, generator=generator) * assigned
    corner = torch.rand(BATCH, OBJECTS, 2, generator=generator) * 200
    boxes = torch.cat((corner, corner + 20 + torch.rand(BATCH, OBJECTS, 2, generator=generator) * 100), 2)
    labels = torch.randint(0, CLASSES, (BATCH, OBJECTS), generator=generator)
    maps = [level.to(memory_format=LAYOUTS[layout]).requires_grad_() for level in maps]
    return maps, (Assignment(index, weight), labels, boxes, weight.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("provider", ["eager", "compile", "cpu"])
def test_detection_loss(benchmark: Callable[..., Tensor], provider: str, layout: str, dtype: torch.dtype) -> None:
    maps, fixed = _arguments(layout, dtype)
    call = torch.compile(detection_loss) if provider == "compile" else detection_loss

    def step() -> Tensor:
        for level in maps:
            level.grad = None
        items = call(maps, *fixed)
        items.sum().backward()
        return items.detach()

    with yf.backend("eager"):
        expected = detection_loss(maps, *fixed).detach()
    with yf.backend("cpu" if provider == "cpu" else "eager", op="detection_loss"):
        try:
            torch.testing.assert_close(step(), expected, rtol=1e-5, atol=0)  # a wrong result has no speed
        except BackendUnavailable as reason:
            pytest.skip(str(reason))
        benchmark(step)
