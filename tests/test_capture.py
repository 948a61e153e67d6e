"""Programs that are recorded and replayed. Without a GPU a recorder repeats their operations (`tests/recording.py`)."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.recording import record
from yolov9_fast._capture import Capture, CudaGraphs, Unchanged, as_recorded
from yolov9_fast.errors import UserError
from yolov9_fast.models import create_model
from yolov9_fast.nn import host_time

CPU = torch.device("cpu")


class Counter:
    """A program that adds its input to a sum; how often Python ran it, and as what."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.x = torch.zeros(3, device=device)
        self.sum = torch.zeros(3, device=device)
        self.calls: list[bool] = []

    def __call__(self) -> Tensor:
        self.calls.append(as_recorded.get())
        self.sum += self.x
        return self.sum * 2


def capture(**options: Any) -> Capture:
    return Capture("the step", options.pop("device", CPU), **({"record": record} | options))


def test_plain_calls_then_a_recording_that_is_replayed() -> None:
    program, runner = Counter(), capture(warmup=2)
    results = []
    for number in range(1, 6):
        program.x.fill_(number)
        results.append(runner.run("a", program))
        assert results[-1].tolist() == [number * (number + 1)] * 3
        assert program.sum.tolist() == [number * (number + 1) / 2] * 3
    assert program.calls == [True] * 3  # two warm-ups and the recording choose alike; a replay runs no Python
    assert runner.recorded == ("a",)
    assert results[3] is results[4]
    assert runner.reason is None


def test_a_recording_does_nothing_by_itself() -> None:
    program = Counter()
    program.x.fill_(1)
    replay, result = record(program)
    assert program.sum.tolist() == [0, 0, 0]
    assert result.isnan().all()
    replay()
    assert program.sum.tolist() == [1, 1, 1]
    assert result.tolist() == [2, 2, 2]


def test_what_is_fixed_before_a_call() -> None:
    program, runner = Counter(), capture(warmup=2)
    seen = []
    for _ in range(4):
        seen.append(runner.fixed("a"))
        runner.run("a", program)
    assert seen == [False, False, True, True]
    assert not runner.fixed("b")


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"mode": "off"}, "it is switched off"), ({"record": None}, "a CPU has no CUDA graphs")],
)
def test_plain_calls_alone(options: dict[str, Any], reason: str) -> None:
    program, runner = Counter(), capture(**options)
    for _ in range(6):
        assert not runner.fixed("a")
        runner.run("a", program)
    assert program.calls == [False] * 6
    assert runner.reason == reason
    runner.reset()
    assert runner.reason == reason


def test_the_number_of_recordings_is_bounded() -> None:
    runner = capture(most=2, warmup=1)
    programs = {key: Counter() for key in "abc"}
    for _ in range(5):
        for key, program in programs.items():
            program.x.fill_(1)
            runner.run(key, program)
    assert runner.recorded == ("a", "b")
    assert [len(program.calls) for program in programs.values()] == [2, 2, 5]
    assert programs["c"].calls == [True, *[False] * 4]  # warmed up while there was room
    assert all(program.sum.tolist() == [5, 5, 5] for program in programs.values())
    assert not runner.fixed("c")


def test_a_failed_recording_says_why_once_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def failing(program: Callable[[], Any]) -> Any:
        program()
        raise ValueError("operation not permitted\nwhen stream is capturing")

    recorded = [record, failing]
    runner = capture(warmup=1, record=lambda program: recorded[len(runner.recorded)](program))
    first, second = Counter(), Counter()
    with caplog.at_level(logging.WARNING, "yolov9_fast"):
        for _ in range(2):
            runner.run("first", first)
        for _ in range(4):
            runner.run("second", second)
            runner.run("third", second)
            runner.run("first", first)
    (message,) = [entry.getMessage() for entry in caplog.records]
    assert message == (
        "the step: not captured as a CUDA graph: ValueError: operation not permitted; it goes on without"
    )
    assert runner.reason == "ValueError: operation not permitted"
    assert runner.recorded == ("first",)  # what was recorded is replayed
    assert len(first.calls) == 2
    assert not as_recorded.get()
    runner.reset()
    assert runner.reason is None
    assert runner.recorded == ()


