"""Times on a GPU, on a simulated one: the time line of the host, that of the device, and the queue between them.

A launch takes time of the host; its kernel begins when the device is free and the launch was made. What an idle device
shows between two events around a short kernel is the launch; behind other work, and phase by phase, it is the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from yolov9_fast.bench import cases, machine, measure
from yolov9_fast.bench.cases import Clock, PhaseClock, Runner, Settings
from yolov9_fast.kernels import device_time
from yolov9_fast.kernels.device_time import DeviceTimer

GPU = torch.device("cuda", 0)
MICRO = 1e-6


class Simulation:
    """Two time lines in seconds; the queue of the device takes `room` launches."""

    def __init__(self, room: int = 1024) -> None:
        self.host = self.device = 0.0
        self.room, self.pending, self.waits = room, list[float](), 0

    def launch(self, host: float, kernel: float) -> None:
        self.pending = [end for end in self.pending if end > self.host]
        if len(self.pending) >= self.room:
            self.host = self.pending[-self.room]
        self.host += host
        self.device = max(self.device, self.host) + kernel
        self.pending.append(self.device)

    def wait(self) -> None:
        self.host = max(self.host, self.device)
        self.waits += 1

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        at: list[float] = []

        def synchronize() -> None:
            self.host = max(self.host, at[0])
            self.waits += 1

        return SimpleNamespace(
            at=at,
            record=lambda stream: at.append(max(self.device, self.host)),
            query=lambda: at[0] <= self.host,
            synchronize=synchronize,
            elapsed_time=lambda other: 1e3 * (other.at[0] - at[0]),
        )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Simulation:
    simulation = Simulation()
    clock = SimpleNamespace(perf_counter=lambda: simulation.host)
    for module in (device_time, cases, measure, machine):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(torch.cuda, "Event", simulation.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: simulation.wait())
    hold = lambda device: lambda: simulation.launch(4 * MICRO, 80 * MICRO)  # noqa: E731
    for user in (device_time, measure, machine):
        monkeypatch.setattr(user, "overwrite", hold)
    return simulation


def kernels(gpu: Simulation, number: int, host: float, kernel: float) -> Callable[[], None]:
    def call() -> None:
        for _ in range(number):
            gpu.launch(host * MICRO, kernel * MICRO)

    return call


def between_events_on_an_idle_device(gpu: Simulation, call: Callable[[], None]) -> float:
    gpu.wait()
    begin, end = gpu.event(True), gpu.event(True)
    begin.record(None)
    call()
    end.record(None)
    return float(begin.elapsed_time(end)) / 1e3


@pytest.mark.parametrize("number", [1, 5, 200])
def test_a_short_kernel_is_timed_without_its_launch(gpu: Simulation, number: int) -> None:
    call = kernels(gpu, number, host=30, kernel=5)
    assert between_events_on_an_idle_device(gpu, call) == pytest.approx((30 * number + 5) * MICRO)
    timer = DeviceTimer(GPU, device_time.overwrite(GPU))
    for _ in range(3):
        found = timer(call)
        assert found.device == pytest.approx(5 * number * MICRO)
        assert found.host == pytest.approx(30 * number * MICRO)
        assert found.queued


def test_a_long_kernel_needs_no_more_than_one_pass(gpu: Simulation) -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        gpu.launch(5 * MICRO, 900 * MICRO)

    found = DeviceTimer(GPU, device_time.overwrite(GPU))(call)
    assert found.device == pytest.approx(900 * MICRO)
    assert calls == 1


def waiting(gpu: Simulation) -> None:
    gpu.launch(10 * MICRO, 5 * MICRO)
    gpu.wait()
    gpu.launch(10 * MICRO, 5 * MICRO)


def test_a_call_that_waits_for_the_device_is_said_to_be_not_queued(gpu: Simulation) -> None:
    timer = DeviceTimer(GPU, device_time.overwrite(GPU))
    assert not timer(lambda: waiting(gpu)).queued
    before = gpu.device
    assert not timer(lambda: waiting(gpu)).queued
    assert gpu.device - before < 300 * MICRO, "once it is known the device is not kept busy in vain"


def test_a_call_with_more_launches_than_the_queue_takes_is_said_to_be_not_queued(gpu: Simulation) -> None:
    assert not DeviceTimer(GPU, device_time.overwrite(GPU))(kernels(gpu, 3000, host=30, kernel=5)).queued


def candidate(call: Callable[[Clock], Any]) -> measure.Candidate:
    return measure.Candidate(Runner("cuda", "nchw", call, dict), 0.0)


def test_samples_of_an_operator_are_of_the_device_and_the_host_apart(gpu: Simulation) -> None:
    work = kernels(gpu, 3, host=40, kernel=7)
    one = candidate(lambda clock: work())
    measure._time([one], False, GPU, Settings(rounds=(3, 5)))
    assert len(one.samples) >= 3
    assert one.samples == pytest.approx([21 * MICRO] * len(one.samples))
    assert one.host == pytest.approx([120 * MICRO] * len(one.samples))
    assert measure._numbers(one, one)["queued"]


def two_phases(gpu: Simulation, host: float, kernel: float) -> Callable[[Clock], None]:
    def call(clock: Clock) -> None:
        kernels(gpu, 10, host, kernel)()
        clock.mark("forward")
        kernels(gpu, 20, host, kernel)()
        clock.mark("backward")

    return call


def test_a_phase_does_not_wait_for_the_device(gpu: Simulation) -> None:
    """Each wait would add the launch of the first kernel after it, and hide that host and device run side by side."""
    call = two_phases(gpu, host=10, kernel=50)
    call(measure.NoClock())
    clock = PhaseClock(GPU)
    call(clock)
    assert gpu.waits == 0
    assert clock.stop() == pytest.approx(1500 * MICRO)
    assert gpu.waits == 1
    assert clock.seconds == pytest.approx({"forward": 500 * MICRO, "backward": 1000 * MICRO})


@pytest.mark.parametrize(("host", "kernel"), [(10, 50), (50, 10)])
def test_a_step_takes_what_the_slower_of_host_and_device_takes(gpu: Simulation, host: float, kernel: float) -> None:
    one = candidate(two_phases(gpu, host, kernel))
    for _ in range(2):
        measure.sample(one, True, GPU)
    assert one.samples[1] == pytest.approx(30 * 50 * MICRO)
    assert sum(one.phases[name][1] for name in ("forward", "backward")) == pytest.approx(one.samples[1])
    assert one.host[1] == pytest.approx(30 * host * MICRO)


def test_the_bandwidth_of_small_arrays_is_not_that_of_their_launches(gpu: Simulation) -> None:
    assert machine._shortest(kernels(gpu, 1, host=6, kernel=2), GPU, 1e-3) == pytest.approx(2 * MICRO)


def test_the_tuner_chooses_by_kernels_not_by_launches(gpu: Simulation) -> None:
    pytest.importorskip("triton")
    from yolov9_fast.kernels import config, tune

    tiles = {64: (90, 4), 128: (10, 9)}  # elements → microseconds of its launch and of its kernel

    def call() -> None:
        host, kernel = tiles[config._forced["spatial", "b"]["elements"]]
        gpu.launch(host * MICRO, kernel * MICRO)

    times = {}
    for elements in tiles:
        choice = {"elements": elements, "warps": 4}
        times[elements] = tune._milliseconds("spatial", "b", choice, call, 5, GPU, device_time.overwrite(GPU))
    assert times == pytest.approx({64: 0.004, 128: 0.009})
