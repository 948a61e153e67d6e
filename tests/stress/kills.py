"""Kill training at random moments, resume, and compare everything with a run that was never killed.

    python -m tests.stress.kills --kills 200 --out kills.json

The moments are drawn by progress (from the start of the process to the last file of the run) plus a random delay; the
signals are SIGKILL, SIGTERM, SIGINT, two SIGINT within 50 ms, and twenty. A resumed run may be killed again. After the
last resume a run must have the files of the uninterrupted one with equal content: weights, state, results.csv (without
seconds), JSON, tables, images. No temporary file may be left, no signal but SIGKILL may print more than one line.
"""

from __future__ import annotations

import argparse
import collections
import csv
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.engine.conftest import TINY_GRAPH
from tests.stress.process import Command, preload

EPOCHS = 3
SIGNALS = {
    "SIGKILL": (signal.SIGKILL, 1),
    "SIGTERM": (signal.SIGTERM, 1),
    "SIGINT": (signal.SIGINT, 1),
    "2 × SIGINT": (signal.SIGINT, 2),
    "20 × SIGINT": (signal.SIGINT, 20),
}
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


def _rows(run: Path) -> int:
    try:
        return max(len((run / "results.csv").read_text().splitlines()) - 1, 0)
    except OSError:
        return 0


STAGES: dict[str, Callable[[Path], bool]] = {
    "process started": lambda run: True,
    "run folder made": Path.is_dir,
    "first state saved": lambda run: (run / "weights/state.pt").is_file(),
    "epoch 1 saved": lambda run: _rows(run) >= 1,
    "epoch 2 saved": lambda run: _rows(run) >= 2,
    "last epoch saved": lambda run: _rows(run) >= EPOCHS,
    "final evaluation: detections written": lambda run: (run / "predictions.json").is_file(),
    "final evaluation: table written": lambda run: (run / "per_class.txt").is_file(),
}
"""Progress after which a random delay begins. The first two and the last three are a run's first and last seconds."""


class Stress:
    """Runs in `folder`; `failures` has a line per thing that is wrong."""

    def __init__(self, folder: Path, seed: int) -> None:
        from yolov9_fast.data.rendered import render_dataset

        self.folder, self.random = folder, random.Random(seed)
        self.data = render_dataset(folder / "data", train=8, val=3, size=64, seed=3)
        (folder / "tiny.yaml").write_text(TINY_GRAPH)
        self.failures: list[str] = []
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        started = time.monotonic()
        command = Command(self._words("whole"), folder / "whole", forked=True)
        if command.wait() != 0:
            raise SystemExit(command.errors())
        self.seconds = time.monotonic() - started

    def _words(self, name: str, *extra: str) -> list[str]:
        options = f"--epochs {EPOCHS} --imgsz 64 --batch 4 --nominal-batch 8 --workers 0 --device cpu --class-tower 8"
        options += " --no-plots --no-tensorboard --close-mosaic 1 --save-period 2 --name"
        paths = ["--model", str(self.folder / "tiny.yaml"), "--project", str(self.folder / "runs")]
        return ["train", "--data", str(self.data), *paths, *options.split(), name, *extra]

    def run(self, kills: int, seconds: float) -> None:
        """Kill `kills` times, or until the time is over; kills of resumed runs count too."""
        number, end = 0, time.monotonic() + seconds
        while sum(self.counts["signals"].values()) < kills and time.monotonic() < end:
            number += 1
            self._one_run(f"killed{number}", kills)

    def _one_run(self, name: str, kills: int) -> None:
        run = self.folder / "runs" / name
        # One in eight starts a new interpreter, so that imports are killed too; one in five has a worker process.
        forked, workers = self.random.random() > 1 / 8, str(int(self.random.random() < 0.2))
        words, history, before = self._words(name, "--workers", workers), [], len(self.failures)
        for attempt in range(20):
            kill = sum(self.counts["signals"].values()) < kills and (attempt == 0 or self.random.random() < 0.3)
            command = Command(words, self.folder / name, forked=forked)
            history.append(self._kill(command, run) if kill else "left alone")
            try:
                code = command.wait()
            except TimeoutError as error:
                self.failures.append(f"{name}: {history}: {error}")
                return
            if code == 0:
                break
            if code == 2 and "has finished its" in command.errors():
                self.counts["afterwards"]["had finished when it was killed"] += 1
                break
            if not kill:
                self.failures.append(f"{name}: {history}: exit code {code}: {command.errors()[-1000:]}")
                return
            if (run / "config.yaml").is_file():
                self.counts["afterwards"]["resumed"] += 1
                words = ["train", "--resume", str(run), "--workers", workers]
            else:
                self.counts["afterwards"]["started again in the same folder"] += 1
        self.failures += [f"{name}: {history}: {text}" for text in differences(self.folder / "runs/whole", run)]
        print("\n".join([f"{name}: {history}", *self.failures[before:]]), file=sys.stderr, flush=True)
        shutil.rmtree(run, ignore_errors=True)
        if leftover := [path.name for path in (self.folder / "runs").iterdir() if path.name != "whole"]:
            self.failures.append(f"{name}: {history}: left in the project: {leftover}")

    def _kill(self, command: Command, run: Path) -> str:
        stage, kind = self.random.choice(list(STAGES)), self.random.choice(list(SIGNALS))
        number, repeats = SIGNALS[kind]
        # A new interpreter spends most of its time on imports; the last files follow one another quickly.
        share = 1.0 if command.new_interpreter else 0.2 if stage == "process started" else 0.1
        delay = self.random.uniform(0, self.seconds * (0.03 if stage.startswith("final") else share))
        while not STAGES[stage](run) and command.poll() is None:
            time.sleep(0.0005)
        time.sleep(delay)
        hit = command.send(number)
        for _ in range(repeats - 1):
            time.sleep(self.random.uniform(0, 0.05 if repeats == 2 else 0.01))
            command.send(number)
        if not hit:
            self.counts["afterwards"]["had ended before the signal"] += 1
            return f"ended before {kind}"
        what = f"{kind} {delay:.3f} s after: {stage}"
        self.counts["signals"][kind] += 1
        self.counts["stages"][stage] += 1
        self._check_ending(command, number, what)
        return what

    def _check_ending(self, command: Command, number: signal.Signals, what: str) -> None:
        """One line and the signal's exit code, unless the run had just ended or Python itself was just starting."""
        try:
            code = command.wait()
        except TimeoutError as error:
            self.failures.append(f"{what}: {error}")
            return
        lines = command.errors().splitlines()
        if number is signal.SIGKILL:
            good = code in (-signal.SIGKILL, 0)
        elif code == 0:
            good = not lines
        elif not command.out.read_text() and (code == -number or (command.new_interpreter and code == 1)):
            good = True  # before the package handles signals
            self.counts["afterwards"]["Python was starting"] += 1
        else:
            good = code == CODES[number] and len(lines) == 1 and lines[0].startswith("interrupted")
        if not good:
            self.failures.append(f"{what}: exit code {code}: {lines[-20:]}")


