"""Convolutions of the plans where PyTorch's own give wrong numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import yolov9_fast as yf
from yolov9_fast.engine.device import to_channels_last
from yolov9_fast.nn import Conv


def poison() -> None:
    """Freed memory that holds NaN."""
    blocks = [torch.full((1 << size,), float("nan")) for size in range(6, 21) for _ in range(12)]
    del blocks


@pytest.mark.parametrize("channels", [4, 16, 64])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_kernel_beyond_a_map_of_one_pixel_gets_no_gradient(channels: int, stride: int) -> None:
    torch.manual_seed(0)
    block = to_channels_last(Conv(channels, channels, 3, stride).train())
    x = torch.randn(4, channels, 1, 1).bfloat16().contiguous(memory_format=torch.channels_last)
    exact = nn.functional.conv2d(x.double(), block.conv.weight.detach().double(), None, stride, 1)
    for _ in range(6):
        block.zero_grad()
        poison()
        with torch.autocast("cpu", torch.bfloat16), yf.backend("cpu", "bn_silu"):
            y = block(x.requires_grad_())
        poison()
        y.float().square().sum().backward()
        gradient = block.conv.weight.grad
        assert y.shape == exact.shape
        assert gradient is not None
        centre = torch.zeros(3, 3, dtype=torch.bool)
        centre[1, 1] = True
        assert not gradient[..., ~centre].any()
        assert 0 < gradient[..., centre].abs().max() < 1e3