def test_an_error_of_a_plain_call_is_the_callers() -> None:
    runner = capture()
    with pytest.raises(ZeroDivisionError):
        runner.run("a", lambda: 1 // 0)
    assert not as_recorded.get()
    assert runner.reason is None


def test_inside_another_recording_and_in_another_thread_calls_are_plain() -> None:
    inner, program = capture(warmup=1), Counter()
    program.x.fill_(1)
    outer = capture(warmup=1)
    for _ in range(4):
        outer.run("o", lambda: inner.run("i", program))
    assert inner.recorded == ()
    assert program.sum.tolist() == [4, 4, 4]
    for _ in range(3):
        inner.run("i", program)
    assert inner.recorded == ("i",)
    before = len(program.calls)
    thread = threading.Thread(target=inner.run, args=("i", program))
    thread.start()
    thread.join()
    assert len(program.calls) == before + 1
    assert program.sum.tolist() == [8, 8, 8]


def test_autocast_keeps_no_weights_of_a_recording() -> None:
    weight, x = nn.Parameter(torch.ones(4, 4)), torch.ones(2, 4)
    runner = capture(warmup=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for value in (1.0, 2.0, 3.0, 4.0):
            weight.data.fill_(value)
            assert runner.run("a", lambda: x @ weight)[0, 0].item() == 4 * value
        assert torch.is_autocast_cache_enabled()


def test_wrong_arguments() -> None:
    with pytest.raises(UserError, match="capture: expected auto or off, got 'on'"):
        capture(mode="on")
    with pytest.raises(ValueError, match="expected at least 1, got 0, 3"):
        capture(most=0)


def test_blocks_choose_in_a_warm_up_what_they_choose_in_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x: Any = OnGpu()
    assert not host_time.is_captured(x)
    seen: list[bool] = []
    runner = capture(warmup=1)
    for _ in range(3):
        runner.run("a", lambda: seen.append(host_time.is_captured(x)))
    assert seen == [True, True]


def test_a_network_trains_by_replays_bit_for_bit() -> None:
    """Forward, backward and an update of yolov9-t, its statistics included."""
    torch.manual_seed(0)
    model = create_model("yolov9-t", 3, auxiliary="none").train()
    other = copy.deepcopy(model)
    x = torch.empty(2, 3, 64, 64)

    def step(model: nn.Module) -> Callable[[], Tensor]:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)

        def program() -> Tensor:
            loss = torch.stack([level.square().mean() for level in model(x).main]).sum()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(parameter.grad, alpha=1e-2)
                    parameter.grad.zero_()
            return loss.detach()

        return program

    runner, captured, plain = capture(warmup=1), step(model), step(other)
    for seed in range(4):
        x.copy_(torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)))
        assert torch.equal(runner.run("step", captured), plain())
    assert runner.recorded == ("step",)
    for name, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def _freeze(model: nn.Module) -> None:
    next(model.parameters()).requires_grad_(False)


def _move(model: nn.Module) -> None:
    parameter = next(model.parameters())
    parameter.data = parameter.data.clone()


def _replace(model: nn.Module) -> None:
    model[0] = nn.Conv2d(1, 2, 3)  # type: ignore[operator]


CHANGES: dict[str, Callable[[Any], object]] = {
    "mode": lambda model: model[1].eval(),
    "hook": lambda model: model[0].register_forward_hook(lambda *_: None),
    "hook of the backward": lambda model: model[1].register_full_backward_hook(lambda *_: None),
    "frozen": _freeze,
    "moved": _move,
    "converted": lambda model: model.double(),
    "another child": _replace,
    "another parameter": lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(2, 1, 3, 3))),
    "another buffer": lambda model: setattr(model[1], "running_mean", torch.zeros(2)),
    "a forward of its own": lambda model: setattr(model[0], "forward", lambda x: x),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_module_is_seen(change: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    unchanged = Unchanged(model)
    model(torch.rand(1, 1, 4, 4)).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert unchanged.holds()  # values may change in place
    CHANGES[change](model)
    assert not unchanged.holds()


class FailingCuda:
    """torch.cuda where the end of a capture fails after what fails inside it, as after a read on the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
        self.done: list[str] = []
        cuda = self

        class Graph:
            def pool(self) -> tuple[int, int]:
                if not ends:
                    raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
                return 1, 0

            def reset(self) -> None:
                cuda.done.append("reset")

        class Recorded:
            def __init__(self, graph: Any, **options: Any) -> None:
                assert options["capture_error_mode"] == "thread_local"

            def __enter__(self) -> None: ...
            def __exit__(self, *error: Any) -> None:
                if not ends:
                    raise RuntimeError("capture invalidated")

        for name, value in {
            "CUDAGraph": Graph,
            "graph": Recorded,
            "graph_pool_handle": lambda: (0, 1),
            "Stream": lambda device: "side",
            "stream": lambda stream: contextlib.nullcontext(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            called = functools.partial(self._note, name)
            monkeypatch.setattr(torch._C, name, called, raising=False)

    def _note(self, name: str, device: int, pool: Any) -> None:
        assert (device, pool) == (0, (0, 1))
        self.done.append(name)


@pytest.mark.parametrize("ends", [True, False])
def test_a_failed_graph_leaves_the_allocator_clean(monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    cuda = FailingCuda(monkeypatch, ends)
    with pytest.raises(ZeroDivisionError):  # the cause, not what the end says of it
        CudaGraphs(torch.device("cuda", 0))(lambda: 1 // 0)
    ending = [] if ends else ["_cuda_endAllocateToPool", "_cuda_releasePool"]
    assert cuda.done == [*ending, "reset"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.graph needs a GPU")
def test_cuda_graphs_are_replayed_and_a_failed_one_breaks_nothing() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    runner = capture(record=None, device=device, most=2)
    programs = Counter(device), Counter(device)
    for number in range(1, 8):
        for key, program in enumerate(programs):
            program.x.fill_(number)
            result = runner.run(key, program)
            assert result.tolist() == [number * (number + 1)] * 3
    assert runner.recorded == (0, 1)
    assert [len(program.calls) for program in programs] == [4, 4]

    waiting = capture(record=None, device=device, warmup=1)
    for _ in range(3):
        assert waiting.run("a", lambda: programs[0].x.sum().item()) == 21
    assert waiting.reason is not None
    assert not torch.cuda.is_current_stream_capturing()
    after = torch.rand(1000, device=device) + runner.run(0, programs[0]).sum()  # the generator and memory are usable
    torch.cuda.synchronize()
    assert torch.isfinite(after).all()
