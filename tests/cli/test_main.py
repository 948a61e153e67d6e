"""The command line as a whole: help, version, errors in one line, exit codes."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from yolov9_fast import __version__
from yolov9_fast.cli import main as cli
from yolov9_fast.cli.main import COMMANDS, main
from yolov9_fast.cli.output import _ConsoleHandler
from yolov9_fast.engine.distributed import clear_endings
from yolov9_fast.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def command(monkeypatch: pytest.MonkeyPatch, run: object) -> None:
    """Make `info` do `run`."""
    module = SimpleNamespace(run=run, configure=lambda parser: None)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"yolov9-fast {__version__}\n"


def test_without_a_command_help_is_shown_and_the_code_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"yolov9-fast {name}" in capsys.readouterr().out.split("examples:")[1]


@pytest.mark.parametrize("words", [["paint"], ["val"], ["train", "--epochs", "many"], ["train", "--colour", "red"]])
def test_wrong_usage_gives_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "error:" in capsys.readouterr().err


def test_a_users_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(arguments: object) -> int:
        raise UserError("the data cannot be used")

    command(monkeypatch, fail)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == "error: the data cannot be used\n"
    assert main(["info", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code", "line"), [(signal.SIGINT, 130, ""), (signal.SIGTERM, 143, " by SIGTERM")])
def test_many_signals_give_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int, line: str
) -> None:
    def interrupted(arguments: object) -> int:
        try:
            os.kill(os.getpid(), number)
        finally:
            for _ in range(20):
                os.kill(os.getpid(), number)
            raise RuntimeError("what a library makes of it")

    command(monkeypatch, interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["info"]) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == f"interrupted{line}\n"


def test_the_advice_of_an_interrupt_is_on_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(arguments: object) -> int:
        with clear_endings("continue with: this"):
            raise KeyboardInterrupt

    command(monkeypatch, interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "interrupted; continue with: this\n"


def test_an_interrupt_gives_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(arguments: object) -> int:
        raise KeyboardInterrupt

    command(monkeypatch, interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_unexpected_exception_is_not_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, lambda arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["info"])


def test_a_part_that_a_source_tree_lacks_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: object) -> int:
        raise ModuleNotFoundError("No module named 'yolov9_fast.kernels'", name="yolov9_fast.kernels")

    command(monkeypatch, run)
    assert main(["info"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: yolov9_fast.kernels is part of an installation only")
    assert shown.count("\n") == 1


@pytest.mark.slow
def test_a_closed_pipe_is_no_error() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "yolov9_fast", "info", "--model", "gelan-t"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_help_imports_no_torch() -> None:
    script = "import sys; from yolov9_fast.cli.main import main; main(['--version']); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.split()[-1] == "False", done.stderr


HOSTILE = "a\nwarning: all is well\x1b[2J\udc80\u202e猫"


def test_errors_are_one_line_without_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["info", "--weights", str(tmp_path / HOSTILE)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "\x1b" not in error
    assert r"a\nwarning: all is well\x1b[2J\udc80\u202e猫" in error


def test_log_lines_are_printed_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    console = _ConsoleHandler()  # not through a logger: pytest keeps what loggers get
    attributes = {"levelno": logging.WARNING, "levelname": "WARNING", "msg": f"skipped: {HOSTILE}"}
    console.emit(logging.makeLogRecord(attributes))
    console.emit(logging.makeLogRecord({"levelno": logging.INFO, "msg": "two\nlines\x1b", "lines": True}))
    printed = capsys.readouterr()
    assert printed.err == "warning: skipped: a\\nwarning: all is well\\x1b[2J\\udc80\\u202e猫\n"
    assert printed.out == "two\nlines\\x1b\n"


def test_a_terminal_without_the_characters_gets_escapes(tmp_path: Path) -> None:
    (tmp_path / "猫.yaml").write_text("names: [猫]\nval: images\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0", "LC_ALL": "C"}
    command = [sys.executable, "-m", "yolov9_fast", "val", "--weights", "none.pt", "--data", str(tmp_path / "猫.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "Logging error" not in done.stderr
