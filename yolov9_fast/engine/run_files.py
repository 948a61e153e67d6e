"""The files of a training run: weights, the state to resume from, results.csv, TensorBoard, plots."""

from __future__ import annotations

import csv
import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from yolov9_fast.atomic import atomic_write
from yolov9_fast.errors import CheckpointError, UserError

log = logging.getLogger(__name__)
STATE_VERSION = 1


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run's folder."""

    path: Path

    @property
    def weights(self) -> Path:
        return self.path / "weights"

    @property
    def state(self) -> Path:
        return self.weights / "state.pt"

    @property
    def last(self) -> Path:
        return self.weights / "last.safetensors"

    @property
    def best(self) -> Path:
        return self.weights / "best.safetensors"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def results(self) -> Path:
        return self.path / "results.csv"


def new_run(project: str | Path, name: str) -> RunFolder:
    """A folder that did not exist: `project/name`, else `project/name-2`, `-3`, …"""
    number = 1
    while True:
        path = Path(project) / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
            continue
        except OSError as error:
            raise UserError(f"cannot make the run folder {path}: {error.strerror}") from error
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
        raise UserError(f"nothing to resume in {where}: no weights/state.pt")
    return max(candidates, key=lambda run: run.state.stat().st_mtime)


def save_state(path: Path, state: dict[str, Any]) -> None:
    atomic_write(path, lambda file: torch.save({"version": STATE_VERSION, **state}, file))


def load_state(path: Path) -> dict[str, Any]:
    """Read a state without executing anything from the file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged files
        raise CheckpointError(f"{path}: not a usable training state: {error}") from error
    if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
        raise CheckpointError(f"{path}: not a training state of version {STATE_VERSION}")
    return state


def write_results(path: Path, rows: list[dict[str, Any]]) -> None:
    """results.csv, whole: a resumed run rewrites it from its state, so no epoch stands in it twice."""
    if not rows:
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    atomic_write(path, buffer.getvalue())


class EventLog:
    """TensorBoard events, where tensorboard is installed; otherwise one line says what is missing."""

    def __init__(self, folder: Path, enabled: bool, purge_step: int | None = None) -> None:
        self._writer: Any = None
        if not enabled:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.info("TensorBoard events are off: `pip install tensorboard` brings them")
            return
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, row: dict[str, Any], step: int) -> None:
        if self._writer is not None:
            for key, value in row.items():
                if key != "epoch" and isinstance(value, int | float):
                    self._writer.add_scalar(key, value, step)
            self._writer.flush()

    def image(self, tag: str, image: Any, step: int) -> None:
        """`image`: uint8 [H, W, 3] RGB."""
        if self._writer is not None:
            self._writer.add_image(tag, image, step, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
