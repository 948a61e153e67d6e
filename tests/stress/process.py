"""Commands of the package in processes of their own, which start fast: forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing.util
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = ("cv2", "yaml", "tqdm", "safetensors.torch", "pycocotools.cocoeval", "torch.multiprocessing.reductions")


def preload() -> None:
    """Import what training needs; no thread may have been started before a fork."""
    import importlib

    import torch

    torch.set_num_threads(1)
    for name in (*PRELOADED, "yolov9_fast.cli.train", "yolov9_fast.engine.trainer"):
        importlib.import_module(name)
    importlib.import_module("cv2").setNumThreads(0)
    torch.optim.SGD([torch.zeros(1)], lr=0.1)  # torch imports half of itself for the first optimiser


class Command:
    """`yolov9-fast WORDS` in a process; its output goes to `LOG.out` and `LOG.err`.

    Args:
        forked: by a fork of this process instead of a new interpreter (`new_interpreter`).
    """

    def __init__(self, words: list[str], log: Path, *, forked: bool) -> None:
        self.out, self.err = log.with_suffix(".out"), log.with_suffix(".err")
        self.new_interpreter = not forked
        self._process: subprocess.Popen[bytes] | None = None
        self._code: int | None = None
        if forked:
            self.pid = os.fork()
            if self.pid == 0:
                self._be(words)
            return
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
        with self.out.open("wb") as out, self.err.open("wb") as err:
            command = [sys.executable, "-m", "yolov9_fast", *words]
            self._process = subprocess.Popen(command, env=environment, stdout=out, stderr=err)
        signal.signal(signal.SIGINT, before)
        self.pid = self._process.pid

    def _be(self, words: list[str]) -> None:
        """Become the command, in the child; does not return."""
        code = 1
        try:
            for stream, path in ((1, self.out), (2, self.err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # as `python -m yolov9_fast` until `main` has its handlers
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            from yolov9_fast.cli.main import main

            sys.argv = ["yolov9-fast", *words]
            code = main()
            multiprocessing.util._exit_function()  # type: ignore[attr-defined]
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        """The exit code, negative after a signal, or None while it runs."""
        if self._process is not None:
            return self._process.poll()
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self, seconds: float = 240) -> int:
        """The exit code.

        Raises:
            TimeoutError: it still runs; it is killed.
        """
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"still running after {seconds:.0f} s: {self.errors()[-500:]}")
            time.sleep(0.005)
        return code

    def send(self, number: signal.Signals) -> bool:
        """Send a signal; whether the process was running."""
        if self.poll() is not None:
            return False
        os.kill(self.pid, number)
        return True

    def errors(self) -> str:
        """What it wrote to stderr, without progress bars."""
        text = self.err.read_bytes().decode(errors="replace")
        lines = [line.rpartition("\r")[2].strip() for line in text.split("\n")]
        return "\n".join(line for line in lines if line)
