"""What a benchmark is made of: a case, its runners (one per provider and layout), what it must compute and move."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

FAMILIES = ("ops", "blocks", "loss", "nms", "step", "infer", "data", "places")
PHASES = ("data", "forward", "loss", "backward", "optimiser", "ema")
"""Phases of a training step, in order."""
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Traffic:
    """Bytes that must be read and written, operations that must be done, and bytes touched (the working set).

    `matrix`: the operations are products of matrices, for which the arithmetic ceiling holds.
    """

    moved: float
    operations: float = 0.0
    footprint: float = 0.0
    matrix: bool = False

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.moved + other.moved,
            self.operations + other.operations,
            max(self.footprint, other.footprint),
            self.matrix or other.matrix,
        )


class Clock(Protocol):
    """Told by a runner when a phase of its work ends."""

    def mark(self, phase: str) -> None: ...


class NoClock:
    def mark(self, phase: str) -> None:
        pass


class PhaseClock:
    """Seconds of each phase of one call, read after it; on a GPU between events, so that no phase waits for the device.

    There a phase lasts from when the device reaches its begin to when it reaches its end: where launching is slower
    than the kernels, the time of the host. `stop` ends the call.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[str] = []
        self._times: list[Any] = [self._now()]

    def mark(self, phase: str) -> None:
        self._names.append(phase)
        self._times.append(self._now())

    def stop(self) -> float:
        """Seconds of the whole call, once the device has done it."""
        end = self._now()
        if self._device.type == "cuda":
            end.synchronize()
        return self._between(self._times[0], end)

    @property
    def seconds(self) -> dict[str, float]:
        """By phase; after `stop`."""
        found: dict[str, float] = {}
        for name, begin, end in zip(self._names, self._times, self._times[1:], strict=False):
            found[name] = found.get(name, 0.0) + self._between(begin, end)
        return found

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1e3 if self._device.type == "cuda" else end - begin


@dataclass
class Runner:
    """One way to do a case's work.

    `call(clock)` does it once. `results()` does it once more for the check and returns named tensors.
    """

    provider: str
    layout: str
    call: Callable[[Clock], Any]
    results: Callable[[], dict[str, Tensor]]
    note: str = ""


@dataclass(frozen=True)
class Absent:
    """A provider that cannot take part, and why."""

    provider: str
    layout: str
    reason: str


@dataclass
class OpenCase:
    """A case with its memory allocated. The first runner is the baseline.

    `reference`: what `results()` must be, in float64, or None where results are compared with the baseline. `rule`: how
    results are judged, see `check.py`. `traffic`: None where it is not countable. `items`: images per call where a rate
    makes sense. `peers`: runners of others, judged by their agreement.
    """

    runners: Iterator[Runner | Absent]
    reference: Callable[[], dict[str, Tensor]] | None
    rule: str = "twice"
    traffic: Traffic | None = None
    items: int = 0
    peers: Iterator[Runner | Absent] | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A benchmark by name; `open` allocates it on a device."""

    name: str
    family: str
    subject: str
    network: str
    mode: str
    dtype: str
    shape: dict[str, Any]
    open: Callable[[torch.device, Settings], OpenCase]
    count: int = 1
    priority: int = 0


@dataclass(frozen=True)
class Settings:
    """What a run asks for.

    `compile`: none, default or all (max-autotune too). `rounds`: the most and the least samples of a provider.
    `seconds`: time for the samples of one case.
    """

    full: bool = False
    compile: str = "none"
    peers: bool = True
    batch: int = 2
    rounds: tuple[int, int] = (5, 30)
    seconds: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def flatten(value: Any) -> list[Tensor]:
    """All tensors in nested tuples and lists, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for one in value for tensor in flatten(one)] if isinstance(value, list | tuple) else []


def named(prefix: str, tensors: Sequence[Tensor | None]) -> dict[str, Tensor]:
    return {f"{prefix}{index}": tensor for index, tensor in enumerate(tensors) if tensor is not None}
