"""sgd_update and adam_update against torch.optim and lerp, SGD bit for bit on the CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import yolov9_fast as yf
from tests.devices import backends
from yolov9_fast.ops._flat_update import ADAM, SGD

ENDS = [64, 707, 707, 1001]
RATES, DECAYS = (0.05, 0.01, 0.0, 0.02), (0.0, 5e-4, 0.0, 0.0)


def draw(seed: int, device: str = "cpu") -> Tensor:
    return torch.randn(ENDS[-1], generator=torch.Generator().manual_seed(seed)).to(device)


class Torch:
    """The same updates by torch's optimiser on one tensor per group, on the CPU."""

    def __init__(self, kind: str, **options: Any) -> None:
        flat, self.average = draw(0), draw(1)
        self.sizes = [end - start for start, end in zip([0, *ENDS], ENDS, strict=False)]
        self.parts = [part.clone().requires_grad_() for part in flat.split(self.sizes)]
        groups = [
            {"params": [part], "lr": rate, "weight_decay": decay}
            for part, rate, decay in zip(self.parts, RATES, DECAYS, strict=True)
        ]
        self.optimizer: torch.optim.Optimizer = getattr(torch.optim, kind)(groups, lr=1.0, **options)

    @property
    def parameters(self) -> Tensor:
        return torch.cat([part.detach() for part in self.parts])

    def update(self, gradients: Tensor, factor: float, weight: float) -> None:
        for part, gradient in zip(self.parts, gradients.split(self.sizes), strict=True):
            part.grad = gradient * factor
        self.optimizer.step()
        self.average.lerp_(self.parameters, weight)


def assert_updates(ours: Tensor, theirs: Tensor, exact: bool) -> None:
    if exact:
        assert torch.equal(ours, theirs)
    else:  # without fused multiply-adds
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=4e-6)


def steps(device: str) -> Any:
    """(number, gradients, factor, weight of the average) of four steps; with both forms of `lerp`."""
    for step in range(4):
        yield step, draw(10 + step, device), 0.25 * (step + 1), 0.2 * (step + 1)


@pytest.mark.parametrize(("backend", "device"), backends(SGD))
@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_is_that_of_torch(backend: str, device: str, nesterov: bool) -> None:
    theirs = Torch("SGD", momentum=0.9, nesterov=nesterov)
    parameters, averages, momenta = draw(0, device), draw(1, device), torch.zeros(ENDS[-1], device=device)
    for _, gradients, factor, weight in steps(device):
        theirs.update(gradients.cpu(), factor, weight)
        numbers = torch.tensor([factor, weight, 0.9, *sum(zip(RATES, DECAYS, strict=True), ())], device=device)
        with yf.backend(backend):
            yf.ops.sgd_update(parameters, gradients, momenta, averages, numbers, ENDS, nesterov=nesterov)
        assert_updates(parameters, theirs.parameters, backend == "cpu")
        assert_updates(averages, theirs.average, backend == "cpu")
        assert not gradients.any()


def adam_numbers(kind: str, step: int, factor: float, weight: float) -> Tensor:
    root = math.sqrt(1 - 0.999 ** (step + 1))
    of_groups = [
        (rate / (1 - 0.9 ** (step + 1)), 1 - rate * decay if kind == "AdamW" else decay, root)
        for rate, decay in zip(RATES, DECAYS, strict=True)
    ]
    return torch.tensor([factor, weight, 1 - 0.9, 0.999, 1 - 0.999, *sum(of_groups, ())])


@pytest.mark.parametrize(("backend", "device"), backends(ADAM))
@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_adam_is_that_of_torch(backend: str, device: str, kind: str) -> None:
    theirs = Torch(kind, betas=(0.9, 0.999))
    parameters, averages = draw(0, device), draw(1, device)
    first, second = torch.zeros(ENDS[-1], device=device), torch.zeros(ENDS[-1], device=device)
    for step, gradients, factor, weight in steps(device):
        theirs.update(gradients.cpu(), factor, weight)
        numbers = adam_numbers(kind, step, factor, weight).to(device)
        with yf.backend(backend):
            arguments = parameters, gradients, first, second, averages, numbers, ENDS
            yf.ops.adam_update(*arguments, decoupled=kind == "AdamW")
        # torch's square root is MKL's: by processor, a few hundredths of the numbers have the other neighbour.
        for ours, expected in ((parameters, theirs.parameters), (averages, theirs.average)):
            assert_updates(ours, expected, exact=False)
            assert backend != "cpu" or (ours != expected).double().mean() < 0.05
        assert not gradients.any()


