"""Processes that measure on request: each runs one source tree, under any interpreter, and answers line by line."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yolov9_fast.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def tree_command(tree: Path, *words: str, python: str = sys.executable) -> list[str]:
    """The command line of `worker.py` on `tree`; `words`: MODULE:FUNCTION of the tree and its words."""
    return [python, str(Path(__file__).with_name("worker.py")), str(tree), *words]


class WorkerProcess:
    """A process that answers commands while the block lasts.

    Args:
        tree: the folder whose `yolov9_fast` it imports.
        words: MODULE:FUNCTION that serves in place of `worker.Worker`.
        python: its interpreter.
        environment: variables besides those of this process.
        silent: what it prints is thrown away.
    """

    def __init__(
        self,
        tree: Path,
        *words: str,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
        silent: bool = False,
    ) -> None:
        self.tree, self._command = tree, tree_command(tree, *words, python=python)
        self._environment = dict(environment or {})
        self._errors = subprocess.DEVNULL if silent else None

    def __enter__(self) -> WorkerProcess:
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                cwd=tempfile.gettempdir(),
                env=dict(os.environ) | self._environment,
            )
        except OSError as error:
            raise UserError(f"cannot start {self._command[0]}: {error.strerror}") from error
        try:
            self._answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ask(self, command: str, **options: Any) -> Any:
        """What the method `command` of the worker returns.

        Raises:
            UserError: it failed, or the process has ended.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end is reported where the answer is read
            self._process.stdin.write(json.dumps({"command": command, **options}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"the benchmark process of {self.tree} ended (exit code {self._process.wait()})")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"{self.tree}: {answer['error']}")
        return answer["value"]
