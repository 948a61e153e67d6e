r"""conv1x1 on slices of CSP-ELAN buffers and on maps side by side: eager in both layouts, torch.compile, C++.

.venv/bin/python -m pytest bench/test_conv1x1.py --benchmark-columns=median,iqr \
    --benchmark-group-by=func,param:shape,param:direction
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import yolov9_fast as yf
from yolov9_fast.ops._backend import BackendUnavailable

# Batch, side, channels of each input, outputs, channels of the buffer: yolov9-t at 320 px, yolov9-c at 640 px.
SHAPES = {
    "t-P3-stage": (8, 40, (32,), 16, 128),
    "t-P4-stage": (8, 20, (48,), 24, 192),
    "t-P5-stage": (8, 10, (64,), 32, 256),
    "c-P2-stage": (2, 160, (64,), 32, 256),
    "c-P3-stage": (2, 80, (128,), 64, 512),
    "t-P4-cv3": (8, 20, (24, 24), 48, 0),
    "c-P3-cv3": (2, 80, (64, 64), 128, 0),
}
PROVIDERS = ("eager-contiguous", "eager-channels_last", "compile", "cpu")


def _maps(shape: str, layout: torch.memory_format) -> tuple[list[Tensor], int]:
    batch, side, channels, outputs, total = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    maps = []
    for count in channels:
        buffer = torch.randn(batch, total or count, side, side, generator=generator).to(memory_format=layout)
        maps.append(buffer[:, (total or count) - count :].requires_grad_())
    return maps, outputs


def _run(benchmark: Callable[..., object], provider: str, direction: str, call: Callable, arguments: list) -> None:
    """Time `call(*arguments)`, with its gradients if `direction` is "both"; a result unlike eager's has no speed."""
    with yf.backend("eager"):
        expected = call(*arguments)
    gradients = [torch.ones_like(output) for output in expected]
    step = torch.compile(call, fullgraph=True) if provider == "compile" else call

    def forward() -> object:
        with torch.no_grad():
            return step(*arguments)

    def both() -> object:
        return torch.autograd.grad(step(*arguments), arguments, gradients)

    with yf.backend("cpu" if provider == "cpu" else "eager"):
        try:
            got = step(*arguments)
        except BackendUnavailable as reason:
            pytest.skip(str(reason))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        benchmark(forward if direction == "forward" else both)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_conv1x1(benchmark: Callable[..., object], provider: str, direction: str, shape: str) -> None:
    layout = torch.contiguous_format if provider == "eager-contiguous" else torch.channels_last
    maps, outputs = _maps(shape, layout)
    weight = torch.randn(outputs, sum(x.shape[1] for x in maps), 1, 1, requires_grad=True)

    def call(weight: Tensor, *maps: Tensor) -> tuple[Tensor]:
        return (yf.ops.conv1x1(maps, weight),)

    _run(benchmark, provider, direction, call, [weight, *maps])


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.endswith("stage")])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_conv1x1_pair(benchmark: Callable[..., object], provider: str, direction: str, shape: str) -> None:
    layout = torch.contiguous_format if provider == "eager-contiguous" else torch.channels_last
    (x,), outputs = _maps(shape, layout)
    weights = [torch.randn(outputs, x.shape[1], 1, 1, requires_grad=True) for _ in range(2)]
    _run(benchmark, provider, direction, yf.ops.conv1x1_pair, [x, *weights])
