"""box_iou: eager, torch.compile and the compiled operator on the same boxes.

.venv/bin/python -m pytest bench/test_box_iou.py --benchmark-group-by=param:size --benchmark-columns=median,iqr,ops
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import yolov9_fast as yf
from yolov9_fast.ops._backend import BackendUnavailable
from yolov9_fast.ops._box_iou import box_iou

SIZES = (100, 300, 2000)


def _boxes(count: int, seed: int) -> Tensor:
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)) * 640
    return torch.cat((corners.amin(1), corners.amax(1)), 1)


def _provider(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    if name != "compile":
        return box_iou
    return torch.compile(box_iou, fullgraph=True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("provider", ["eager", "compile", "cpu"])
def test_box_iou(benchmark: Callable[..., Tensor], provider: str, size: int) -> None:
    a, b = _boxes(size, 0), _boxes(size, 1)
    with yf.backend("eager"):
        expected = box_iou(a, b)
    with yf.backend("cpu" if provider == "cpu" else "eager", op="box_iou"):
        call = _provider(provider)
        try:
            torch.testing.assert_close(call(a, b), expected)  # a wrong result has no speed
        except BackendUnavailable as reason:
            pytest.skip(str(reason))
        benchmark(call, a, b)
