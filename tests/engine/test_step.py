"""The training step computes what the same lines of plain PyTorch compute."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from yolov9_fast.engine.clock import PhaseClock
from yolov9_fast.engine.distributed import ProcessGroup
from yolov9_fast.engine.ema import ModelEMA
from yolov9_fast.engine.optimizer import build_optimizer
from yolov9_fast.engine.step import PHASES, TrainStep
from yolov9_fast.engine.training_state import TrainingState
from yolov9_fast.losses import DetectionLoss
from yolov9_fast.models import DetectionModel, create_model
from yolov9_fast.nn import RepConv
from yolov9_fast.nn.sync_batch_norm import convert_sync_batch_norm

IMAGES = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.6], [1, 0, 0.3, 0.6, 0.2, 0.2]])


@pytest.fixture
def model(tiny_graph: Path, device: str) -> DetectionModel:
    torch.manual_seed(0)
    return create_model(tiny_graph, 3, class_tower=8).to(device)


def make_step(model: DetectionModel, clip: float, **options: Any) -> TrainStep:
    optimizer = build_optimizer(model, "sgd", lr=0.1, momentum=0.9, weight_decay=1e-3)
    scaler = torch.amp.GradScaler(next(model.parameters()).device.type, enabled=options.pop("scaled", False))
    state = TrainingState(model, ModelEMA(model), optimizer, scaler)
    network = options.pop("network", model)
    device = next(model.parameters()).device
    return TrainStep(network, state, DetectionLoss(3), device, clip=clip, channels_last=False, **options)


def run(step: TrainStep, update: bool = False) -> bool:
    return step(IMAGES, TARGETS, size=None, update=update, clock=PhaseClock(*PHASES))[1]


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_two_batches_and_an_update_equal_plain_pytorch(model: DetectionModel, device: str, clip: float) -> None:
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
        loss = criterion(plain(IMAGES.to(device).float() / 255), TARGETS, 64)
        loss.total.backward()
    if clip:
        nn.utils.clip_grad_norm_(plain.parameters(), clip)
    optimizer.step()
    average.update(plain)
    assert torch.equal(losses.to(device), loss.items.double())
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


def test_a_number_of_processes_scales_gradients_that_are_computed_once(model: DetectionModel) -> None:
    gradients = []
    for processes in (1, 4):
        step = make_step(copy.deepcopy(model), clip=0.0, processes=processes)
        with Calls() as calls:
            run(step)
        assert calls.counts["yolov9_fast::detection_loss_forward"] == 2  # main and auxiliary branch
        assert calls.counts["yolov9_fast::detection_loss_backward"] == 0
        gradients.append([p.grad for p in step.state.model.parameters() if p.grad is not None])
    assert all(torch.equal(4 * one, four) for one, four in zip(*gradients, strict=True))


@pytest.mark.parametrize("spoilt", [False, True])
def test_an_update_waits_once_for_the_device_also_where_it_is_skipped(model: DetectionModel, spoilt: bool) -> None:
    step = make_step(model, clip=10.0, scaled=True)
    run(step)
    scale = step.state.scaler.get_scale()
    averages = dict(step.state.ema.model.named_buffers())
    buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    kept = {name: buffer.clone() for name, buffer in buffers.items()}
    assert all(not torch.equal(buffer, averages[name]) for name, buffer in kept.items())
    lost = next(iter(buffers))
    if spoilt:
        next(model.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
        buffers[lost][0] = float("nan")
    with Calls() as calls:
        assert step.update() is not spoilt
    assert calls.counts["aten::_local_scalar_dense"] == 1
    if spoilt:
        assert torch.equal(buffers.pop(lost), averages[lost])
        assert step.state.scaler.get_scale() == scale / 2
    assert all(torch.equal(buffer, kept[name]) for name, buffer in buffers.items())


@pytest.fixture
def group(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A process group of this process: "fake" has another one, which sends what it is sent, "gloo" has none."""
    kind = request.param
    store = FakeStore() if kind == "fake" else dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(kind, rank=0, world_size=2 if kind == "fake" else 1, store=store)
    yield kind
    dist.destroy_process_group()


@pytest.mark.parametrize("group", ["fake"], indirect=True)
def test_a_step_with_synchronised_statistics_communicates_once_a_norm(model: DetectionModel, group: str) -> None:
    convert_sync_batch_norm(model)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    with Calls() as calls:
        run(make_step(model, clip=10.0, processes=2))
    counts = {name: n for name, n in calls.counts.items() if name.startswith("c10d::")}
    gathers = sum(n for name, n in counts.items() if "allgather" in name)
    assert gathers == norms
    pairs = sum(isinstance(module, RepConv) for module in model.modules())  # whose norms share that of the backward
    assert counts["c10d::allreduce_"] == norms - pairs + 1  # and the normaliser of the loss
    assert len(counts) == 2, counts


@pytest.mark.parametrize("group", ["gloo"], indirect=True)
def test_a_data_parallel_step_broadcasts_no_buffers_and_keeps_gradients_in_the_buckets(
    model: DetectionModel, group: str
) -> None:
    network = ProcessGroup(0, 2, torch.device("cpu")).parallel(model)
    step = make_step(model, clip=10.0, network=network, processes=2)
    for _ in range(2):  # the first orders the buckets, the second tells it to the other processes
        assert not run(step, update=True)
    with Calls() as calls:
        step.criterion(network(IMAGES.float() / 255), TARGETS, 64).total.backward()
    counts = {name: n for name, n in calls.counts.items() if name.startswith("c10d::")}
    assert counts.keys() == {"c10d::allreduce_"}
    storages = {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
    assert len(storages) == counts["c10d::allreduce_"]
