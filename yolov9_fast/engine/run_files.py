"""The folder of a run: its paths, the state to resume from, results.csv."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from yolov9_fast._untrusted import absence, read_text, reason, shown, user_path
from yolov9_fast.atomic import atomic_write, is_temporary, lock, remove_stale
from yolov9_fast.engine.saved_state import check_plain_values
from yolov9_fast.errors import CheckpointError, UserError
from yolov9_fast.models.foreign_archive import restricted_load

log = logging.getLogger(__name__)
STATE_VERSION = 2


class FolderClaim:
    """Keeps a folder for this object while it lives: no other run of any process starts in it.

    Raises:
        BlockingIOError: another claim holds the folder.
        OSError: the file system has no locks.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder, os.O_RDONLY)
        lock(self._descriptor, wait=False)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self._descriptor)


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run's folder."""

    path: Path
    claim: FolderClaim | None = field(default=None, repr=False, compare=False)

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
    """Make a new folder: `project/name`, or `project/name-2`, `-3`, … if that exists.

    A folder that a run left before its first state and options were saved is used again. The folder is this run's as
    long as the returned object lives, and afterwards if it has files.

    Raises:
        UserError: the folder cannot be made.
    """
    first = user_path(Path(project, name), "project and name", UserError)
    number = 1
    while True:
        path = first if number == 1 else first.parent / f"{first.name}-{number}"
        number += 1
        made = False
        try:
            path.mkdir(parents=True)
            made = True
        except FileExistsError:
            if not os.path.isdir(path.parent):
                raise UserError(f"cannot create the run folder {path}: {path.parent} {absence(path.parent)}") from None
            if not _is_unstarted(path):
                continue
        except OSError as error:
            raise UserError(f"cannot create the run folder {path}: {error.strerror}") from error
        try:
            claim = FolderClaim(path)
        except BlockingIOError:
            continue
        except OSError:
            if not made:  # Without locks another process may be using it.
                continue
            return RunFolder(path)
        if _is_unstarted(path):  # Still: another process may have used it and ended since.
            if not made:
                log.info(f"{path} is used again: it holds no saved run")
            return RunFolder(path, claim)


def _is_unstarted(path: Path) -> bool:
    """Whether the folder has at most what a run leaves that ended before its first state and its options were saved."""
    if not path.is_dir():
        return False
    state = RunFolder(path).state
    try:
        for folder in (path, state.parent):
            for entry in os.scandir(folder) if folder.is_dir() else ():
                if Path(entry.path) not in (state, state.parent) and not is_temporary(entry.name):
                    return False
    except OSError:
        return False
    return True


def find_run(project: str | Path, name: str | None = None) -> RunFolder:
    """The run to resume: `project/name`, or the run in `project` whose state is newest.

    Raises:
        UserError: there is none with a state to resume from.
    """
    where = user_path(project if name is None else Path(project, name), "project and name", UserError)
    try:
        folders = [where] if name is not None else list(where.iterdir()) if os.path.isdir(where) else []
    except OSError as error:
        raise UserError(f"{where}: the folder of runs cannot be read: {reason(error)}") from error
    candidates = [RunFolder(folder) for folder in folders]
    resumable = [run for run in candidates if os.path.isfile(run.state) and os.path.isfile(run.config)]
    if not resumable:
        if any(_is_unstarted(run.path) for run in candidates):
            raise UserError(
                f"{where}: nothing to resume: the run ended before its first state was saved; start it again, with the "
                "same name it uses the same folder"
            )
        raise UserError(f"{where}: nothing to resume, no weights/state.pt")
    run = max(resumable, key=lambda run: run.state.stat().st_mtime)
    for folder in (run.path, run.weights):
        remove_stale(folder)
    return run


def save_state(path: Path, state: dict[str, Any]) -> None:
    atomic_write(path, lambda file: torch.save({"version": STATE_VERSION, **state}, file))


def load_state(path: Path) -> dict[str, Any]:
    """Read a state without executing code from the file.

    Raises:
        CheckpointError: the file is damaged, not a state, or one whose counters or tables are of another kind.
    """
    state = restricted_load(path, "training state")
    if not isinstance(state, dict) or "version" not in state:
        raise CheckpointError(f"{path}: expected a training state, got something else")
    if type(state["version"]) is not int or state["version"] != STATE_VERSION:
        raise CheckpointError(
            f"{path}: expected a training state of version {STATE_VERSION}, got {shown(state['version'])}; it can only "
            f"be resumed by the version of yolov9_fast that wrote it"
        )
    try:
        check_plain_values(state)
    except ValueError as error:
        raise CheckpointError(f"{path} is not a readable training state: {reason(error)}") from error
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


def read_results(path: Path) -> list[dict[str, float]]:
    """Rows of results.csv, none where there is no such file; an empty cell is NaN.

    Raises:
        UserError: it cannot be read, or is no table of numbers.
    """
    if not path.exists():
        return []
    text = read_text(path, "results", "TABLE_BYTES", UserError)
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        return [{column: float(cell or "nan") for column, cell in row.items()} for row in rows]
    except (csv.Error, ValueError, TypeError) as error:  # TypeError: a row longer than the header
        raise UserError(f"{path}: results: expected a table of numbers: {reason(error)}") from error
