"""Whole training commands beside other people's: start-up, epochs, evaluation and plots, by the wall clock.

Each command is a process that nobody else looks into: an epoch ends when its row is in the run's `results.csv`. The
same pictures, labels, image size, batch, epochs, loader processes, optimiser and augmentation; what a program cannot be
asked for stays as it is shipped, and is in its command.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import yolov9_fast as yf
from yolov9_fast.data import load_data_config, load_split
from yolov9_fast.errors import UserError

from . import machine, peer_imports
from .processes import ROOT, tree_command
from .progress import progress
from .records import COMMANDS as FILE
from .records import Record, Recorder, results_folder
from .stats import summarise
from .step_table import NO_PEERS

FAMILY = "commands"
_POLL = 0.02


@dataclass(frozen=True)
class Settings:
    """What all commands are asked for."""

    epochs: int = 2
    size: int = 320
    batch: int = 8
    workers: int = 2


@dataclass(frozen=True)
class Command:
    """A command by the words after the interpreter's own: `words(settings, data file, folder of the run)`."""

    provider: str
    network: str
    words: Callable[[Settings, Path, Path], list[str]]
    peers: bool = False
    package: str = ""


def ours(amp: str) -> Callable[[Settings, Path, Path], list[str]]:
    def words(settings: Settings, data: Path, folder: Path) -> list[str]:
        options = {"model": "yolov9-t", "data": str(data), "epochs": settings.epochs, "imgsz": settings.size}
        options |= {"batch": settings.batch, "workers": settings.workers, "amp": amp, "close-mosaic": 0, "seed": 0}
        options |= {"device": "cpu", "project": str(folder), "name": "run"}
        return [
            "-m",
            "yolov9_fast",
            "train",
            *(word for k, v in options.items() for word in (f"--{k}", str(v))),
        ]

    return words


def published(settings: Settings, data: Path, folder: Path) -> list[str]:
    """`train_dual` of the package yolo9, with the network and the recipe that it brings; `{package}`: its folder."""
    options = {"cfg": "{package}/models/detect/yolov9-t.yaml", "hyp": "{package}/data/hyps/hyp.scratch-high.yaml"}
    options |= {"data": str(data), "weights": "", "epochs": str(settings.epochs), "img": str(settings.size)}
    options |= {"batch": str(settings.batch), "workers": str(settings.workers), "device": "cpu", "min-items": "0"}
    options |= {"close-mosaic": "0", "project": str(folder), "name": "run"}
    return [PEER, "yolo9.train_dual", *(word for k, v in options.items() for word in (f"--{k}", v))]


def ultralytics(*before: str) -> Callable[[Settings, Path, Path], list[str]]:
    def words(settings: Settings, data: Path, folder: Path) -> list[str]:
        options = {"model": "yolov9t.yaml", "data": data, "epochs": settings.epochs, "imgsz": settings.size}
        options |= {
            "batch": settings.batch,
            "workers": settings.workers,
            "device": "cpu",
            "seed": 0,
            "optimizer": "SGD",
        }
        options |= {"close_mosaic": 0, "scale": 0.9, "mixup": 0.15, "copy_paste": 0.3, "project": folder, "name": "run"}
        return [*before, *(f"{key}={value}" for key, value in options.items())]

    return words


PEER = "yolov9_fast.bench.peer_imports:main"
COMMANDS = {
    "ours": Command("ours", "yolov9-t", ours("off")),
    "ours-bf16": Command("ours, bf16", "yolov9-t", ours("bf16")),
    "published": Command("published code", "yolov9-t", published, True, "yolo9"),
    "ultralytics": Command(
        "Ultralytics", "yolov9t without PGI", ultralytics(PEER, "yolo", "detect", "train"), True, "ultralytics"
    ),
    "ultralytics-accelerated": Command(
        "Ultralytics, accelerate in a callback",
        "yolov9t without PGI",
        ultralytics("yolov9_fast.bench.commands:accelerated_ultralytics"),
        True,
        "ultralytics",
    ),
}
"""By the words of `--rows`."""


