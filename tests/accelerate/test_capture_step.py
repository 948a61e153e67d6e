"""`capture_step`: pure steps are recorded, the faults of others are found; without a GPU by `tests/recording.py`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import yolov9_fast as yf
from tests.recording import record
from yolov9_fast._accelerate.inspection import Inspection
from yolov9_fast.errors import UserError

HERE = Path(__file__).name


class Loop:
    """A loop of somebody else: a network, SGD with momentum, a mean of losses."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), **({"lr": 0.1, "momentum": 0.9} | options))
        self.mean = torch.zeros(())
        self.extra: Callable[[Tensor], object] = lambda loss: None
        self.python = 0

    def step(self, batch: Any) -> dict[str, Tensor]:
        self.python += 1
        images, (targets,) = batch["images"], batch["targets"]
        loss = nn.functional.mse_loss(self.model(images), targets)
        self.extra(loss)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.mean.mul_(0.9).add_(loss.detach(), alpha=0.1)
        return {"loss": loss.detach()}


def batch_of(seed: int, size: int = 2) -> Any:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(size, 3, 8, 8, generator=generator)
    return {"images": images, "targets": [torch.rand(size, 2, generator=generator)]}


def test_a_pure_step_is_replayed_and_gives_the_same_bits() -> None:
    loop, plain = Loop(), Loop()
    step = yf.capture_step(loop.step, batch_of(0), record=record)
    assert not step.captured
    for seed in range(8):
        assert torch.equal(step(batch_of(seed))["loss"], plain.step(batch_of(seed))["loss"])
    assert step.captured
    assert (step.reason, step.fault) == (None, None)
    assert loop.python == 4  # three plain calls and the recording
    assert torch.equal(loop.mean, plain.mean)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(loop.model.state_dict()[name], value), name


def test_on_a_cpu_the_step_is_called_and_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    loop, plain = Loop(), Loop()
    step = yf.capture_step(loop.step, batch_of(0))
    with caplog.at_level(logging.WARNING, "yolov9_fast"):
        for seed in range(5):
            assert torch.equal(step(batch_of(seed))["loss"], plain.step(batch_of(seed))["loss"])
    assert loop.python == 5
    assert step.fault is None
    assert step.reason == "a CPU has no CUDA graphs"
    assert not caplog.records


COUNT = iter(range(1000))
KEPT: dict[str, Any] = {"mean": torch.zeros(())}


def _rebind(loss: Tensor) -> None:
    KEPT["mean"] = KEPT["mean"] * 0.9 + loss.detach()


FAULTS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "item": (lambda loss: loss.item(), "a value is read on the host (aten::_local_scalar_dense, as by .item()"),
    "branch": (lambda loss: 1 if loss > 0 else 0, "a value is read on the host (aten::_local_scalar_dense"),
    "tolist": (lambda loss: loss.detach().tolist(), "a value is read on the host (Tensor.tolist)"),
    "numpy": (lambda loss: loss.detach().numpy(), "a value is read on the host (Tensor.numpy)"),
    "equal": (lambda loss: torch.equal(loss, loss), "a value is read on the host (aten::equal"),
    "nonzero": (lambda loss: (loss > 0).nonzero(), "a shape depends on values (aten::nonzero)"),
    "mask": (lambda loss: loss.expand(2)[loss.expand(2) > 0], "a shape depends on values (aten::index with a mask"),
    "masked_select": (lambda loss: loss.masked_select(loss > 0), "a shape depends on values (aten::masked_select)"),
    "unique": (lambda loss: loss.detach().round().unique(), "a shape depends on values (aten::_unique2)"),
    "number": (lambda loss: loss * next(COUNT), "what aten::mul gets differs from call to call: "),
    "shape": (lambda loss: torch.zeros(next(COUNT)), "what aten::zeros gets differs from call to call: "),
    "operation": (lambda loss: (loss.sin, loss.cos)[next(COUNT) % 2](), "the operations differ from call to call: "),
    "more": (lambda loss: [loss.sin() for _ in range(next(COUNT))], "the operations differ from call to call: "),
    "rebound": (_rebind, "a tensor is made anew in each call and read in the next (aten::mul)"),
    "host": (lambda loss: loss.detach().to("meta"), ""),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_with_its_place(name: str, caplog: pytest.LogCaptureFixture) -> None:
    fault, expected = FAULTS[name]
    loop, plain = Loop(), Loop()
    loop.extra = fault
    step = yf.capture_step(loop.step, batch_of(0), record=record)
    with caplog.at_level(logging.WARNING, "yolov9_fast"):
        for seed in range(6):  # goes on as before
            assert torch.equal(step(batch_of(seed))["loss"], plain.step(batch_of(seed))["loss"])
    if not expected:
        assert step.captured
        return
    assert step.reason is not None
    assert step.reason.startswith(expected)
    assert f"{HERE}:" in step.reason
    assert not step.captured
    assert loop.python == 6
    (message,) = [entry.getMessage() for entry in caplog.records]
    assert message == f"Loop.step: not captured as a CUDA graph: {step.reason}"


