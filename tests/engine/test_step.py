"""The training step computes what the same lines of plain PyTorch compute."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from yolov9_fast.engine.clock import PhaseClock
from yolov9_fast.engine.ema import ModelEMA
from yolov9_fast.engine.optimizer import build_optimizer
from yolov9_fast.engine.step import PHASES, TrainStep
from yolov9_fast.engine.training_state import TrainingState
from yolov9_fast.losses import DetectionLoss
from yolov9_fast.models import DetectionModel, create_model

IMAGES = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.6], [1, 0, 0.3, 0.6, 0.2, 0.2]])


@pytest.fixture
def model(tiny_graph: Path) -> DetectionModel:
    torch.manual_seed(0)
    return create_model(tiny_graph, 3, class_tower=8)


def make_step(model: DetectionModel, clip: float) -> TrainStep:
    optimizer = build_optimizer(model, "sgd", lr=0.1, momentum=0.9, weight_decay=1e-3)
    state = TrainingState(model, ModelEMA(model), optimizer, torch.amp.GradScaler("cpu", enabled=False))
    return TrainStep(model, state, DetectionLoss(3), torch.device("cpu"), clip=clip, channels_last=False)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_two_batches_and_an_update_equal_plain_pytorch(model: DetectionModel, clip: float) -> None:
    plain = copy.deepcopy(model)
    step = make_step(model, clip)
    clock = PhaseClock(*PHASES)
    for update in (False, True):
        losses, skipped = step(IMAGES, TARGETS, size=None, update=update, clock=clock)
        assert not skipped
    optimizer = build_optimizer(plain, "sgd", lr=0.1, momentum=0.9, weight_decay=1e-3)
    average = ModelEMA(plain)
    criterion = DetectionLoss(3)
    for _ in range(2):
        loss = criterion(plain(IMAGES.float() / 255), TARGETS, 64)
        loss.total.backward()
    if clip:
        nn.utils.clip_grad_norm_(plain.parameters(), clip)
    optimizer.step()
    average.update(plain)
    assert torch.equal(losses, loss.items.double())
    expected = plain.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    expected = average.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in step.state.ema.model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(clock.seconds[phase] > 0 for phase in ("data", "forward", "loss", "backward"))


def test_a_skipped_update_changes_neither_weights_nor_average(model: DetectionModel) -> None:
    step = make_step(model, clip=10.0)
    step(IMAGES, TARGETS, size=None, update=False, clock=PhaseClock(*PHASES))
    weights = {name: value.clone() for name, value in model.named_parameters()}
    average = {name: value.clone() for name, value in step.state.ema.model.state_dict().items()}
    next(model.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]
    _, skipped = step(IMAGES, TARGETS, size=None, update=True, clock=PhaseClock(*PHASES))
    assert skipped
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    assert all(torch.equal(value, average[name]) for name, value in step.state.ema.model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_images_are_resized_to_a_size(model: DetectionModel) -> None:
    shapes: list[torch.Size] = []
    model.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    make_step(model, clip=0.0)(IMAGES, TARGETS, size=96, update=False, clock=PhaseClock(*PHASES))
    assert shapes == [(2, 3, 96, 96)]