@pytest.mark.parametrize(("backend", "device"), backends(SGD))
@pytest.mark.parametrize("buffers", [4, 5])
def test_a_nan_as_factor_only_zeroes_the_gradients(backend: str, device: str, buffers: int) -> None:
    """Also of gradients that are not finite, whose product with zero would not be zero."""
    flat = [draw(seed, device) for seed in range(buffers)]
    before = [tensor.clone() for tensor in flat]
    flat[1][3] = float("inf")
    with yf.backend(backend):
        if buffers == 4:
            numbers = torch.tensor([float("nan"), 0.5, 0.9, *[0.1] * 2 * len(ENDS)], device=device)
            yf.ops.sgd_update(flat[0], flat[1], flat[2], flat[3], numbers, ENDS)
        else:
            numbers = adam_numbers("Adam", 0, float("nan"), 0.5).to(device)
            yf.ops.adam_update(flat[0], flat[1], flat[2], flat[3], flat[4], numbers, ENDS)
    assert not flat.pop(1).any()
    assert all(torch.equal(*pair) for pair in zip(flat, before[:1] + before[2:], strict=True))


@pytest.mark.parametrize(("backend", "device"), backends(SGD, eager=False))
def test_threads_and_a_large_buffer_change_nothing(backend: str, device: str) -> None:
    count = 2**12 + 3 if backend == "triton" else 2**18 + 3
    made = [torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(device) for seed in range(4)]
    numbers = torch.tensor([0.5, 0.01, 0.9, 0.1, 0.0, 0.01, 5e-4], device=device)
    found = [tensor.clone() for tensor in made]
    with yf.backend(backend):
        yf.ops.sgd_update(*found, numbers, [count // 3, count])  # type: ignore[arg-type]
    with yf.backend("eager"):
        yf.ops.sgd_update(*made, numbers, [count // 3, count])  # type: ignore[arg-type]
    for ours, theirs in zip(found, made, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_arguments_that_do_not_fit_are_refused() -> None:
    flat, numbers = torch.zeros(8), torch.zeros(5)

    def update(*buffers: Any, numbers: Any = numbers, ends: Any = (8,)) -> None:
        arguments = [*buffers, *[flat.clone() for _ in range(4 - len(buffers))]]
        yf.ops.sgd_update(*arguments, numbers, ends)

    with pytest.raises(TypeError, match=r"gradients: expected a tensor of float32, got torch\.float64"):
        update(flat, flat.double())
    with pytest.raises(ValueError, match=r"momenta: expected \[8\], got \[7\]"):
        update(flat, flat, torch.zeros(7))
    with pytest.raises(ValueError, match="parameters: expected a contiguous tensor"):
        update(torch.zeros(16)[::2])
    with pytest.raises(ValueError, match="parameters: expected a tensor that requires no gradient"):
        update(torch.zeros(8, requires_grad=True))
    with pytest.raises(ValueError, match=r"ends: expected ascending ends of groups up to 8, got \[4\]"):
        update(ends=[4])
    with pytest.raises(TypeError, match="ends: expected a list of integers, got str"):
        update(ends="8")
    with pytest.raises(ValueError, match=r"numbers: expected \[5\], got \[4\]"):
        update(numbers=torch.zeros(4))


def test_triton_leaves_more_groups_than_it_takes_to_others() -> None:
    with yf.backend("triton"), pytest.raises(yf.ops.BackendUnavailable):
        yf.ops.sgd_update(*[torch.zeros(8) for _ in range(4)], torch.zeros(13), [1, 2, 3, 4, 8])  # type: ignore[arg-type]