def test_a_tensor_that_is_allocated_again_before_each_call_is_found() -> None:
    loop, kept = Loop(), []
    loop.extra = lambda loss: loss.detach() * kept[-1]
    step = yf.capture_step(loop.step, batch_of(0), record=record)
    for seed in range(5):
        kept.append(torch.full((3,), float(seed)))
        step(batch_of(seed))
    assert step.reason is not None
    assert step.reason.startswith("a tensor that aten::mul uses lies elsewhere than in the call before, at ")
    assert not step.captured


def test_a_learning_rate_of_a_schedule_is_found() -> None:
    """A scheduler inside the step, and one between the steps: a graph would keep the number."""
    for inside in (True, False):
        loop = Loop()
        schedule = torch.optim.lr_scheduler.StepLR(loop.optimizer, 1, 0.5)

        def whole(batch: Any, loop: Loop = loop, schedule: Any = schedule, inside: bool = inside) -> Any:
            result = loop.step(batch)
            if inside:
                schedule.step()
            return result

        step = yf.capture_step(whole, batch_of(0), record=record)
        for seed in range(4):
            step(batch_of(seed))
            if not inside:
                schedule.step()
        assert step.reason is not None
        assert "gets differs from call to call: -0.05, then -0.025" in step.reason


def test_a_learning_rate_that_changes_later_is_recorded_anew() -> None:
    loop, plain = Loop(), Loop()
    step = yf.capture_step(loop.step, batch_of(0), record=record)
    captured = []
    for seed in range(16):
        if seed in (5, 10):
            for each in (loop, plain):
                each.optimizer.param_groups[0]["lr"] *= 0.1
        step(batch_of(seed))
        plain.step(batch_of(seed))
        captured.append(step.captured)
    assert captured == [False, False, False, True, True] + 2 * [False, False, False, True, True] + [True]
    for name, value in plain.model.state_dict().items():
        assert torch.equal(loop.model.state_dict()[name], value), name


def test_a_number_that_keeps_changing_ends_in_plain_calls() -> None:
    loop, plain = Loop(), Loop()
    step = yf.capture_step(loop.step, batch_of(0), record=record)
    for seed in range(60):
        if seed % 5 == 4:
            for each in (loop, plain):
                each.optimizer.param_groups[0]["lr"] *= 0.9
        step(batch_of(seed))
        plain.step(batch_of(seed))
    assert step.reason is not None
    assert "keep changing" in step.reason
    assert all(map(torch.equal, loop.model.parameters(), plain.model.parameters()))
    step.reset()
    assert step.reason is None


def test_a_tensor_that_is_moved_later_is_noticed() -> None:
    loop, plain = Loop(), Loop()
    step = yf.capture_step(loop.step, batch_of(0), record=record)
    for seed in range(10):
        if seed == 6:
            weight = loop.model[4].weight
            weight.data = weight.data.clone()
        step(batch_of(seed))
        plain.step(batch_of(seed))
    assert step.captured  # anew
    assert all(map(torch.equal, loop.model.parameters(), plain.model.parameters()))


