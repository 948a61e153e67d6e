"""What stays float32 in a training step under mixed precision on a CPU: weights, statistics, loss and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import yolov9_fast as yf
from yolov9_fast.engine.device import autocast
from yolov9_fast.losses import DetectionLoss
from yolov9_fast.models import create_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("accelerated", [False, True])
def test_weights_statistics_loss_and_gradients_are_float32(tiny_graph: Path, backend: str, accelerated: bool) -> None:
    torch.manual_seed(0)
    model = create_model(tiny_graph, 3, class_tower=8).train()
    if accelerated:
        yf.accelerate(model)
    images = torch.rand(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.4], [1, 2, 0.3, 0.6, 0.2, 0.5]])
    before = {name: value.clone() for name, value in model.named_buffers()}
    with yf.backend(backend):
        with autocast(CPU, "bf16"):
            output = model(images)
        loss = DetectionLoss(3)(output, targets, (64, 64))
        loss.total.backward()
    assert {one.dtype for one in output.main} == {torch.bfloat16}
    assert loss.total.dtype == loss.items.dtype == torch.float32
    assert torch.isfinite(loss.items).all()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    changed = [name for name, value in model.named_buffers() if not torch.equal(value, before[name])]
    assert any(name.endswith("running_var") for name in changed)
    assert {value.dtype for value in model.buffers() if value.is_floating_point()} == {torch.float32}
