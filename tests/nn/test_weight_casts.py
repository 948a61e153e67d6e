"""Weights of a block that are converted together for autocast: the same numbers and gradients, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import yolov9_fast as yf
from yolov9_fast.nn import CSPELAN, weight_casts
from yolov9_fast.ops import _convs


def step(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16), yf.backend("cpu", op="bn_silu"):
        y = block(x)
    y.float().square().sum().backward()
    gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x.grad": x.grad, **gradients}


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each conversion had. The convolutions are torch's, of which autocast knows."""
    found: list[int] = []
    convert = weight_casts._converted

    def noted(tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        found.append(len(tensors))
        return convert(tensors, dtype)

    monkeypatch.setattr(weight_casts, "_converted", noted)
    monkeypatch.setattr(_convs, "measured", lambda dtype: False)
    return found


def test_numbers_and_gradients_are_those_of_autocast(converted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = CSPELAN(16, 16, 16, 8, 1)
    frozen = block.cv4.conv.weight.requires_grad_(False)
    other = copy.deepcopy(block)
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    found = step(block, x)
    weights = sum(type(module) is nn.Conv2d for module in block.modules()) - 1
    assert converted == [weights, weights], "one conversion forward and one back"
    assert frozen.grad is None
    assert weight_casts.casting.weights is None
    monkeypatch.setattr(weight_casts, "DEVICE_TYPES", ("cuda",))
    expected = step(other, x)
    assert converted == [weights, weights], "autocast converts them by itself"
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_without_gradients_or_autocast_nothing_is_converted(converted: list[int]) -> None:
    block, x = CSPELAN(16, 16, 16, 8, 1), torch.randn(2, 16, 8, 8)
    with yf.backend("cpu", op="bn_silu"):
        block(x).sum().backward()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            block(x)
    assert not converted
