"""Signals that end a run: none is lost, and those that follow the first do not disturb the ending.

Python drops a KeyboardInterrupt that arrives inside a destructor or a callback, and prints a traceback for one that
arrives while another is handled.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from yolov9_fast._lazy import require
from yolov9_fast._signals import signals_held_back

# A clean-up that takes longer than this may hang: the next signal ends the process.
_PATIENCE_SECONDS = 10.0
_DEFAULT_HANDLERS = (signal.default_int_handler, signal.SIG_DFL)


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


class CommandSignals:
    """A context for a command: the first SIGINT or SIGTERM raises `KeyboardInterrupt`, later ones are ignored.

    One that Python drops is raised again. If the clean-up takes longer than 10 seconds, one more signal ends the
    process. A signal that the process was started to ignore stays ignored. Does nothing outside the main thread.

    Args:
        process_ends: the process ends after this context: its last moments ignore the signals too.

    Attributes:
        received: the signal that has arrived, or None.
    """

    def __init__(self, *, process_ends: bool) -> None:
        self.received: signal.Signals | None = None
        self._process_ends = process_ends
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_hook = sys.unraisablehook

    def __enter__(self) -> CommandSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) in _DEFAULT_HANDLERS:
                    self._previous[number] = signal.signal(number, self._handle)
            self._previous_hook, sys.unraisablehook = sys.unraisablehook, self._raise_again
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self._process_ends else handler)
        sys.unraisablehook = self._previous_hook

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - self._since > _PATIENCE_SECONDS:
            os._exit(128 + self.received)

    def _raise_again(self, unraisable: sys.UnraisableHookArgs) -> None:
        if self.received is None or not issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._previous_hook(unraisable)
            return
        # A moment later: here it would be dropped again. Until then further ones are ignored, as after the first.
        timer = threading.Timer(0.05, self._again, (self.received,))
        timer.daemon = True
        timer.start()

    def _again(self, number: signal.Signals) -> None:
        self.received = None
        os.kill(os.getpid(), number)


@contextlib.contextmanager
def progress_bar(batches: Any, title: str, *, shown: bool) -> Iterator[Any]:
    """tqdm's bar over `batches`, which is gone from the terminal after the block.

    A signal that arrives while the bar is made is raised when it exists: what is left of half a bar cannot be closed.
    """
    tqdm = require("tqdm").tqdm
    bar = None
    try:
        with signals_held_back():
            bar = tqdm(batches, desc=title, unit="batch", leave=False, disable=not shown)
        yield bar
    finally:
        if bar is not None:
            bar.close()
