"""Run by torchrun: DDP of an accelerated model, SyncBatchNorm converted before or after, against one process.

Prints "equal" once per process and order.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import yolov9_fast as yf
from tests.accelerate.official_shaped import DetectionModel
from yolov9_fast.nn.sync_batch_norm import convert_sync_batch_norm


def gradients(model: torch.nn.Module, images: torch.Tensor, share: float) -> dict[str, torch.Tensor]:
    total = torch.stack([m.square().sum() for m in model.train()(images)]).sum() * share
    total.backward()
    return {key.removeprefix("module."): p.grad for key, p in model.named_parameters() if p.grad is not None}


def build() -> DetectionModel:
    torch.manual_seed(0)
    return DetectionModel()


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    images = torch.rand(4, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    expected = gradients(build(), images, 1.0)
    for before in (True, False):
        model = build()
        if before:
            convert_sync_batch_norm(model)
        report = yf.accelerate(model)
        assert not report.skipped, report
        if not before:
            convert_sync_batch_norm(model)
        parallel = DistributedDataParallel(model)
        # DDP averages over the processes, hence the factor.
        found = gradients(parallel, images[2 * rank : 2 * rank + 2], dist.get_world_size())
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            scale = gradient.abs().max().clamp_min(1e-3)
            error = float((found[key] - gradient).abs().max() / scale)
            assert error < 1e-3, f"{key}: {error}"
        print("equal", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
