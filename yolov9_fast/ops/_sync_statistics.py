"""BatchNorm statistics over the batches of all processes (SyncBN)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from yolov9_fast.ops._batch_norm import computed_in


def global_statistics(mean: Tensor, m2: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and M2 [C] over all processes of `group` and the number of values a channel, in float64.

    Every process sums the gathered (count, mean, M2) in the order of the ranks, so all get bitwise equal results.
    """
    local = torch.cat((mean.new_tensor([count], dtype=torch.float64), mean.double(), m2.double()))
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group=group)
    table = torch.stack(gathered)
    counts = table[:, :1]
    means, squares = table[:, 1:].chunk(2, 1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total.clamp_min(1)
    return mean, (squares + counts * (means - mean).square()).sum(0), total


def synchronised(
    x: Tensor,
    stats: Callable[[Tensor], tuple[Tensor, Tensor]],
    running: tuple[Tensor | None, Tensor | None],
    momentum: float,
    eps: float,
    group: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and rstd [C] of the batches of all processes, and the count; updates running mean and variance.

    `stats`: the kernel that gives mean and M2 [C] of one batch.
    """
    dtype = computed_in(x.dtype)
    with torch.no_grad():
        mean, m2 = stats(x)
        mean, m2, total = global_statistics(mean, m2, x.numel() // x.shape[1], group)
        if running[0] is not None and running[1] is not None:
            running[0].lerp_(mean.to(running[0].dtype), momentum)
            running[1].lerp_((m2 / (total - 1).clamp_min(1)).to(running[1].dtype), momentum)
        return mean.to(dtype), (m2 / total.clamp_min(1) + eps).rsqrt().to(dtype), total


def means_of(sums: Tensor, total: Tensor | None, group: Any) -> Tensor:
    """The means over all processes, which `backward_apply` takes; zeros for given statistics (no group)."""
    if total is None:
        return torch.zeros_like(sums)
    sums = sums.clone()
    dist.all_reduce(sums, group=group)
    return (sums / total).to(sums.dtype)
