"""What is checked before a run continues: that something is left to do, and that its classes are the same."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from yolov9_fast._untrusted import shown
from yolov9_fast.data import DataConfig
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.engine.report import evaluation_files
from yolov9_fast.engine.run_files import RunFolder
from yolov9_fast.errors import CheckpointError, UserError


class RunFinishedError(UserError):
    """A run to resume that has nothing left to do."""


@contextlib.contextmanager
def reading_state(run: RunFolder) -> Iterator[None]:
    """Turn what a state of another form or of another network raises into one line, a `CheckpointError`."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{run.state} does not belong to this run: {reason[:300]}") from error


def check_unfinished(run: RunFolder, config: TrainConfig, saved: dict[str, Any]) -> None:
    """Raise `RunFinishedError` if all epochs and the final evaluation are done and the evaluation's files are there."""
    missing = [name for name in evaluation_files(config.plots) if not (run.path / name).is_file()]
    if not saved["finished"] or missing:
        return
    done = saved["epoch"] + 1
    if done >= config.epochs:
        raise RunFinishedError(f"{run.path} has finished its {config.epochs} epochs; nothing to resume")
    raise RunFinishedError(
        f"{run.path} has finished after {done} of {config.epochs} epochs ({saved['stopped']}); nothing to resume"
    )


def check_classes(data: DataConfig, saved: dict[str, Any]) -> None:
    """Raise `UserError` unless the data has the classes of the saved state, in their order."""
    old, new = json.loads(saved["data"])["names"], list(data.names.values())
    if len(old) != len(new):
        raise UserError(f"{data.file}: names: expected the {len(old)} classes of the run to resume, got {len(new)}")
    for index, (expected, got) in enumerate(zip(old, new, strict=True)):
        if expected != got:
            raise UserError(
                f"{data.file}: names: expected class {index} to be {shown(expected)} as in the run to resume, "
                f"got {shown(got)}"
            )


def data_changes(saved: dict[str, Any], now: dict[str, Any]) -> str:
    """How the images and labels of a run differ from those of its saved state; empty if they do not.

    Args:
        saved: the state.
        now: `TrainingData.description`.
    """
    old = json.loads(saved["data"])
    changes = []
    for split in ("train", "val"):
        if old[split]["images"] != now[split]["images"]:
            changes.append(f"{split}: {old[split]['images']} images before, now {now[split]['images']}")
        elif old[split] != now[split]:
            changes.append(f"{split}: other images or labels")
    if old["batches"] != now["batches"]:
        changes.append(f"batches per epoch: {old['batches']} before, now {now['batches']}")
    return "; ".join(changes)
