"""A step that was recorded once and is replayed gives what a called step gives, bit for bit: nothing is baked in.

Without a GPU the recording is one of operations (`tests/recording.py`), or a graph that `make_fx` traces.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from tests.engine.test_flat import addresses
from tests.engine.test_step import make_step
from tests.recording import Recording, record
from yolov9_fast.data.plan import Arrays
from yolov9_fast.data.planned import PlannedImages
from yolov9_fast.engine.clock import PhaseClock
from yolov9_fast.engine.step import PHASES, StepResult, TrainStep
from yolov9_fast.losses.terms import LossTerm
from yolov9_fast.models import DetectionModel, create_model
from yolov9_fast.nn import plan
from yolov9_fast.ops import _assign, _batch_norm, _concat, _decode, _detection_loss


@pytest.fixture
def model(tiny_graph: Path) -> DetectionModel:
    torch.manual_seed(0)
    return create_model(tiny_graph, 3, class_tower=8)


def trace(program: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A recorder that traces with `make_fx`; tensors that were written to have their values again afterwards."""
    results: Any = None

    def tensors_of() -> list[Tensor]:
        nonlocal results
        results = program()
        return pytree.tree_leaves(results[0])

    with Recording():  # which undoes what tracing did
        graph = make_fx(tensors_of)()
    static = StepResult(*(torch.empty_like(value) for value in results[0]))

    def replay() -> None:
        with torch.no_grad():
            for place, value in zip(static, graph(), strict=True):
                place.copy_(value)

    return replay, (static, *results[1:])


def batch(number: int, images: int = 2) -> tuple[Tensor, Tensor]:
    """Images and 1 to 6 objects each of the step of this number."""
    generator = torch.Generator().manual_seed(number)
    pictures = torch.randint(0, 256, (images, 3, 64, 64), dtype=torch.uint8, generator=generator)
    counts = torch.randint(1, 7, (images,), generator=generator)
    image = torch.arange(images).repeat_interleave(counts)[:, None]
    label = torch.randint(3, (len(image), 1), generator=generator)
    centre = torch.rand(len(image), 2, generator=generator) * 0.8 + 0.1
    return pictures, torch.cat((image, label, centre, torch.rand(len(image), 2, generator=generator) * 0.4 + 0.05), 1)


def run_steps(step: TrainStep, numbers: range, *, spoilt: int = -1, accumulate: int = 2) -> list[Tensor]:
    """Steps with other images, targets, rates and momenta each; before that of number `spoilt` a weight is infinite.

    Returns losses and skips of all, then everything that the run has at the end.
    """
    results: list[Tensor] = []
    for number in numbers:
        for group in step.state.optimizer.param_groups:
            group["lr"] = 0.002 * (number + 1)
            if "momentum" in group:
                group["momentum"] = 0.8 + 0.005 * number
            else:
                group["betas"] = (0.8 + 0.005 * number, 0.999)
        weight, kept = next(step.state.model.parameters()), None
        if number == spoilt:
            kept = weight.detach().clone()
            weight.data.fill_(float("inf"))
        update = number % accumulate == accumulate - 1
        results += step(*batch(number), size=None, update=update, clock=PhaseClock(*PHASES))
        if kept is not None:
            weight.data.copy_(kept)
    state = step.state
    results += [value.clone() for value in state.model.state_dict().values()]
    results += [value.clone() for value in state.ema.model.state_dict().values()]
    results += [moment.clone() for moment in state.flat.moments]
    return [*results, state.scale.value.clone(), state.ema.updates.clone(), step.totals.clone(), step.skipped.clone()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(first, second, strict=True))


def made(model: DetectionModel, record: Any, step_class: type[TrainStep] = TrainStep, **options: Any) -> TrainStep:
    """A step on a copy of the model."""
    step = make_step(copy.deepcopy(model), clip=5.0, **options)
    return step_class(
        step.state, step.criterion, step.device, step.amp, step.clip, channels_last=False, capture="auto", record=record
    )


