"""Fake results have the strides of real ones, whatever the strides of the arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from yolov9_fast.ops._operator import operators

LAST = torch.channels_last
N, C, H, W = 2, 6, 4, 5
MADE: dict[str, Callable[[], Tensor]] = {
    "channels_last": lambda: torch.randn(N, C, H, W).contiguous(memory_format=LAST),
    "contiguous": lambda: torch.randn(N, C, H, W),
    "every second column": lambda: torch.randn(N, C, H, 2 * W)[..., ::2],
    "every second channel": lambda: torch.randn(N, 2 * C, H, W)[:, ::2],
    "transposed": lambda: torch.randn(N, C, W, H).transpose(2, 3),
    "channels first": lambda: torch.randn(C, N, H, W).transpose(0, 1),
    "rows before channels": lambda: torch.randn(N, H, C, W).permute(0, 2, 1, 3),
    "expanded channels": lambda: torch.randn(N, 1, H, W).expand(N, C, H, W),
    "expanded batch": lambda: torch.randn(1, C, H, W).expand(N, C, H, W),
    "slice of channels_last": lambda: torch.randn(N, C + 4, H, W).contiguous(memory_format=LAST)[:, 2:-2],
    "slice of contiguous": lambda: torch.randn(N, C + 4, H, W)[:, 2:-2],
    "cropped": lambda: torch.randn(N, C, H + 2, W + 2).contiguous(memory_format=LAST)[:, :, 1:-1, 1:-1],
}


def arguments(x: Tensor) -> dict[str, tuple[Any, ...]]:
    """By kernel: `x` as the argument that decides the layout."""
    y = torch.randn(N, C, H, W)
    v = [torch.rand(C) + 0.5 for _ in range(4)]
    return {
        "bn_silu_backward": (y, x, *v, True),
        "bn_silu_backward_apply": (y, x, *v, v[0], v[1], True),
        "rep_bn_silu_backward": (y, x, *v, y, *v, True),
        "rep_bn_silu_backward_apply": (y, x, *v, y, *v, v[0], v[1], v[2], True),
        "spp_backward": (x, x, x, y, y, y, y),
        "adown_pool_forward": (x, True),
        "adown_pool_backward": (torch.randn(N, C, H - 1, W - 1), None, x, False),
        "cbfuse_forward": ([y], x),
        "cbfuse_backward": (x, [1, 2], [1, W]),
        "conv1x1_input_grad": (x, torch.randn(C, 5, 1, 1), [2, 3]),
        "conv1x1_weight_grad": (x, [y]),
        "tap_backward": (x, y[:, :2], C - 2),
    }


def strides(result: Any) -> list[tuple[int, ...]]:
    return [tensor.stride() for tensor in ([result] if isinstance(result, Tensor) else result)]


@pytest.mark.parametrize("made", MADE)
def test_the_definitions_give_the_strides_that_their_fakes_say(made: str) -> None:
    torch.manual_seed(0)
    references = {kernel.name: kernel.reference for operator in operators.values() for kernel in operator._declared}
    for name, given in arguments(MADE[made]()).items():
        real = strides(references[name](*given))
        with FakeTensorMode() as mode:
            faked = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, list(given))
            fake = strides(getattr(torch.ops.yolov9_fast, name)(*faked))
        assert fake == real, name
