"""A time limit for loader processes: one that is stopped or blocked would let the run wait without a word."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

from yolov9_fast.limits import limit

_log = logging.getLogger(__name__)

# A process that is not stopped may only be slow: it gets a warning after the limit, and this many times the limit.
_SLOW_FACTOR = 10
_STATES = {"R": "running", "S": "sleeping", "D": "waiting for a disk or network", "T": "stopped", "t": "stopped"}


class WorkerWatch:
    """Ends worker processes that let this process wait longer than `SILENT_SECONDS` of `limits`.

    A stopped process has that long, others ten times as long, after a warning. Only time in which this process itself
    ran counts.

    Attributes:
        workers: the processes that are waited for.
        silent: what was found, if processes were ended.
    """

    def __init__(self) -> None:
        self.workers: list[BaseProcess] = []
        self.silent = ""
        self._waits = 0
        self._waiting = False
        self._closed = threading.Event()

    def start(self, workers: list[BaseProcess]) -> None:
        """Begin to watch processes."""
        self.workers = workers
        threading.Thread(target=self._run, args=(limit("SILENT_SECONDS"),), daemon=True).start()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The body waits for a worker."""
        self._waits += 1
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def end_stopped(self) -> None:
        """End the workers that are stopped."""
        for worker in self.workers:
            if worker.is_alive() and state(worker) == "stopped":
                worker.kill()

    def close(self) -> None:
        """End the watch."""
        self._closed.set()

    def _run(self, seconds: int) -> None:
        interval = min(seconds / 5, 1.0)
        waited, waits, last, warned = 0.0, 0, time.monotonic(), False
        while not self._closed.wait(interval):
            now = time.monotonic()
            passed, last = min(now - last, 2 * interval), now
            if not self._waiting or waits != self._waits:
                waited, waits, warned = 0.0, self._waits, False
                continue
            waited += passed
            if waited < seconds:
                continue
            stopped = [worker for worker in self.workers if state(worker) == "stopped"]
            if stopped or waited >= _SLOW_FACTOR * seconds:
                self._end(stopped or self.workers, waited)
                return
            if not warned:
                warned = True
                _log.warning(f"no batch for {waited:.0f} s: waiting for {_names(self.workers)}")

    def _end(self, silent: list[BaseProcess], waited: float) -> None:
        self.silent = f"no batch for {waited:.0f} s: {_names(silent)}"
        for worker in silent:
            worker.kill()


def state(worker: BaseProcess) -> str:
    """What a process does, in a word or two; "" if unknown."""
    try:
        status = Path(f"/proc/{worker.pid}/stat").read_text()
    except OSError:
        return ""
    return _STATES.get(status.rpartition(")")[2].split()[0], "")


def _names(workers: list[BaseProcess]) -> str:
    names = [f"{worker.pid} ({state(worker) or 'ended'})" for worker in workers]
    return f"loader process{'es' if len(names) > 1 else ''} {', '.join(names)}"