@pytest.fixture(params=[record, trace])
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`make_fx` cannot trace slots of a buffer: with it blocks run as they are defined, traced or called."""
    if request.param is trace:
        for module in (plan, _batch_norm):
            monkeypatch.setattr(module, "recorded", lambda: True)
        for module in (_assign, _decode, _detection_loss):
            monkeypatch.setattr(module, "unless_recorded", lambda operator: operator)
        monkeypatch.setattr(_concat, "_adjacent", lambda parts: None)
        monkeypatch.setattr(_detection_loss, "_check_values", lambda *args: None)  # both read on a CPU only
        monkeypatch.setattr(_detection_loss, "_all_ones", lambda values: True)
    return request.param


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("scaled", [False, True])
def test_twenty_replays_equal_twenty_calls(model: DetectionModel, recorder: Any, optimizer: str, scaled: bool) -> None:
    called, replayed = (made(model, one, optimizer=optimizer, scaled=scaled) for one in (None, recorder))
    first = run_steps(called, range(8)), run_steps(replayed, range(8))
    assert same(*first)
    assert len(replayed.captured.recorded) == 2  # with and without an update
    before = addresses(replayed)
    results = [run_steps(step, range(8, 28), spoilt=17) for step in (called, replayed)]
    assert same(*results)
    assert int(called.skipped) == 1
    assert float(called.state.scale.value) == (32768.0 if scaled else 1.0)
    assert addresses(replayed) == before
    assert replayed.captured.reason is None
    assert len(replayed.captured.recorded) == 2


def test_other_shapes_get_recordings_of_their_own_and_a_plain_call_beyond_the_limit(
    model: DetectionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yolov9_fast.engine.step._MOST_RECORDINGS", 3)
    called, replayed = (made(model, one) for one in (None, record))
    for step in (called, replayed):
        for number in range(24):
            images, targets = batch(number, images=(2, 1)[number % 2])  # the last batch of an epoch is a short one
            size = (None, 96, 128)[number // 2 % 3]
            step(images, targets, size=size, update=True, clock=PhaseClock(*PHASES))
    assert len(replayed.captured.recorded) == 3
    assert same(run_steps(called, range(2)), run_steps(replayed, range(2)))


@pytest.mark.parametrize("change", ["freeze", "mode", "hook", "gain", "clip", "term", "module", "weights"])
def test_what_a_callback_changes_takes_effect(model: DetectionModel, change: str) -> None:
    """Recordings are made anew where the model's structure or an option of the step is another."""
    called, replayed = (made(model, one) for one in (None, record))
    fired: list[int] = []
    for step in (called, replayed):
        weighted = LossTerm("more", lambda maps, assignment, gt: maps[0].square().mean(), 1.0)
        step.criterion.terms = (weighted,)
        step.criterion.names = (*step.criterion.names, "more")
        step.totals = step.totals.new_zeros(5)
        run_steps(step, range(8), accumulate=1)
        network = step.state.model
        if change == "freeze":
            network.model[0].requires_grad_(False)
        elif change == "mode":
            network.model[0].eval()
        elif change == "hook":
            network.model[0].register_forward_hook(lambda *args: fired.append(1))
        elif change == "gain":
            step.criterion.gains = (1.0, 2.0, 3.0)
        elif change == "clip":
            step.clip = 0.01
        elif change == "term":
            step.criterion.terms = (LossTerm("more", weighted.function, 3.0),)
        elif change == "module":
            conv = network.model[0].conv  # type: ignore[union-attr]
            conv.forward = lambda x, own=conv: nn.Conv2d.forward(own, x) * 0.5
        else:
            with torch.no_grad():
                next(network.parameters()).mul_(0.5)
    assert same(*(run_steps(step, range(8, 20), accumulate=1) for step in (called, replayed)))
    if change == "hook":
        assert len(fired) >= 12


class Baked(TrainStep):
    """A step with a planted fault: it reads the learning rate as a number of Python."""

    def _update(self, idle: frozenset[int]) -> Tensor:
        self.state.flat._rates[2::2] = self.state.optimizer.param_groups[0]["lr"]
        return super()._update(idle)


class Reading(TrainStep):
    """A step with a planted `.item()`."""

    def _update(self, idle: frozenset[int]) -> Tensor:
        if self.state.flat.gradients.sum().item() == float("inf"):
            raise AssertionError
        return super()._update(idle)


class Allocating(TrainStep):
    """A step that makes one of its lasting tensors anew."""

    def _update(self, idle: frozenset[int]) -> Tensor:
        finite = super()._update(idle)
        self.state.flat.moments[0] = self.state.flat.moments[0].clone()
        return finite


def test_a_planted_number_that_is_baked_in_is_found(model: DetectionModel, recorder: Any) -> None:
    called, replayed = (made(model, one, Baked) for one in (None, recorder))
    assert same(run_steps(called, range(7)), run_steps(replayed, range(7)))
    assert not same(run_steps(called, range(7, 12)), run_steps(replayed, range(7, 12)))


@pytest.mark.parametrize("recorder", [None, record])
def test_a_planted_allocation_is_found(model: DetectionModel, recorder: Any) -> None:
    step = made(model, recorder, Allocating)
    run_steps(step, range(6))
    before = addresses(step)
    run_steps(step, range(6, 8))
    assert addresses(step) != before


def test_a_planted_read_is_found_and_the_run_goes_on_uncaptured(
    model: DetectionModel, caplog: pytest.LogCaptureFixture
) -> None:
    """As with a CUDA graph: what the host would read cannot be recorded."""
    caplog.set_level(logging.WARNING, "yolov9_fast")
    called, replayed = (made(model, one, Reading) for one in (None, refusing_reads))
    assert same(run_steps(called, range(16)), run_steps(replayed, range(16)))
    assert len(caplog.messages) == 1
    assert "the training step: not captured" in caplog.text
    assert "the host reads" in caplog.text
    assert same(run_steps(called, range(2)), run_steps(replayed, range(2)))