def accelerated_ultralytics(words: Sequence[str]) -> int:
    """Ultralytics' training by its Python interface, with `accelerate` in the callback before the first batch."""
    peer_imports.prepare()
    options: dict[str, Any] = dict(word.split("=", 1) for word in words)
    model = importlib.import_module("ultralytics").YOLO(options.pop("model"))

    def accelerate(trainer: Any) -> None:
        trainer.model.criterion = trainer.model.init_criterion()
        print(yf.accelerate(trainer.model), yf.accelerate_loss(trainer.model.criterion))

    model.add_callback("on_train_start", accelerate)
    parsed = {key: _number(value) for key, value in options.items()}
    model.train(**parsed)
    return 0


def _number(text: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def yolo_copy(data: Path, folder: Path) -> Path:
    """The splits train and val of a data file in YOLO's layout, images as links: the form that every program reads."""
    config = load_data_config(data)
    lines = []
    for split in ("train", "val"):
        images, labels = (folder / kind / split for kind in ("images", "labels"))
        for made in (images, labels):
            made.mkdir(parents=True, exist_ok=True)
        for number, record in enumerate(load_split(config, split, for_training=split == "train")[0]):
            name = f"{number:05d}{record.path.suffix.lower()}"
            (images / name).symlink_to(record.path.resolve())
            rows = "".join(f"{int(row[0])} " + " ".join(f"{v:.6f}" for v in row[1:]) + "\n" for row in record.boxes)
            (labels / name).with_suffix(".txt").write_text(rows)
        lines.append(f"{split}: images/{split}\n")
    names = "".join(f"  {index}: {name!r}\n" for index, name in config.names.items())
    made = folder / "data.yaml"
    made.write_text(f"path: {folder.resolve()}\n{''.join(lines)}nc: {config.num_classes}\nnames:\n{names}")
    return made


def run_commands(
    data: Path,
    settings: Settings,
    *,
    peers: str | None = None,
    rows: Sequence[str] = tuple(COMMANDS),
    rounds: int = 1,
    limit: float = 900.0,
    out: Path | None = None,
) -> Path:
    """Run the commands in turns and append to the record; returns the file.

    Args:
        data: data file with splits train and val.
        peers: the interpreter of the environment in which the others are installed.
        rows: names of `COMMANDS`.
        rounds: runs of each command.
        limit: seconds after which a command is ended.
        out: folder of records, below which the device has its own.

    Raises:
        UserError: an unknown row, or data that cannot be read.
    """
    unknown = set(rows) - set(COMMANDS)
    if unknown:
        raise UserError(f"--rows: unknown {', '.join(sorted(unknown))}; choose from {', '.join(COMMANDS)}")
    environment = machine.environment(torch.device("cpu"))
    recorder = Recorder((out or results_folder()) / environment["device"] / FILE, Path(FILE).stem)
    shape = {"data": data.stem, "epochs": settings.epochs, "image_size": settings.size, "batch": settings.batch}
    shape |= {"workers": settings.workers}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    reasons: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="yolov9-fast-commands-") as folder:
        copy = yolo_copy(data, Path(folder) / "data")
        recorder.write("run", command=machine.program_line(), environment=environment)
        for name in progress([name for _ in range(rounds) for name in rows], str):
            if name in reasons:
                continue
            place = Path(tempfile.mkdtemp(dir=folder))
            try:
                runs[name].append(timed(COMMANDS[name], settings, copy, place, peers, limit))
            except UserError as error:
                reasons[name] = str(error)
    for name in rows:
        head = {
            "case": f"{FAMILY}/{data.stem}/{settings.size}px/b{settings.batch}/{settings.epochs} epochs",
            "family": FAMILY,
            "subject": "training command",
            "network": COMMANDS[name].network,
            "shape": shape,
            "row": name,
            "provider": COMMANDS[name].provider,
            "layout": "",
        }
        if name in reasons:
            recorder.write("absent", **head, reason=reasons[name])
        else:
            recorder.write("measure", **head, **_measured(runs[name]))
    return recorder.path


