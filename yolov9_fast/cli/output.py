"""What the commands print: log lines on stdout, warnings on stderr; of several processes only rank 0 prints."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys

from yolov9_fast._text import printable, printable_lines

LOGGER = "yolov9_fast"


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every command has; only flags that are given become attributes."""
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        metavar="MODULE",
        default=argparse.SUPPRESS,
        help="import this module first: blocks and auxiliary branches of your own (repeat for several)",
    )


def say(text: str) -> None:
    """Print a text of one or several lines to stdout, unsafe characters escaped."""
    print(printable_lines(text), flush=True)


class _ConsoleHandler(logging.Handler):
    """Writes to the current stdout or stderr; a closed pipe does not end the training.

    A record is one line, unless it was logged with `extra={"lines": True}`.
    """

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        try:
            prefix = f"{record.levelname.lower()}: " if warning else ""
            text = (printable_lines if getattr(record, "lines", False) else printable)(self.format(record))
            print(f"{prefix}{text}", file=sys.stderr if warning else sys.stdout, flush=True)
        except BrokenPipeError:
            silence_stdout()
        except Exception:
            self.handleError(record)


def set_up_logging() -> None:
    """Send the package's log to the console, what it cannot show as escapes; repeated calls have no effect.

    OpenCV prints nothing of its own: the commands tell what cannot be read.
    """
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logger = logging.getLogger(LOGGER)
    if not any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(_ConsoleHandler())
    logger.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    logger.propagate = False


def calm_progress_bars() -> None:
    """Update progress bars once a minute if stderr is not a terminal; call it before tqdm is imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "60")


def calm_torch() -> None:
    """With several processes, print only errors of torch's C++ code: it warns with a stack when one ends.

    Call it before torch is imported.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def is_main_process() -> bool:
    """Whether this is the only process or rank 0 of several."""
    return os.environ.get("RANK", "0") == "0"


def silence_stdout() -> None:
    """Redirect stdout to the null device, so that Python's flush at exit does not fail again."""
    with contextlib.suppress(OSError, ValueError):  # stdout has no descriptor (captured, closed)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
