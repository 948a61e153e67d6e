"""bn_silu, forward and backward, at the sizes of yolov9-t (320 px, batch 8): eager in both layouts, compiled, C++.

.venv/bin/python -m pytest bench/test_bn_silu.py --benchmark-group-by=param:shape --benchmark-columns=median
.venv/bin/python bench/test_bn_silu.py      a table: interleaved, microseconds, summed over the network's units
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import yolov9_fast as yf
from yolov9_fast.ops._backend import BackendUnavailable

Shape = tuple[int, ...]
PROVIDERS = ("eager_contiguous", "eager_channels_last", "compile", "cpu_contiguous", "cpu_channels_last")


@cache
def shapes(name: str = "yolov9-t", size: int = 320, batch: int = 8) -> Counter[Shape]:
    """The maps that the network's BatchNorms take, and how many each: from a run on the meta device."""
    model = yf.create_model(name).train().to("meta")
    found: Counter[Shape] = Counter()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda module, inputs, output: found.update([tuple(output.shape)]))
    with torch.no_grad():
        model(torch.zeros(batch, 3, size, size, device="meta"))
    return found


def keep_freed_memory() -> None:
    """Let glibc reuse freed maps, for every provider alike: else page faults of fresh memory hide the kernels."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, the most it takes


def provider(name: str) -> Callable[..., Tensor]:
    if name == "compile":
        # torch.compile of the eager form, which Inductor fuses.
        with yf.backend("eager"):
            return torch.compile(eager)
    return eager if name.startswith("eager") else ours


def eager(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return F.silu(F.batch_norm(x, mean, var, weight, bias, True, 0.03, 1e-3), inplace=True)


def ours(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return yf.ops.bn_silu(x, weight, bias, mean, var, training=True, momentum=0.03, eps=1e-3)


def step(name: str, shape: Shape) -> Callable[[], Tensor]:
    """One forward and backward on tensors of its own."""
    layout = torch.contiguous_format if name.endswith("contiguous") else torch.channels_last
    x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
    dz = torch.randn(shape).contiguous(memory_format=layout)
    weight, bias = torch.ones(shape[1], requires_grad=True), torch.zeros(shape[1], requires_grad=True)
    running = torch.zeros(shape[1]), torch.ones(shape[1])
    call = provider(name)

    def run() -> Tensor:
        x.grad = weight.grad = bias.grad = None
        z = call(x, weight, bias, *running)
        torch.autograd.backward(z, dz)
        assert x.grad is not None
        return x.grad

    def checked() -> Callable[[], Tensor]:
        with yf.backend("cpu" if name.startswith("cpu") else "eager"):
            result = run()
        leaf = x.detach().double().requires_grad_()
        double = [t.detach().double() for t in (weight, bias, *running)]
        torch.autograd.backward(eager(leaf, *double), dz.double())
        # A wrong result has no speed. Eager in channels_last errs by up to 8e-5 where a channel has 200,000 values.
        torch.testing.assert_close(result.double(), leaf.grad, rtol=1e-3, atol=2e-4)
        return run

    return checked()


@pytest.mark.parametrize("shape", sorted(shapes(), key=lambda s: -torch.Size(s).numel()), ids=str)  # type: ignore[arg-type]
@pytest.mark.parametrize("name", PROVIDERS)
def test_bn_silu(benchmark: Callable[..., Tensor], name: str, shape: Shape) -> None:
    keep_freed_memory()
    try:
        run = step(name, shape)
    except BackendUnavailable as reason:
        pytest.skip(str(reason))
    with yf.backend("cpu" if name.startswith("cpu") else "eager"):
        benchmark(run)


def table(rounds: int = 12, repeats: int = 10, providers: tuple[str, ...] = PROVIDERS) -> None:
    """Medians, the providers taking turns; a turn begins with two calls that are not counted."""
    keep_freed_memory()
    providers = tuple(name for name in providers if name != "compile")
    total: dict[str, float] = dict.fromkeys(providers, 0.0)
    print(f"{'shape':>20} {'units':>5}", *(f"{name:>20}" for name in providers), "best eager / best cpu", sep="  ")
    for shape, count in sorted(shapes().items(), key=lambda item: -torch.Size(item[0]).numel()):
        runs = {name: step(name, shape) for name in providers}
        times: dict[str, list[float]] = {name: [] for name in providers}
        for _ in range(rounds):
            for name, run in runs.items():
                for i in range(repeats + 2):
                    start = time.perf_counter()
                    run()
                    if i >= 2:
                        times[name].append(time.perf_counter() - start)
        median: dict[str, Any] = {name: statistics.median(t) * 1e6 for name, t in times.items()}
        for name in providers:
            total[name] += count * median[name]
        print(f"{shape!s:>20} {count:>5}", *(f"{median[n]:>20.0f}" for n in providers), _ratio(median), sep="  ")
    print(f"{'all units':>20} {'':>5}", *(f"{total[name]:>20.0f}" for name in providers), _ratio(total), sep="  ")


def _ratio(times: dict[str, float]) -> str:
    best = [min(t for name, t in times.items() if name.startswith(kind)) for kind in ("eager", "cpu")]
    last = times["eager_channels_last"] / times["cpu_channels_last"]
    return f"{best[0] / best[1]:.2f} (channels_last {last:.2f})"


if __name__ == "__main__":
    table()
