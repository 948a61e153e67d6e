"""Ctrl-C that is not lost: Python drops a KeyboardInterrupt that arrives inside a destructor or a callback."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class NotedInterrupt:
    """While entered, an interrupt raises as always and is remembered; `check` raises it again if it was dropped.

    Does nothing outside the main thread, and where something else than Python's own handler is in charge.
    """

    def __init__(self) -> None:
        self._noted = False
        self._installed = False

    def __enter__(self) -> NotedInterrupt:
        in_charge = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        self._installed = in_charge and threading.current_thread() is threading.main_thread()
        if self._installed:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if one arrived and got lost."""
        if self._noted:
            raise KeyboardInterrupt
