"""Signals that wait while something is made that could not be cleaned up by halves."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Signals that Python handles wait for the end of the block; not by a mask, which other threads do not have."""
    arrived: list[int] = []
    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(handler := signal.getsignal(number)):
                previous[number] = handler
                signal.signal(number, lambda received, frame: arrived.append(received))
    try:
        yield
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)
    for first in arrived[:1]:
        signal.raise_signal(first)
