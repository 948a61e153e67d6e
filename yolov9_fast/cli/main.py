"""The command line `yolov9-fast COMMAND …`: finds the command, prints errors as one line, sets the exit code."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from yolov9_fast import __version__
from yolov9_fast._lazy import import_module
from yolov9_fast._text import printable
from yolov9_fast.cli.output import (
    add_shared_flags,
    calm_progress_bars,
    calm_torch,
    is_main_process,
    set_up_logging,
    silence_stdout,
)
from yolov9_fast.engine.interrupts import CommandSignals
from yolov9_fast.errors import UserError

COMMANDS = {
    "train": "train a network on your images",
    "val": "evaluate weights on a labelled split: COCO AP",
    "predict": "find objects in images, videos, webcams and streams",
    "convert": "read weights of any known origin and write them as safetensors",
    "bench": "how fast: eager against fused; the benchmark suite, its records compared and reported",
    "info": "what is installed and which backends run; size and GFLOPs of networks; the contents of a weights file",
    "kernels": "compile the Triton kernels for every GPU architecture, without a GPU, and report on them",
    "tune": "measure the Triton kernels' tiles on this GPU and keep the fastest",
    "paper": "the tables and figures of the paper, rebuilt on your data: ablations, PGI variants, feature maps",
    "demo": "render a small data set, train on it, evaluate, predict: everything in a few minutes, without a download",
}
EXIT_ERROR = 2

_INSTALLED_PARTS = ("yolov9_fast.bench", "yolov9_fast.kernels")
"""Folders of their own in the source tree, which become part of the package when it is installed."""

_EPILOG = """examples:
  yolov9-fast demo
  yolov9-fast train --model yolov9-s --data my.yaml --epochs 100
  yolov9-fast val --weights runs/train/exp/weights/best.safetensors --data my.yaml
  yolov9-fast predict --weights runs/train/exp/weights/best.safetensors --source images/

exit codes: 0 success, 1 ran without the requested result, 2 wrong input (one line of error), 130 interrupted,
143 ended by SIGTERM"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code. `argv`: the words after `yolov9-fast` (default: this process's)."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    signals = CommandSignals(process_ends=argv is None)
    try:
        with signals:
            try:
                return _run(words)
            except UserError as error:
                if signals.received:
                    raise
                if debug:
                    traceback.print_exc()
                where = "" if is_main_process() else f" (process {os.environ['RANK']})"
                print(f"error{where}: {printable(error)}", file=sys.stderr)
                return EXIT_ERROR
            except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
                silence_stdout()
                return 0
            except ModuleNotFoundError as error:
                if error.name not in _INSTALLED_PARTS:
                    raise
                text = "is part of an installation only, and this is a source tree; start Python in another folder"
                print(f"error: {error.name} {text}, or compile it with `pip install`", file=sys.stderr)
                return EXIT_ERROR
    except BaseException as error:  # an interrupt may have become another error on its way through a library
        if signals.received is None and not isinstance(error, KeyboardInterrupt):
            raise
        if debug:
            traceback.print_exc()
        return _report_interrupt(signals.received, error)


def _run(words: list[str]) -> int:
    calm_progress_bars()
    calm_torch()
    parser, module = _parser(words)
    try:
        arguments = parser.parse_args(words)
    except SystemExit as stop:  # argparse has printed the help, the version or a usage error
        return stop.code if isinstance(stop.code, int) else EXIT_ERROR
    if module is None:
        parser.print_help()
        return EXIT_ERROR
    set_up_logging()
    import_modules(getattr(arguments, "imports", []))
    with _sharing_cores(module):
        code = int(module.run(arguments))
    sys.stdout.flush()
    return code


def _sharing_cores(module: ModuleType) -> contextlib.AbstractContextManager[object]:
    """What a command that trains or evaluates, one with `WHEN_BUSY`, does where other processes compute too."""
    way = getattr(module, "WHEN_BUSY", None)
    if way is None:
        return contextlib.nullcontext()
    from yolov9_fast.engine.busy import busy_policy, in_force, observable

    return in_force(busy_policy(os.environ, default=way, observable=observable()))


def _report_interrupt(received: signal.Signals | None, error: BaseException) -> int:
    """Print one line, with the advice that the interrupt carries; the exit code: 130, or 143 after SIGTERM."""
    exec("")  # Where exec was interrupted, Python would end this process by SIGINT instead of the exit code.
    number = received or signal.SIGINT
    by = f" by {number.name}" if number != signal.SIGINT else ""
    advice = f"; {printable(error)}" if isinstance(error, KeyboardInterrupt) and error.args else ""
    if is_main_process():
        with contextlib.suppress(OSError):  # the reader of stderr may have ended first
            print(f"interrupted{by}{advice}", file=sys.stderr, flush=True)
    return 128 + number


def import_modules(names: Sequence[str]) -> None:
    """Import a user's modules; the working folder is searched first."""
    for name in names:
        try:
            import_module(name)
        except ValueError as error:
            raise UserError(f"--import: {error}") from error


def _parser(words: Sequence[str]) -> tuple[argparse.ArgumentParser, ModuleType | None]:
    """The parser, and the module of the command in `words`, the only one imported, so that help is fast."""
    shared = argparse.ArgumentParser(add_help=False)
    add_shared_flags(shared)
    parser = argparse.ArgumentParser(
        prog="yolov9-fast",
        description="YOLOv9 with programmable gradient information: train, evaluate, predict.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[shared],
    )
    parser.add_argument("--version", action="version", version=f"yolov9-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    chosen = next((word for word in words if word in COMMANDS), None)
    module = None
    for name, text in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[shared],
        )
        if name == chosen:
            module = importlib.import_module(f"yolov9_fast.cli.{name}")
            module.configure(sub)
    return parser, module
