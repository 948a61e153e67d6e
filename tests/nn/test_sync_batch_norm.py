"""BatchNorm over two processes equals BatchNorm over their batches together."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from yolov9_fast.nn.sync_batch_norm import SyncBatchNorm2d, convert_sync_batch_norm

SPLIT = 3


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 1e3 + torch.randn(5, 4, 3, 2, generator=generator)  # a mean far above the deviation
    return x, torch.randn(x.shape, generator=generator)


def _norm(kind: type[nn.BatchNorm2d], momentum: float | None) -> nn.BatchNorm2d:
    norm = kind(4, eps=1e-3, momentum=momentum)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 1.5, 2.0]))
        norm.bias.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    return norm


def _work(rank: int, folder: str, momentum: float | None) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, grad = (t[:SPLIT] if rank == 0 else t[SPLIT:] for t in _inputs())
    x = x.clone().requires_grad_()
    norm = _norm(SyncBatchNorm2d, momentum)
    for _ in range(2):
        y = norm(x)
    y.backward(grad)
    state = {k: v.clone() for k, v in norm.state_dict().items()}
    torch.save(
        {"y": y.detach(), "dx": x.grad, "dw": norm.weight.grad, "db": norm.bias.grad, **state}, f"{folder}/{rank}.pt"
    )
    dist.destroy_process_group()


@pytest.mark.parametrize("momentum", [0.03, pytest.param(None, marks=pytest.mark.slow)])
def test_two_processes_equal_one(tmp_path: Path, momentum: float | None) -> None:
    mp.spawn(_work, args=(str(tmp_path), momentum), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    x, grad = _inputs()
    x.requires_grad_()
    norm = _norm(nn.BatchNorm2d, momentum)
    for _ in range(2):
        y = norm(x)
    y.backward(grad)
    assert x.grad is not None
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    torch.testing.assert_close(torch.cat([p["y"] for p in parts]), y.detach(), rtol=1e-3, atol=5e-4)
    torch.testing.assert_close(torch.cat([p["dx"] for p in parts]), x.grad, rtol=1e-3, atol=5e-4)
    torch.testing.assert_close(parts[0]["dw"] + parts[1]["dw"], norm.weight.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(parts[0]["db"] + parts[1]["db"], norm.bias.grad, rtol=1e-4, atol=1e-4)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(parts[0][key], norm.state_dict()[key], rtol=1e-4, atol=1e-4)
        assert torch.equal(parts[0][key], parts[1][key])


def test_alone_it_is_batch_norm() -> None:
    x, _ = _inputs()
    assert torch.equal(_norm(SyncBatchNorm2d, 0.1)(x), _norm(nn.BatchNorm2d, 0.1)(x))


def test_conversion_keeps_keys_parameters_and_nesting() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)))
    before = {k: id(v) for k, v in dict(model.named_parameters()).items()}
    convert_sync_batch_norm(model)
    assert type(model[1][0]) is SyncBatchNorm2d
    assert {k: id(v) for k, v in dict(model.named_parameters()).items()} == before
