"""Statistics of all processes: combined without cancellation, exchanged without a copy from the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import yolov9_fast as yf
from tests.devices import backends
from tests.ops.batch_norm_cases import EPS, MOMENTUM
from yolov9_fast.ops._batch_norm import statistics
from yolov9_fast.ops._bn_silu import OPERATOR
from yolov9_fast.ops._sync_statistics import combined

FORMS = [each for each in backends(OPERATOR) if each.values[0] in ("eager", "triton")]


@pytest.fixture
def eight_processes() -> Iterator[Any]:
    """A group in which this process is alone, and gets its own values from the others."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


class Calls(TorchDispatchMode):
    """Counts operators; views are none, but values of the host that become a tensor are (`lift_fresh`)."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name().split(".")[0]] += not func.is_view or "lift" in func.name()
        return func(*args, **(kwargs or {}))


def copies(calls: Calls) -> list[str]:
    return [name for name, number in calls.counts.items() if number and ("copy" in name or "lift" in name)]


def _combine(backend: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "eager":
        return combined(*arguments)
    from yolov9_fast.kernels.sync_statistics import bn_combine

    return bn_combine(*arguments)


@pytest.mark.parametrize(("backend", "device"), FORMS)
@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("sizes", [(3, 0, 2), (0, 4), (1,) * 9])
def test_combined_statistics_are_those_of_all_values(
    backend: str, device: str, mean: float, sizes: tuple[int, ...]
) -> None:
    """A process without images counts for nothing; the mean may lie far above the deviation."""
    x = mean + torch.randn(sum(sizes), 20, 3, 2, generator=torch.Generator().manual_seed(0)).to(device)
    rows = [torch.cat((*statistics(part), torch.tensor([6.0 * len(part)], device=device))) for part in x.split(sizes)]
    running = [torch.zeros(20, device=device), torch.ones(20, device=device)]
    found = _combine(backend, torch.stack(rows), *running, MOMENTUM, EPS)
    exact = x.double()
    torch.testing.assert_close(found[0].double(), exact.mean((0, 2, 3)), rtol=2e-7, atol=3e-7)
    torch.testing.assert_close(found[1].double(), (exact.var((0, 2, 3), False) + EPS).rsqrt(), rtol=2e-5, atol=0)
    assert float(found[2]) == 6 * sum(sizes)
    torch.testing.assert_close(running[0].double(), MOMENTUM * exact.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    expected = 1 - MOMENTUM + MOMENTUM * exact.var((0, 2, 3))
    torch.testing.assert_close(running[1].double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize(("backend", "device"), FORMS)
def test_processes_without_a_value_give_finite_statistics(backend: str, device: str) -> None:
    found = _combine(backend, torch.zeros(2, 9, device=device), None, None, MOMENTUM, EPS)
    assert [value.isfinite().all() for value in found] == [True] * 3


@pytest.mark.parametrize(("backend", "device"), FORMS)
def test_a_value_that_is_not_finite_spoils_its_channel_alone(backend: str, device: str) -> None:
    table = torch.ones(3, 9, device=device)
    table[1, 2] = table[2, 7] = float("nan")
    mean, rstd, _ = _combine(backend, table, None, None, MOMENTUM, EPS)
    assert mean.isnan().tolist() == [False, False, True, False]
    assert rstd.isnan().tolist() == [False, False, True, True]


def test_a_synchronised_unit_communicates_once_each_way_and_copies_nothing_from_the_host(eight_processes: Any) -> None:
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    weight, bias, mean, var = torch.rand(4, 4).unbind()
    with Calls() as planted:
        x.new_tensor([2.0])
    assert copies(planted) == ["aten::lift_fresh"]
    with Calls() as forward:
        z = yf.ops.bn_silu(x, weight, bias, mean, var, training=True, momentum=MOMENTUM, eps=EPS, group=eight_processes)
    with Calls() as backward:
        z.backward(torch.ones_like(z))
    collectives = {name: n for name, n in forward.counts.items() if name.startswith("c10d::")}
    assert sum(collectives.values()) == 1, collectives
    assert not copies(forward)
    assert backward.counts["c10d::allreduce_"] == 1
    assert not copies(backward)
    kernels = {name: n for name, n in forward.counts.items() if name.startswith("yolov9_fast::")}
    assert kernels == {f"yolov9_fast::{name}": 1 for name in ("bn_stats", "bn_combine", "bn_silu_apply")}
    # Three kernels, the collective, and what packs its message: zeros and ones are made once.
    assert sum(forward.counts.values()) <= 10, forward.counts
