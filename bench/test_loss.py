"""The whole DetectionLoss of yolov9-t at 320 px, both branches, forward and backward: eager and compiled operators.

.venv/bin/python -m pytest bench/test_loss.py --benchmark-columns=median,iqr,ops
.venv/bin/python bench/test_loss.py            both interleaved in one process, medians and their ratio
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import yolov9_fast as yf
from yolov9_fast.losses import DetectionLoss
from yolov9_fast.nn.output import DetectionOutput

BATCH, CLASSES, SIZE, OBJECTS = 8, 80, 320, 7
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _maps(layout: str, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(BATCH, 64 + CLASSES, SIZE // s, SIZE // s) for s in (8, 16, 32)]
    maps = [torch.randn(shape, generator=generator) for shape in shapes]
    for level in maps:
        level[:, 64:] -= 4.0  # scores of a network that has begun to learn
    return [level.to(memory_format=LAYOUTS[layout]).requires_grad_() for level in maps]


def _targets() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    count = BATCH * OBJECTS
    image = torch.arange(BATCH).repeat_interleave(OBJECTS)[:, None].float()
    label = torch.randint(0, CLASSES, (count, 1), generator=generator).float()
    size = torch.rand(count, 2, generator=generator) * 0.4 + 0.05
    centre = torch.rand(count, 2, generator=generator) * (1 - size) + size / 2
    return torch.cat((image, label, centre, size), 1)


def _step(layout: str) -> Callable[[], Tensor]:
    output, targets, criterion = DetectionOutput(_maps(layout, 0), _maps(layout, 1)), _targets(), DetectionLoss(CLASSES)

    def step() -> Tensor:
        for level in (*output.main, *(output.auxiliary or ())):
            level.grad = None
        total = criterion(output, targets, SIZE).total
        total.backward()
        return total.detach()

    return step


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("provider", ["eager", "auto"])
def test_loss_forward_and_backward(benchmark: Callable[..., Tensor], provider: str, layout: str) -> None:
    step = _step(layout)
    with yf.backend("eager"):
        expected = step()
    with yf.backend(provider):
        torch.testing.assert_close(step(), expected, rtol=1e-5, atol=0)  # a wrong result has no speed
        benchmark(step)


def main(rounds: int = 12, steps: int = 8) -> None:
    """Blocks of steps in turn: right after the other provider a step pays for memory that this one gave back."""
    for layout in LAYOUTS:
        step = _step(layout)
        medians: dict[str, list[float]] = {"eager": [], "auto": []}
        for provider in [*medians] * (rounds + 1):
            with yf.backend(provider):
                seconds = []
                for _ in range(steps):
                    start = time.perf_counter()
                    step()
                    seconds.append(time.perf_counter() - start)
            medians[provider].append(statistics.median(seconds))
        ratios = [a / b for a, b in zip(medians["eager"][1:], medians["auto"][1:], strict=True)]
        eager, auto = (statistics.median(each[1:]) * 1e3 for each in medians.values())
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{layout}: eager {eager:.2f} ms, compiled {auto:.2f} ms, ratio {middle:.1f} "
            f"(quartiles of the rounds {low:.1f} to {high:.1f}), {torch.get_num_threads()} threads"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