CHECKS = ("_detection_loss.py:_check_values", "_detection_loss.py:_all_ones")
"""What is read on a CPU only (`tests/test_waits.py`)."""


class _NoReads(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reading = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select")
        if func.name() in reading and place() not in CHECKS:
            raise RuntimeError(f"the host reads what {func.name()} gives")
        return func(*args, **(kwargs or {}))


def place() -> str:
    """File and function of the package that call what runs."""
    frame: Any = sys._getframe()
    while "yolov9_fast" not in Path(frame.f_code.co_filename).parts:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"


def refusing_reads(program: Callable[[], Any]) -> Any:
    with _NoReads():
        return record(program)


def test_the_step_itself_reads_nothing_on_the_host(model: DetectionModel) -> None:
    called, replayed = (made(model, one) for one in (None, refusing_reads))
    assert same(run_steps(called, range(12)), run_steps(replayed, range(12)))
    assert len(replayed.captured.recorded) == 2


PIXELS = torch.randint(0, 256, (8 * 64 * 64 * 3,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
"""Eight images of 64 x 64."""


def planned_batch(number: int, images: int = 2) -> PlannedImages:
    """Plans of one form: every other batch has a second view, every third is without mosaic."""
    draw = np.random.default_rng(number)
    tiles, canvases = np.zeros((images, 2, 4, 5), np.int64), np.zeros((images, 2, 2), np.int64)
    matrices = np.zeros((images, 2, 3, 3))
    for sample in range(images):
        for view in range(1 + number % 2):
            places = [(0, 0)] if number % 3 == 0 else [(0, 0), (64, 0), (0, 64), (64, 64)]
            for tile, place in enumerate(places):
                tiles[sample, view, tile] = (draw.integers(8) * 64 * 64 * 3, 64, 64, *place)
            canvases[sample, view] = 64 if number % 3 == 0 else 128
            matrices[sample, view] = np.eye(3)
            matrices[sample, view, :2] += draw.uniform(-0.3, 0.3, (2, 3))
    tables = np.tile(draw.permutation(180).repeat(2)[:256].astype(np.uint8), (images, 3, 1))
    flips, shares = draw.random((images, 2)) < 0.5, draw.random(images)
    members = np.zeros((images, 2, 4), np.int64)
    arrays = Arrays(members, tiles, canvases, matrices, tables, flips, shares)
    return PlannedImages.of(arrays, 64, perspective=False)


def test_a_step_that_makes_its_images_makes_those_of_each_plan(model: DetectionModel) -> None:
    """With and without mixup and mosaic by one recording; a short batch has its own; nothing of a plan is baked in."""
    called, replayed = (made(model, one) for one in (None, refusing_reads))
    results: list[list[Tensor]] = []
    for step in (called, replayed):
        step.pixels = PIXELS
        seen = []
        for number in range(24):
            images = 1 if number % 8 == 7 else 2
            plan, targets = planned_batch(number, images), batch(number, images)[1]
            loss, _ = step(plan, targets, size=None, update=True, clock=PhaseClock(*PHASES))
            assert torch.equal(step.images, plan.make(PIXELS))
            seen.append(loss)
        results.append([*seen, *(value.clone() for value in step.state.model.state_dict().values())])
    assert same(*results)
    assert replayed.captured.reason is None
    assert len(replayed.captured.recorded) == 1
    assert len({tuple(loss.tolist()) for loss in results[0][:24]}) == 24


def test_plans_without_the_images_that_they_name_are_refused(model: DetectionModel) -> None:
    with pytest.raises(ValueError, match=r"^images: expected a tensor by a step without pixels, got plans of images$"):
        made(model, None)(planned_batch(0), batch(0)[1], size=None, update=True, clock=PhaseClock(*PHASES))


def test_a_recording_that_fails_leaves_nothing_behind(model: DetectionModel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "yolov9_fast")

    def failing(program: Callable[[], Any]) -> Any:
        record(program)
        raise RuntimeError("no more memory")

    called, replayed = (made(model, one) for one in (None, failing))
    assert same(run_steps(called, range(20)), run_steps(replayed, range(20)))
    assert [*caplog.messages] == [
        "the training step: not captured as a CUDA graph: RuntimeError: no more memory; it goes on without"
    ]


def test_capture_off_records_nothing(model: DetectionModel) -> None:
    step = made(model, record)
    off = TrainStep(step.state, step.criterion, step.device, channels_last=False, capture="off", record=record)
    run_steps(off, range(8))
    assert off.captured.recorded == ()
