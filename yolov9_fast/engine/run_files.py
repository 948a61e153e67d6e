"""The folder of a run: its paths, the state to resume from, results.csv."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from yolov9_fast.atomic import atomic_write
from yolov9_fast.errors import CheckpointError, UserError

STATE_VERSION = 1


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run's folder."""

    path: Path

    @property
    def weights(self) -> Path:
        """The folder of weights files."""
        return self.path / "weights"

    @property
    def state(self) -> Path:
        """What a run is resumed from."""
        return self.weights / "state.pt"

    @property
    def last(self) -> Path:
        """Weights of the last epoch."""
        return self.weights / "last.safetensors"

    @property
    def best(self) -> Path:
        """Weights of the best epoch."""
        return self.weights / "best.safetensors"

    @property
    def config(self) -> Path:
        """The run's options."""
        return self.path / "config.yaml"

    @property
    def results(self) -> Path:
        """A row per finished epoch."""
        return self.path / "results.csv"


def new_run(project: str | Path, name: str) -> RunFolder:
    """Make a new folder: `project/name`, or `project/name-2`, `-3`, … if that exists."""
    number = 1
    while True:
        path = Path(project) / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
            continue
        except OSError as error:
            raise UserError(f"cannot create the run folder {path}: {error.strerror}") from error
        return RunFolder(path)


def find_run(project: str | Path, name: str | None = None) -> RunFolder:
    """The run to resume: `project/name`, or the run in `project` whose state is newest.

    Raises:
        UserError: there is none with a state to resume from.
    """
    project = Path(project)
    if name is not None:
        candidates = [RunFolder(project / name)]
    else:
        folders = [p for p in project.iterdir() if p.is_dir()] if project.is_dir() else []
        candidates = [RunFolder(p) for p in folders]
    candidates = [run for run in candidates if run.state.is_file()]
    if not candidates:
        where = project / name if name else project
        raise UserError(f"{where}: nothing to resume, no weights/state.pt")
    return max(candidates, key=lambda run: run.state.stat().st_mtime)


def save_state(path: Path, state: dict[str, Any]) -> None:
    atomic_write(path, lambda file: torch.save({"version": STATE_VERSION, **state}, file))


def load_state(path: Path) -> dict[str, Any]:
    """Read a state without executing code from the file.

    Raises:
        CheckpointError: the file is damaged, or not a state.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged files
        raise CheckpointError(f"{path}: not a usable training state: {error}") from error
    if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
        raise CheckpointError(f"{path}: not a training state of version {STATE_VERSION}")
    return state


def write_results(path: Path, rows: list[dict[str, float]]) -> None:
    """Write all of results.csv: a resumed run rewrites it from its state, so that no epoch appears twice."""
    if not rows:
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    atomic_write(path, buffer.getvalue())
