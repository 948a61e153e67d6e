"""Signs of life between the processes of a run: a stopped one would let the others wait without a word."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from yolov9_fast.limits import limit

_LEFT = -(2**40)


class Heartbeat:
    """Counts up in the process group's store, and ends this process with one line when another is silent.

    The limit is `SILENT_SECONDS` of `limits`. Only time in which this process itself ran counts: a run whose processes
    are all stopped continues when they do.

    Args:
        rank, size: of this process.
        store: connection to the `torch.distributed` store that all processes share; no other thread uses it.
        store_host: the process whose end or stop also stops the store; None: a process outside the group.
        give_up: called with the message (default: print it and end the process with exit code 2).
    """

    advice = "continue the run with --resume"

    def __init__(
        self,
        rank: int,
        size: int,
        store: Any,
        *,
        store_host: int | None = None,
        give_up: Callable[[str], None] | None = None,
    ) -> None:
        self._rank, self._size, self._store, self._host = rank, size, store, store_host
        self._give_up = give_up or self._end_process
        self._limit = limit("SILENT_SECONDS")
        self._interval = min(self._limit / 5, 5.0)
        self._rounds = 0
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._beat, self._watch_store)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Tell the others that this process leaves, and end the threads."""
        self._ended.set()
        self._threads[0].join(1.0)  # It writes the farewell; a store that does not answer is not waited for.

    def _beat(self) -> None:
        try:
            self._store.set(f"name/{self._rank}", f"pid {os.getpid()} on {socket.gethostname()}")
            counts, silence = [0] * self._size, [0.0] * self._size
            clock = _OwnTime(self._interval)
            while not self._ended.wait(self._interval):
                self._store.add(f"count/{self._rank}", 1)
                passed = clock.passed()
                for peer in range(self._size):
                    count = self._store.add(f"count/{peer}", 0)
                    silence[peer] = silence[peer] + passed if 0 <= count == counts[peer] else 0.0
                    counts[peer] = count
                self._rounds += 1
                silent = [peer for peer in range(self._size) if silence[peer] >= self._limit]
                if silent:
                    self._report(silent)
            self._store.add(f"count/{self._rank}", _LEFT)
        except RuntimeError:  # The store has ended, and with it its process: the next collective reports that.
            return

    def _watch_store(self) -> None:
        rounds, silence, clock = -1, 0.0, _OwnTime(self._interval)
        while self._host is not None and not self._ended.wait(self._interval):
            passed = clock.passed()
            silence = silence + passed if rounds == self._rounds else 0.0
            rounds = self._rounds
            if silence >= self._limit and self._threads[0].is_alive():
                self._give_up(self._message(f"process {self._host}"))
                return

    def _report(self, silent: list[int]) -> None:
        named = []
        for peer in silent:
            known = self._store.check([f"name/{peer}"])
            named.append(f"process {peer}" + (f" ({self._store.get(f'name/{peer}').decode()})" if known else ""))
        speaker = min(set(range(self._size)) - set(silent))
        self._give_up(self._message(", ".join(named)) if self._rank == speaker else "")
        self._ended.set()

    def _message(self, who: str) -> str:
        return (
            f"{who} has been silent for {self._limit} s: it is stopped, or its machine cannot be reached; {self.advice}"
        )

    @staticmethod
    def _end_process(message: str) -> None:
        # The main thread waits inside a collective operation, which no exception reaches.
        if message:
            print(f"\nerror: {message}", file=sys.stderr, flush=True)  # below the progress bar
        os._exit(2)


class _OwnTime:
    """Time since the last call in which this process ran: at most twice the interval between calls."""

    def __init__(self, interval: float) -> None:
        self._most, self._last = 2 * interval, time.monotonic()

    def passed(self) -> float:
        now = time.monotonic()
        passed, self._last = min(now - self._last, self._most), now
        return passed


def start_heartbeat(rank: int, size: int) -> Heartbeat | None:
    """The heartbeat of this process, over the store that the launcher's environment names; None if it names none."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        return None
    try:
        store = dist.TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=30))  # type: ignore[attr-defined]
    except (RuntimeError, ValueError):
        return None
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    prefixed = dist.PrefixStore(f"yolov9_fast/heartbeat/{restart}", store)  # type: ignore[attr-defined]
    return Heartbeat(rank, size, prefixed, store_host=None if of_agent else 0)
