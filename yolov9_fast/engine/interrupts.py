"""Ctrl-C that is not lost: Python drops a KeyboardInterrupt that arrives inside a destructor or a callback."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class InterruptMonitor:
    """A context in which an interrupt raises as always and is remembered; `check` raises it again if it was dropped.

    Does nothing outside the main thread, or if another handler than Python's own is installed.
    """

    def __init__(self) -> None:
        self._interrupted = False
        self._installed = False

    def __enter__(self) -> InterruptMonitor:
        default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        self._installed = default and threading.current_thread() is threading.main_thread()
        if self._installed:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if one arrived and was dropped."""
        if self._interrupted:
            raise KeyboardInterrupt