def _measured(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of the whole command and of an epoch after the first: medians over the runs and their epochs."""
    later = [seconds for run in runs for seconds in run["epochs"][1:]]
    total = summarise([run["total"] for run in runs])
    content = {"package": runs[0]["package"], "command": runs[0]["command"], "runs": [run["epochs"] for run in runs]}
    content |= {"samples": [run["total"] for run in runs], "median": total.median, "p20": total.p20, "p80": total.p80}
    content["first_epoch"] = summarise([run["epochs"][0] for run in runs]).median
    return content | ({"epoch": summarise(later).median} if later else {})


def timed(
    command: Command, settings: Settings, data: Path, folder: Path, peers: str | None, limit: float
) -> dict[str, Any]:
    """Run it: seconds in all, and from one epoch's end to the next, the first from the start of the process.

    Raises:
        UserError: it cannot be run, fails, or takes longer than `limit`.
    """
    if command.peers and peers is None:
        raise UserError(NO_PEERS)
    python = peers if command.peers and peers is not None else sys.executable
    package = _package(python, command.package) if command.package else ("", "")
    words = [word.replace("{package}", package[1]) for word in command.words(settings, data, folder)]
    line = tree_command(ROOT, *words, python=python) if command.peers else [python, *words]
    log = folder / "log.txt"
    ends: list[float] = []
    with open(log, "w") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            line,
            stdout=output,
            stderr=output,
            cwd=folder,
            stdin=subprocess.DEVNULL,
        )
        while process.poll() is None:
            now = time.perf_counter() - start
            ends.extend([now] * (_finished_epochs(folder) - len(ends)))
            if now > limit:
                process.kill()
                process.wait()
                raise UserError(f"ended after {limit:.0f} s")
            time.sleep(_POLL)
        total = time.perf_counter() - start
    if process.returncode or len(ends) != settings.epochs:
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or [""]
        raise UserError(f"exit code {process.returncode}, {len(ends)} epochs: {last[0][:200]}")
    told = (
        " ".join(words[1:])
        .replace(str(folder), "OUT")
        .replace(str(data), "DATA")
        .replace(package[1] or "\0", "PACKAGE")
    )
    epochs = [end - begin for begin, end in zip([0.0, *ends], ends, strict=False)]
    return {"package": package[0], "command": told, "epochs": epochs, "total": total}


def _finished_epochs(folder: Path) -> int:
    """Rows of the run's `results.csv` below its head; 0 where there is none."""
    for path in folder.rglob("results.csv"):
        try:
            return max(path.read_text(errors="replace").count("\n") - 1, 0)
        except OSError:  # it is being replaced
            return 0
    return 0


def _package(python: str, name: str) -> tuple[str, str]:
    """`NAME VERSION` and the folder of a package of that interpreter; raises `UserError` where it is not installed."""
    code = (
        "import importlib.metadata as m, importlib.util as u, sys; n = sys.argv[1]; "
        "print(n, m.version(n)); print(list(u.find_spec(n).submodule_search_locations)[0])"
    )
    try:
        done = subprocess.run([python, "-c", code, name], capture_output=True, text=True, cwd=tempfile.gettempdir())
    except OSError as error:
        raise UserError(f"cannot start {python}: {error.strerror}") from error
    if done.returncode:
        raise UserError(f"{name} is not installed there")
    version, folder = done.stdout.splitlines()[:2]
    return version, os.path.abspath(folder)


def text(records: Sequence[Record]) -> str:
    """The table for the documentation, in Markdown, of the last measurement of each command."""
    from .report import table, time_text  # which reports on this

    latest = {record["row"]: record for record in records if record["kind"] in ("measure", "absent")}
    rows = [
        [
            r["provider"],
            r["package"] or "this library",
            r["network"],
            time_text(r["first_epoch"]),
            time_text(r["epoch"]) if "epoch" in r else "",
            time_text(r["median"]),
        ]
        for r in latest.values()
        if r["kind"] == "measure"
    ]
    head = ("command", "package", "network", "start and first epoch", "second epoch", "in all")
    lines = [f"- {r['provider']}: {r['reason']}\n" for r in latest.values() if r["kind"] == "absent"]
    return "\n".join([table(head, rows), *lines])
