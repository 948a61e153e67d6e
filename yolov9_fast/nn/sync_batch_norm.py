"""BatchNorm as the operators take it, and BatchNorm whose statistics cover the batches of all processes.

torch's own SyncBatchNorm refuses CPU tensors; `SyncBatchNorm2d` runs on any device and process-group backend. Its
statistics are exchanged as (count, mean, M2) and combined by the pairwise formula, never as E[x²] − E[x]².
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from yolov9_fast.ops._batch_norm import Norm
from yolov9_fast.ops._bn_silu import bn_silu


class _Counting(threading.local):
    """Counters of batches that are added to when the outermost `counted_together` of this thread ends."""

    pending: list[Tensor] | None = None


counting = _Counting()


@contextlib.contextmanager
def counted_together() -> Iterator[None]:
    """Within the block `arguments` counts batches at its end: on a GPU one launch counts for about a hundred norms."""
    if counting.pending is not None:
        yield
        return
    counts: list[Tensor] = []
    counting.pending = counts
    try:
        yield
    finally:
        counting.pending = None
        if len(set(map(id, counts))) == len(counts) > 1:
            torch._foreach_add_(counts, 1)
        else:  # a norm that ran twice: one kernel must not add to a counter from two places
            for count in counts:
                count.add_(1)


def arguments(norm: _BatchNorm) -> tuple[Norm, bool, float]:
    """Parameters and statistics, whether to normalise by the batch, and momentum, as `norm` itself would choose them.

    Counts the batch in `num_batches_tracked`, as BatchNorm2d does; within `counted_together` at its end. A momentum of
    None is a cumulative average.
    """
    # `norm.weight` would run a Python function of nn.Module.
    parameters, buffers = norm._parameters, norm._buffers
    if "weight" in parameters:
        weight, bias = parameters["weight"], parameters["bias"]
    else:  # plain attributes, as in the replicas of DataParallel
        weight, bias = norm.weight, norm.bias
    mean, var = buffers["running_mean"], buffers["running_var"]
    training, momentum = norm.training, norm.momentum
    if not training:
        training = mean is None and var is None
    elif not norm.track_running_stats:
        mean = var = None
    else:
        count = buffers["num_batches_tracked"]
        if count is not None:
            if momentum is None or counting.pending is None:
                count.add_(1)
                momentum = 1 / float(count) if momentum is None else momentum
            else:
                counting.pending.append(count)
    return Norm(weight, bias, mean, var), training, momentum or 0.0


def process_group(norm: _BatchNorm) -> Any:
    """The process group whose batches a synchronised BatchNorm shares; None for other norms and for one process."""
    if type(norm) is nn.BatchNorm2d or not (dist.is_available() and dist.is_initialized()):
        return None
    group = getattr(norm, "process_group", None) or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over the batches of all processes; exactly that class in one process or in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        group = process_group(self) if self.training else None
        if group is None:
            return super().forward(x)
        own, training, momentum = arguments(self)
        return bn_silu(x, *own, training=training, momentum=momentum, eps=self.eps, activation=False, group=group)


def convert_sync_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every `nn.BatchNorm2d` below `module` in place; parameters, buffers and names stay."""
    for norm in module.modules():
        if type(norm) is nn.BatchNorm2d:
            norm.__class__ = SyncBatchNorm2d
    return module
