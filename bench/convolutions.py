"""The convolutions of small maps by the operator `convs` and by the framework: microseconds, and of whole bottlenecks.

    OMP_NUM_THREADS=2 python bench/convolutions.py [float32|bfloat16]

Both are timed by turns in one process, and the lower third of the samples is taken: other processes only add time.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from yolov9_fast.nn.blocks import RepBottleneck
from yolov9_fast.ops import _convs, backend

SHAPES = ((24, 20, 24), (16, 40, 18), (32, 10, 12), (48, 20, 4), (64, 10, 2), (32, 40, 3), (16, 80, 1))
"""Channels, side of the map, and how many bottlenecks of yolov9-t at 320 px are of this shape."""
BATCH, ROUNDS = 8, 48


def by_turns(functions: Sequence[Callable[[], Any]]) -> list[float]:
    """Microseconds of each function."""
    samples: list[list[float]] = [[] for _ in functions]
    for round_number, (own, function) in itertools.product(range(ROUNDS), enumerate(functions)):
        start = time.perf_counter()
        function()
        if round_number >= 4:
            samples[own].append(time.perf_counter() - start)
    return [1e6 * sorted(one)[len(one) // 3] for one in samples]


def rows(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype, memory_format=torch.channels_last)


def products(dtype: torch.dtype, channels: int, side: int) -> list[float]:
    """Forward, gradient of the map, gradient of the weight of a 3×3 convolution: the operator's, the framework's."""
    x, weight = rows(dtype, BATCH, channels, side, side), rows(dtype, channels, channels, 3, 3)
    dy, kernels = torch.randn_like(x), torch.ops.yolov9_fast

    def gradient(mask: list[bool]) -> Any:
        arguments = (None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, mask)
        return torch.ops.aten.convolution_backward(dy, x, weight, *arguments)

    return by_turns(
        [
            lambda: kernels.convs_forward(x, [weight]),
            lambda: torch.conv2d(x, weight, None, 1, 1),
            lambda: kernels.convs_input_grad([dy], [weight]),
            lambda: gradient([True, False, False]),
            lambda: kernels.convs_weight_grad([dy], x, [weight]),
            lambda: gradient([False, True, False]),
        ]
    )


def bottleneck(dtype: torch.dtype, channels: int, side: int) -> list[float]:
    """Forward and backward of a RepBottleneck: with the operator, with the framework's convolutions."""
    block: nn.Module = RepBottleneck(channels, channels).train()
    nn.Module.to(block, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, dz = (rows(dtype, BATCH, channels, side, side) for _ in range(2))
    x.requires_grad_()

    def step(name: str) -> None:
        with backend(name, "convs"), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = block(x)
        y.backward(dz)
        block.zero_grad(set_to_none=True)
        x.grad = None

    return by_turns([lambda: step("cpu"), lambda: step("eager")])


def main() -> None:
    """Print one line for each shape, and the sum over the bottlenecks of yolov9-t that "auto" gives to the operator."""
    dtype = getattr(torch, sys.argv[1] if len(sys.argv) > 1 else "float32")
    saved = 0.0
    for channels, side, count in SHAPES:
        numbers = products(dtype, channels, side)
        own, framework = bottleneck(dtype, channels, side)
        pairs = zip(("y", "dx", "dw"), numbers[::2], numbers[1::2], strict=True)
        kernels = ", ".join(f"{name} {a:.0f} ({b:.0f})" for name, a, b in pairs)
        text = f"{channels} channels, {side}×{side}: {kernels}; RepBottleneck {own:.0f} ({framework:.0f}) µs"
        map_ = torch.empty(BATCH, channels, side, side, dtype=dtype)
        if _convs._is_faster(map_, torch.empty(channels, channels, 3, 3, dtype=dtype)):
            saved += count * (framework - own) / 1000
            text += f", {count} in a step"
        print(text, flush=True)
    print(f"saved in a step of yolov9-t: {saved:.1f} ms")


if __name__ == "__main__":
    main()
