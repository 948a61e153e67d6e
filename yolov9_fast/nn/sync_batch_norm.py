"""BatchNorm whose statistics cover the batches of all processes, on any device and process-group backend.

torch's own SyncBatchNorm refuses CPU tensors. Statistics travel as (count, mean, M2) and are combined by the pairwise
formula, never as E[x²] − E[x]².
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def _shape(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


class _SyncBatchNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, count: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, mean, rstd, count)
        normalised = (x.float() - _shape(mean)) * _shape(rstd)
        return (normalised * _shape(weight.float()) + _shape(bias.float())).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, count = ctx.saved_tensors
        grad32 = grad.float()
        normalised = (x.float() - _shape(mean)) * _shape(rstd)
        grad_bias = grad32.sum((0, 2, 3))
        grad_weight = (grad32 * normalised).sum((0, 2, 3))
        sums = torch.cat((grad_bias, grad_weight))
        dist.all_reduce(sums)
        mean_grad, mean_grad_x = (sums / count).chunk(2)
        grad_x = (grad32 - _shape(mean_grad) - normalised * _shape(mean_grad_x)) * _shape(rstd * weight.float())
        # weight and bias stay local sums: DistributedDataParallel reduces them with all other parameters.
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None, None


@torch.no_grad()
def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance [C] over all processes, and the number of values per channel (a scalar tensor)."""
    values = x.float()
    count = values.numel() // values.shape[1]
    mean = values.mean((0, 2, 3))
    squares = (values - _shape(mean)).square().sum((0, 2, 3))
    local = torch.cat((values.new_tensor([count]), mean, squares))
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, local)
    table = torch.stack(gathered)
    counts = table[:, :1]
    means, squares = table[:, 1:].chunk(2, 1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    variance = (squares + counts * (means - mean).square()).sum(0) / total
    return mean, variance, total


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over the batches of all processes; alone, or in evaluation mode, exactly that class."""

    def forward(self, x: Tensor) -> Tensor:
        alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        if not self.training or alone:
            return super().forward(x)
        mean, variance, count = _global_statistics(x)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                self.num_batches_tracked.add_(1)
                momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                unbiased = variance * (count / (count - 1).clamp_min(1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        rstd = (variance + self.eps).rsqrt()
        return _SyncBatchNormFunction.apply(x, self.weight, self.bias, mean, rstd, count)


def convert_sync_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every `nn.BatchNorm2d` below `module` in place; parameters, buffers and names stay."""
    for norm in module.modules():
        if type(norm) is nn.BatchNorm2d:
            norm.__class__ = SyncBatchNorm2d
    return module
