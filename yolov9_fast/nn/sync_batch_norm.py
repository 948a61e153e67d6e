"""BatchNorm whose statistics cover the batches of all processes, on any device and process-group backend.

torch's own SyncBatchNorm refuses CPU tensors. The operator's statistics travel as (count, mean, M2) and are combined by
the pairwise formula, never as E[x²] − E[x]².
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from yolov9_fast.ops._bn_silu import bn_silu


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over the batches of all processes; alone, or in evaluation mode, exactly that class."""

    def forward(self, x: Tensor) -> Tensor:
        alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        if not self.training or alone:
            return super().forward(x)
        mean, var, momentum = self.running_mean, self.running_var, self.momentum
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if momentum is None else momentum
        else:
            mean = var = None
        return bn_silu(
            x,
            self.weight,
            self.bias,
            mean,
            var,
            training=True,
            momentum=momentum or 0.0,
            eps=self.eps,
            activation=False,
            group=dist.group.WORLD,
        )


def convert_sync_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every `nn.BatchNorm2d` below `module` in place; parameters, buffers and names stay."""
    for norm in module.modules():
        if type(norm) is nn.BatchNorm2d:
            norm.__class__ = SyncBatchNorm2d
    return module
