"""Time per phase of a loop: of the host's clock, or on a GPU of the device's."""

from __future__ import annotations

import time
from collections import deque

import torch

_KEPT_EVENTS = 64


class PhaseClock:
    """Sums the seconds that a loop spends in each of its phases.

    On a GPU, whose work the host only orders, a phase lasts from where the device has finished what was ordered before
    it to where it has finished the phase; that includes waiting for the host. `end` never waits for the device.

    Args:
        phases: their names.
        device: where the phases are computed; None: a CPU.
    """

    def __init__(self, *phases: str, device: torch.device | None = None) -> None:
        self._seconds = dict.fromkeys(phases, 0.0)
        self._mark = time.perf_counter()
        self._device = device if device is not None and device.type == "cuda" else None
        self._ends: deque[tuple[str, torch.cuda.Event]] = deque()
        self._free: list[torch.cuda.Event] = []
        if self._device is not None:
            self._last = self._event()

    def end(self, phase: str) -> None:
        """Count the time since the last call (or since the clock was made) as `phase`."""
        if self._device is None:
            now = time.perf_counter()
            self._seconds[phase] += now - self._mark
            self._mark = now
            return
        self._ends.append((phase, self._event()))
        while len(self._ends) > _KEPT_EVENTS and self._ends[0][1].query():
            self._count()

    @property
    def seconds(self) -> dict[str, float]:
        """Phase → seconds so far; waits for a GPU."""
        if self._ends:
            self._ends[-1][1].synchronize()
        while self._ends:
            self._count()
        return self._seconds

    def _event(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _count(self) -> None:
        """Add the oldest phase, which the device has finished."""
        phase, event = self._ends.popleft()
        self._seconds[phase] += self._last.elapsed_time(event) / 1000
        self._free.append(self._last)
        self._last = event
