"""Cells of an ablation: one system trained once with one seed.

A finished cell is never trained again, an interrupted one resumes after its last epoch, and several processes may
work on the same cells at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolov9_fast import __version__
from yolov9_fast._untrusted import read_json, shown
from yolov9_fast.atomic import atomic_write
from yolov9_fast.data import load_data_config, load_split
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.engine.run_files import RunFolder, read_results
from yolov9_fast.engine.trainer import Trainer
from yolov9_fast.errors import DataError, UserError
from yolov9_fast.paper.systems import System

log = logging.getLogger(__name__)
_NOT_PART_OF_A_CELL = [
    "model",
    "auxiliary",
    "data",
    "device",
    "workers",
    "project",
    "name",
    "cache",
    "save_period",
    "plots",
    "augment_preview",
    "tensorboard",
    "seed",
    "rect",
]
"""Options that say where or how a cell is computed, not what; or that its key names otherwise."""
METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


@dataclass(frozen=True)
class Cell:
    """A system, a seed and a recipe; `folder` holds all that belongs to it."""

    system: System
    seed: int
    recipe: TrainConfig
    key: str
    project: Path

    @property
    def folder(self) -> Path:
        return self.project / "cells" / f"{self.system.name}-seed{self.seed}-{self.key[:10]}"

    @property
    def result_file(self) -> Path:
        return self.folder / "result.json"

    def result(self) -> dict[str, Any] | None:
        """What the finished cell measured; None while it is not finished.

        Raises:
            UserError: its file is damaged.
        """
        if not self.result_file.is_file():
            return None
        try:
            result = read_json(self.result_file, "result")
        except DataError as error:
            raise UserError(f"{error}; remove it to train again") from error
        if not isinstance(result, dict):
            raise UserError(f"{self.result_file}: expected a result, got {shown(result)}; remove it to train again")
        return result


def data_digest(data: str | Path) -> str:
    """A digest of what is learned from and judged by: names, sizes and boxes of the images in train and val."""
    config = load_data_config(data)
    digest = hashlib.sha256(json.dumps(config.names, sort_keys=True).encode())
    for split in ("train", "val"):
        records, _ = load_split(config, split, for_training=split == "train")
        for record in records:
            digest.update(f"{split} {record.path.name} {record.width} {record.height}".encode())
            digest.update(record.boxes.tobytes())
    return digest.hexdigest()


def make_cells(systems: Sequence[System], seeds: Sequence[int], recipe: TrainConfig, project: Path) -> list[Cell]:
    """All cells, a seed at a time, so that a part of the work already compares every system.

    Raises:
        DataError: the data cannot be used.
    """
    data = data_digest(recipe.data)
    cells: dict[Path, Cell] = {}
    for seed in seeds:
        for system in systems:
            options = {"project": "", "name": "", **system.options}
            own = dataclasses.replace(recipe, seed=seed, **options)
            plain = _changed_options(own)
            layers = system.graph.as_dict()["layers"]
            text = json.dumps({"layers": layers, "recipe": plain, "data": data, "seed": seed}, sort_keys=True)
            cell = Cell(system, seed, own, hashlib.sha256(text.encode()).hexdigest(), project)
            cells.setdefault(cell.folder, cell)
    return list(cells.values())


def _changed_options(recipe: TrainConfig) -> dict[str, Any]:
    """Options that differ from the published recipe's; so an option that a later version adds leaves the keys alone."""
    usual = dataclasses.asdict(TrainConfig())
    options = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in _NOT_PART_OF_A_CELL}
    augment = {k: v for k, v in options.pop("augment").items() if v != usual["augment"][k]}
    return {**{k: v for k, v in options.items() if v != usual[k]}, "augment": augment}


def run_cells(cells: Sequence[Cell]) -> None:
    """Train every cell that has no result yet. What another process holds is left to it and looked at again at the end.

    Raises:
        UserError: a cell cannot be trained; the finished ones keep their results.
    """
    waiting = [cell for cell in cells if cell.result() is None]
    if len(waiting) < len(cells):
        log.info(f"{len(cells) - len(waiting)} of {len(cells)} cells are finished already")
    busy = []
    for number, cell in enumerate(waiting, start=1):
        log.info(f"cell {number} of {len(waiting)}: {cell.system.group} {cell.system.row}, seed {cell.seed}")
        if not _run_cell(cell, wait=False):
            log.info("  another process trains it")
            busy.append(cell)
    for cell in busy:
        _run_cell(cell, wait=True)


def _run_cell(cell: Cell, *, wait: bool) -> bool:
    try:
        cell.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {cell.folder}: {error.strerror}") from error
    with _held(cell.folder / "lock", wait) as held:
        if not held:
            return False
        if cell.result() is None:
            _train(cell)
        return True


@contextlib.contextmanager
def _held(path: Path, wait: bool) -> Iterator[bool]:
    """Hold a lock that dies with the process; False where another one holds it. Without `fcntl` nobody waits."""
    try:
        import fcntl
    except ImportError:
        yield True
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _train(cell: Cell) -> None:
    graph = cell.folder / "graph.yaml"
    atomic_write(graph, cell.system.graph.as_yaml())
    run = RunFolder(cell.folder / "train")
    config = dataclasses.replace(cell.recipe, model=str(graph), project=str(cell.folder), name="train")
    if run.state.is_file() and len(read_results(run.results)) < config.epochs:
        Trainer.resume(cell.folder, "train", device=config.device, workers=config.workers).run()
    elif not run.state.is_file():
        shutil.rmtree(run.path, ignore_errors=True)  # killed before its first state
        Trainer(config).run()
    atomic_write(cell.result_file, json.dumps(_summary(cell, run), indent=1, ensure_ascii=False))
    run.state.unlink(missing_ok=True)  # several times the size of the weights, and of no use any more


def _summary(cell: Cell, run: RunFolder) -> dict[str, Any]:
    import torch

    rows = read_results(run.results)
    best = max(rows, key=lambda row: row["metrics/ap"])
    recipe = dataclasses.asdict(cell.recipe)
    return {
        "system": cell.system.name,
        "seed": cell.seed,
        "key": cell.key,
        "last": _metrics(rows[-1]),
        "best": {"epoch": int(best["epoch"]), **_metrics(best)},
        "curve": [row["metrics/ap"] for row in rows],
        "epochs": len(rows),
        "seconds": sum(row["seconds"] for row in rows),
        "recipe": {k: v for k, v in recipe.items() if k not in ("project", "name", "model", "data", "device")},
        "versions": {"yolov9_fast": __version__, "torch": torch.__version__},
    }


def _metrics(row: dict[str, float]) -> dict[str, float | None]:
    """Metrics of an epoch; None where the images hold no object of that size."""
    found = {name: row.get(f"metrics/{name}", math.nan) for name in METRICS}
    return {name: None if math.isnan(value) else value for name, value in found.items()}
