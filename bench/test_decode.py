"""decode and decode_for_assignment: eager, torch.compile and the compiled operators on the same maps.

.venv/bin/python -m pytest bench/test_decode.py --benchmark-group-by=func,param:layout --benchmark-columns=median,iqr
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import yolov9_fast as yf
from yolov9_fast.ops import decode
from yolov9_fast.ops._backend import BackendUnavailable
from yolov9_fast.ops._decode import AssignmentInputs, decode_for_assignment

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PROVIDERS = ["eager", "compile", "cpu"]


def _maps(batch: int, size: int, layout: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(batch, 144, size // s, size // s, generator=generator) for s in (8, 16, 32)]
    return [level.to(memory_format=LAYOUTS[layout]) for level in maps]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_decode(benchmark: Callable[..., Tensor], provider: str, layout: str) -> None:
    maps = _maps(4, 640, layout)
    with yf.backend("eager"):
        expected = decode(maps)
    call = torch.compile(decode, fullgraph=True) if provider == "compile" else decode
    with yf.backend("cpu" if provider == "cpu" else "eager", op="decode"):
        try:
            torch.testing.assert_close(call(maps), expected, rtol=1e-5, atol=1e-4)  # a wrong result has no speed
        except BackendUnavailable as reason:
            pytest.skip(str(reason))
        benchmark(call, maps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_decode_for_assignment(benchmark: Callable[..., AssignmentInputs], provider: str, layout: str) -> None:
    maps, labels = _maps(8, 320, layout), torch.randint(0, 80, (8, 7), generator=torch.Generator().manual_seed(1))
    with yf.backend("eager"):
        expected = decode_for_assignment(maps, labels).boxes
    call = torch.compile(decode_for_assignment) if provider == "compile" else decode_for_assignment
    with yf.backend("cpu" if provider == "cpu" else "eager", op="decode_for_assignment"):
        try:
            torch.testing.assert_close(call(maps, labels).boxes, expected, rtol=1e-5, atol=1e-4)
        except BackendUnavailable as reason:
            pytest.skip(str(reason))
        benchmark(call, maps, labels)
