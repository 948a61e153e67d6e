"""BatchNorm statistics over the batches of all processes (SyncBN).

Forward and backward communicate once each. What they exchange stays on the device: the number of values is written by a
fill, so that no host waits for a copy, and both can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from yolov9_fast.ops._operator import Kernel


def gathered(mean: Tensor, m2: Tensor, count: int, group: Any) -> Tensor:
    """[processes, 2 C + 1] in the order of the ranks: mean, M2 and the number of values a channel of each process.

    The number is rounded as mean and M2 are: float32 holds it exactly up to 2^24.
    """
    packed = torch.cat((mean, m2, mean.new_full((1,), count)))
    table = packed.new_empty(dist.get_world_size(group) * packed.numel())
    # Its name until torch 2.12 is deprecated.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(table, packed, group=group)
    return table.view(-1, packed.numel())


def combined(
    table: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of the kernel `bn_combine`: mean and rstd [C] of all processes, and the number of their values [].

    Computed in float64 from `gathered`. Every process combines the same rows in the same order, so all get bitwise
    equal results. Updates the running statistics, the variance there being the unbiased one.
    """
    rows = table.double()
    counts = rows[:, -1:]
    means, squares = rows[:, :-1].chunk(2, 1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total.clamp_min(1)
    m2 = (squares + counts * (means - mean).square()).sum(0)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((m2 / (total - 1).clamp_min(1)).to(running_var.dtype), momentum)
    return mean.to(table.dtype), (m2 / total.clamp_min(1) + eps).rsqrt().to(table.dtype), total.to(table.dtype)


COMBINE = Kernel(
    "bn_combine(Tensor table, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps) "
    "-> (Tensor mean, Tensor rstd, Tensor total)",
    combined,
    lambda table, *others: (
        table.new_empty(table.shape[1] // 2),
        table.new_empty(table.shape[1] // 2),
        table.new_empty(()),
    ),
)


class _Kernels(Protocol):
    @property
    def stats(self) -> Callable[..., Any]: ...

    @property
    def combine(self) -> Callable[..., Any]: ...


def synchronised(
    kernels: _Kernels,
    x: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    momentum: float,
    eps: float,
    group: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and rstd [C] of the batches of all processes, and the count; updates running mean and variance."""
    with torch.no_grad():
        mean, m2 = kernels.stats(x)
        table = gathered(mean, m2, x.numel() // x.shape[1], group)
        result: tuple[Tensor, Tensor, Tensor] = kernels.combine(table, *running, momentum, eps)
        return result


def means_of(sums: Tensor, total: Tensor | None, group: Any) -> Tensor:
    """The means over all processes, which `backward_apply` takes; zeros for given statistics (no group)."""
    if total is None:
        return torch.zeros_like(sums)
    means = sums / total
    dist.all_reduce(means, group=group)
    return means