def test_batches_of_other_forms() -> None:
    loop, plain = Loop(), Loop()
    loop.model = plain.model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.0)
    step = yf.capture_step(loop.step, batch_of(0), record=record)
    for seed in range(5):
        step(batch_of(seed))
    assert step.captured
    before = loop.python
    assert torch.equal(step(batch_of(7, size=3))["loss"], plain.step(batch_of(7, size=3))["loss"])  # a plain call
    assert loop.python == before + 1
    with pytest.raises(ValueError, match=r"batch: expected the structure \{'images': T, 'targets': \[T\]\}, got T"):
        step(torch.zeros(2))
    with pytest.raises(ValueError, match="batch: expected tensors in nested tuples, lists and dicts, got int"):
        step({"images": 1, "targets": [torch.zeros(2)]})
    with pytest.raises(ValueError, match="batch: expected at least one tensor, got none"):
        yf.capture_step(loop.step, [])
    with pytest.raises(ValueError, match="example_batch: expected tensors of one device"):
        yf.capture_step(loop.step, (torch.zeros(1), torch.zeros(1, device="meta")))
    with pytest.raises(ValueError, match="warmup: expected at least 3, got 2"):
        yf.capture_step(loop.step, batch_of(0), warmup=2)
    with pytest.raises(UserError, match="capture: expected auto or off, got 'on'"):
        yf.capture_step(loop.step, batch_of(0), mode="on")


def test_switched_off_nothing_is_looked_at() -> None:
    loop = Loop()
    loop.extra = lambda loss: loss.item()
    step = yf.capture_step(loop.step, batch_of(0), mode="off", record=record)
    for seed in range(5):
        step(batch_of(seed))
    assert (step.reason, step.fault) == ("it is switched off", None)


def test_copies_between_devices_are_found() -> None:
    inspection = Inspection(torch.device("cuda"))
    one, step = torch.zeros(2), torch.zeros(())
    inspection.call(lambda: one + 1)  # of constants of the host
    assert inspection.fault is None
    inspection = Inspection(torch.device("cuda"))
    inspection.call(lambda: step.add_(1))  # as Adam counts without capturable=True
    assert inspection.fault is not None
    assert inspection.fault.startswith("a tensor of the host is changed (aten::add_), at ")


def test_a_network_of_this_package_is_pure() -> None:
    """Forward and backward on the fused operators: nothing that a graph cannot repeat."""
    torch.manual_seed(0)
    model = yf.create_model("yolov9-t", 3).train()
    other = copy.deepcopy(model)

    def step(model: nn.Module) -> Callable[[Tensor], Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

        def run(images: Tensor) -> Tensor:
            output = model(images)
            loss = torch.stack([level.square().mean() for level in (*output.main, *output.auxiliary)]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return run

    captured, plain = yf.capture_step(step(model), torch.empty(2, 3, 64, 64), record=record), step(other)
    for seed in range(5):
        images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(captured(images), plain(images)), captured.reason
    assert captured.captured
    for name, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.graph needs a GPU")
def test_a_step_on_a_gpu_is_one_graph() -> None:
    loops = Loop(), Loop()
    for loop in loops:
        loop.model.cuda()
        loop.mean = loop.mean.cuda()
    step = yf.capture_step(
        loops[0].step, {"images": torch.rand(2, 3, 8, 8).cuda(), "targets": [torch.rand(2, 2).cuda()]}
    )
    for seed in range(8):
        batch = batch_of(seed)
        on_gpu = {"images": batch["images"].cuda(), "targets": [batch["targets"][0].cuda()]}
        assert torch.allclose(step(batch)["loss"], loops[1].step(on_gpu)["loss"], rtol=1e-4)
    assert step.captured, step.reason
