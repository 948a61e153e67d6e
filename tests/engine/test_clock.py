"""The seconds of a loop's phases: on a GPU those of the device, read without a wait in each step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from yolov9_fast.engine import clock as module
from yolov9_fast.engine.clock import PhaseClock


@dataclass
class Device:
    """A device that works through what it is given: `ordered` and `done` in seconds of its own time."""

    ordered: float = 0.0
    done: float = 0.0
    waits: int = 0
    events: int = 0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    state = Device()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            state.events += 1

        def record(self, stream: object) -> None:
            assert stream == "stream of cuda:1"
            self.at = state.ordered

        def query(self) -> bool:
            return self.at <= state.done

        def synchronize(self) -> None:
            state.waits += 1
            state.done = max(state.done, self.at)

        def elapsed_time(self, other: Any) -> float:
            assert self.query()
            assert other.query()
            return float(other.at - self.at) * 1000

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    return state


def test_on_a_gpu_the_device_s_time_counts_and_only_reading_waits(device: Device) -> None:
    clock = PhaseClock("forward", "backward", device=torch.device("cuda", 1))
    steps = 3 * module._KEPT_EVENTS
    for step in range(steps):
        for phase, seconds in (("forward", 0.25), ("backward", 0.5)):
            device.ordered += seconds  # the host orders it in no time
            clock.end(phase)
        device.done = max(0.0, device.ordered - 3.0)  # the device is some steps behind
        assert step < 10 or device.done > 0
    assert device.waits == 0
    assert device.events <= module._KEPT_EVENTS + 20  # used again
    assert clock.seconds == pytest.approx({"forward": 0.25 * steps, "backward": 0.5 * steps})
    assert device.waits == 1
    device.ordered += 1.0
    clock.end("forward")
    assert clock.seconds["forward"] == pytest.approx(0.25 * steps + 1.0)


def test_on_a_cpu_the_host_s_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 1.5, 4.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    clock = PhaseClock("data", "forward", device=torch.device("cpu"))
    clock.end("data")
    clock.end("forward")
    assert clock.seconds == {"data": 0.5, "forward": 2.5}
