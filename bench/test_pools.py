r"""spp, adown_pool and cbfuse at the networks' sizes: eager in both layouts, torch.compile, the C++ kernels.

.venv/bin/python -m pytest bench/test_pools.py --benchmark-columns=median,iqr \
    --benchmark-group-by=param:case,param:direction
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import yolov9_fast as yf
from yolov9_fast.ops._backend import BackendUnavailable

Outputs = tuple[Tensor, ...]


def _halves(x: Tensor) -> Outputs:
    first, second = yf.ops.adown_pool(x)
    assert second is not None
    return first, second


def _average(x: Tensor) -> Outputs:
    return (yf.ops.adown_pool(x, split=False)[0],)


def _fuse(*maps: Tensor) -> Outputs:
    return (yf.ops.cbfuse(maps[:-1], maps[-1]),)


# yolov9-t at 320 px, batch 8; yolov9-c at 640 px, batch 2.
CASES: dict[str, tuple[Callable[..., Outputs], list[tuple[int, int, int]]]] = {
    "spp-t": (yf.ops.spp_with_input, [(8, 64, 10)]),
    "spp-c": (yf.ops.spp_with_input, [(2, 256, 20)]),
    "aconv-t-P3": (_average, [(8, 32, 80)]),
    "aconv-t-P4": (_average, [(8, 64, 40)]),
    "adown-c-P3": (_halves, [(2, 256, 160)]),
    "adown-c-P4": (_halves, [(2, 512, 80)]),
    "cbfuse-t-P4": (_fuse, [(8, 64, 20), (8, 64, 10), (8, 64, 40)]),
    "cbfuse-c-P3": (_fuse, [(2, 256, 80), (2, 256, 40), (2, 256, 20), (2, 256, 80)]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("provider", ["eager-contiguous", "eager-channels_last", "compile", "cpu-contiguous", "cpu"])
def test_pools(benchmark: Callable[..., object], provider: str, direction: str, case: str) -> None:
    call, shapes = CASES[case]
    layout = torch.contiguous_format if provider.endswith("contiguous") else torch.channels_last
    maps = [torch.randn(b, c, s, s).to(memory_format=layout).requires_grad_() for b, c, s in shapes]
    with yf.backend("eager"):
        expected = call(*maps)
    gradients = [torch.randn_like(output) for output in expected]
    step = torch.compile(call, fullgraph=True) if provider == "compile" else call

    def forward() -> object:
        with torch.no_grad():
            return step(*maps)

    def both() -> object:
        return torch.autograd.grad(step(*maps), maps, gradients)

    with yf.backend("cpu" if provider.startswith("cpu") else "eager"):
        try:
            got = step(*maps)
        except BackendUnavailable as reason:
            pytest.skip(str(reason))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)  # a wrong result has no speed
        benchmark(forward if direction == "forward" else both)
