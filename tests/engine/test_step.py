"""The training step computes what the same lines of plain PyTorch compute."""

from __future__ import annotations

import copy
import math
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
from yolov9_fast.engine.distributed import ProcessGroup, _parts
from yolov9_fast.engine.ema import ModelEMA
from yolov9_fast.engine.loss_scale import LossScale
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
    name = options.pop("optimizer", "sgd")
    optimizer = build_optimizer(model, name, lr=0.1, momentum=0.9, weight_decay=1e-3)
    device = next(model.parameters()).device
    scale = LossScale(device, enabled=options.pop("scaled", False))
    state = TrainingState(model, ModelEMA(model), optimizer, scale)
    group = ProcessGroup(0, options.pop("processes", 1), device)
    return TrainStep(state, DetectionLoss(3), device, clip=clip, channels_last=False, group=group, **options)


def run(step: TrainStep, update: bool = False) -> bool:
    return bool(step(IMAGES, TARGETS, size=None, update=update, clock=PhaseClock(*PHASES)).skipped)


def average_in(average: nn.Module, model: nn.Module, updates: int) -> None:
    """The moving average as separate operations on each tensor."""
    weight = 1 - 0.9999 * (1 - math.exp(-updates / 2000))
    for own, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        own.lerp_(value, weight) if value.is_floating_point() else own.copy_(value)


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clip", [0.0, 1e6, 0.5])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_batches_and_updates_equal_plain_pytorch(
    model: DetectionModel, device: str, clip: float, optimizer: str
) -> None:
    plain = copy.deepcopy(model)
    average = copy.deepcopy(model)
    step = make_step(model, clip, optimizer=optimizer)
    clock = PhaseClock(*PHASES)
    theirs = build_optimizer(plain, optimizer, lr=0.1, momentum=0.9, weight_decay=1e-3)
    criterion = DetectionLoss(3)
    for number in range(6 if optimizer == "sgd" else 2):  # Adam divides by the gradient's size: rounding grows
        update = number % 2 == 1
        for one in (step.state.optimizer, theirs):
            one.param_groups[0]["lr"] = 0.01 * (number + 1)
        losses, skipped = step(IMAGES, TARGETS, size=None, update=update, clock=clock)
        assert not skipped
        loss = criterion(plain(IMAGES.to(device).float() / 255), TARGETS, 64)
        loss.total.backward()
        if number < 2 or clip != 0.5:
            assert torch.equal(losses.to(device), loss.items.double())
        if not update:
            for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-5)
            continue
        if clip:
            nn.utils.clip_grad_norm_(plain.parameters(), clip)
        theirs.step()
        theirs.zero_grad()
        average_in(average, plain, number // 2 + 1)
        # The norm is summed in another order than torch's, which tells where gradients are clipped.
        exact = clip != 0.5 and optimizer == "sgd" and device == "cpu"
        for ours, expected in ((model, plain), (step.state.ema.model, average)):
            for name, value in expected.state_dict().items():
                own = ours.state_dict()[name]
                assert torch.equal(own, value) if exact else torch.allclose(own, value, rtol=1e-4, atol=1e-5), name
        assert all(parameter.grad is None for parameter in model.parameters())
    assert all(clock.seconds[phase] > 0 for phase in ("data", "forward", "loss", "backward"))


def test_a_skipped_update_changes_neither_weights_nor_average(model: DetectionModel) -> None:
    step = make_step(model, clip=10.0)
    step(IMAGES, TARGETS, size=None, update=False, clock=PhaseClock(*PHASES))
    weights = {name: value.clone() for name, value in model.named_parameters()}
    average = {name: value.clone() for name, value in step.state.ema.model.state_dict().items()}
    next(model.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]
    assert run(step, update=True)
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
def test_an_update_never_waits_for_the_device_also_where_it_is_skipped(model: DetectionModel, spoilt: bool) -> None:
    step = make_step(model, clip=10.0, scaled=True)
    run(step)
    scale = float(step.state.scale.value)
    averages = dict(step.state.ema.model.named_buffers())
    buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    kept = {name: buffer.clone() for name, buffer in buffers.items()}
    assert all(not torch.equal(buffer, averages[name]) for name, buffer in kept.items())
    lost = next(iter(buffers))
    if spoilt:
        next(model.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
        buffers[lost][0] = float("nan")
    with Calls() as calls:
        finite = step.update()
    assert calls.counts["aten::_local_scalar_dense"] == 0
    assert bool(finite) is not spoilt
    if spoilt:
        assert torch.equal(buffers.pop(lost), averages[lost])
        assert step.state.scale.value == scale / 2
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
def test_a_data_parallel_step_sends_one_buffer_in_a_few_parts_and_no_other(model: DetectionModel, group: str) -> None:
    alone = make_step(copy.deepcopy(model), clip=10.0, processes=1)
    step = make_step(model, clip=10.0, processes=2)  # of which one is there: the mean is half of its sum, scaled by 2
    for update in (False, True, True):
        run(alone, update=update)
        with Calls() as calls:
            assert not run(step, update=update)
        counts = {name: n for name, n in calls.counts.items() if name.startswith("c10d::")}
        parts = len(_parts(step.state.flat, 4))
        assert counts.get("c10d::allreduce_", 0) == parts * update
        assert counts.keys() <= {"c10d::allreduce_"}
    assert 3 <= parts <= 6
    for own, expected in zip(model.state_dict().values(), alone.state.model.state_dict().values(), strict=True):
        assert torch.equal(own, expected)


def test_the_parts_cover_the_buffer_once(model: DetectionModel) -> None:
    flat = make_step(model, clip=0.0).state.flat
    for number in (1, 2, 4, 1000):
        parts = _parts(flat, number)
        places = sorted((place.start, place.stop) for place, _ in parts)
        assert [start for start, _ in places] == [0, *(end for _, end in places[:-1])]
        assert places[-1][1] == len(flat.gradients)
        for place, indices in parts:
            assert all(place.start <= flat.slices[i].start < flat.slices[i].stop <= place.stop for i in indices)
        assert sorted(i for _, indices in parts for i in indices) == list(range(len(flat.trained)))