def differences(whole: Path, run: Path) -> list[str]:
    """What distinguishes the files of a run from those of the uninterrupted one."""
    names = [
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} if folder.is_dir() else set()
        for folder in (whole, run)
    ]
    found = [f"{name} is missing" for name in sorted(names[0] - names[1])]
    found += [f"{name} is left" for name in sorted(names[1] - names[0])]
    for name in sorted(names[0] & names[1]):
        if not _equal(whole / name, run / name):
            found.append(f"{name} differs")
    return found


def _equal(a: Path, b: Path) -> bool:
    readers: dict[str, Callable[[Path], Any]] = {
        ".pt": _state,
        ".csv": _table,
        ".yaml": _options,
        ".safetensors": _weights,
    }
    reader = readers.get(a.suffix, Path.read_bytes)
    return _same(reader(a), reader(b))


def _weights(path: Path) -> list[Any]:
    """The header, whose order of keys is random, and the bytes of the tensors."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return [json.loads(data[8:end]), data[end:]]


def _state(path: Path) -> dict[str, Any]:
    from yolov9_fast.engine.run_files import load_state

    state = load_state(path)
    return {**state, "rows": [_without_seconds(row) for row in json.loads(state["rows"])]}


def _table(path: Path) -> list[dict[str, Any]]:
    with path.open() as file:
        return [_without_seconds(row) for row in csv.DictReader(file)]


def _without_seconds(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith("seconds")}


def _options(path: Path) -> dict[str, Any]:
    from dataclasses import asdict

    from yolov9_fast.engine.config import read_config

    return {key: value for key, value in asdict(read_config(path)).items() if key not in ("name", "workers")}


def _same(a: Any, b: Any) -> bool:
    import torch

    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def kill_many(kills: int, seed: int = 0, minutes: float = 240) -> dict[str, Any]:
    """Kill `kills` times, or until the time is over; the summary: its `failures` is empty if everything is right."""
    preload()
    import torch

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["YOLOV9_FAST_CACHE"] = f"{folder}/cache"
        stress = Stress(Path(folder), seed)
        stress.run(kills, 60 * minutes)
        left = [str(path.relative_to(folder)) for path in Path(folder).rglob(".*")]
        stress.failures += [f"temporary file left: {path}" for path in left]
        failures = [text.replace(folder, "…") for text in stress.failures]
    return {
        "kills": sum(stress.counts["signals"].values()),
        **{name: dict(sorted(counter.items())) for name, counter in stress.counts.items()},
        "temporary_files_left": len(left),
        "failures": failures,
        "seed": seed,
        "epochs": EPOCHS,
        "seconds_of_an_uninterrupted_run": round(stress.seconds, 2),
        "seconds": round(time.monotonic() - started),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=240, help="stop after this time")
    parser.add_argument("--out", type=Path, help="write the summary here")
    arguments = parser.parse_args()
    summary = kill_many(arguments.kills, arguments.seed, arguments.minutes)
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    return 1 if summary["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
