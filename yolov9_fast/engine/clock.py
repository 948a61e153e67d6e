"""Wall-clock time per phase of a loop."""

from __future__ import annotations

import time


class PhaseClock:
    """Sums the seconds that a loop spends in each of its phases.

    Attributes:
        seconds: phase → seconds.
    """

    def __init__(self, *phases: str) -> None:
        self.seconds = dict.fromkeys(phases, 0.0)
        self._mark = time.perf_counter()

    def end(self, phase: str) -> None:
        """Count the time since the last call (or since the clock was made) as `phase`."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._mark
        self._mark = now
