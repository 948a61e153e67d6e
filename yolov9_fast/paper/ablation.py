"""`yolov9-fast paper table2 … table6`: a table's systems, counted next to the paper's numbers, or trained."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from yolov9_fast._untrusted import user_path
from yolov9_fast.engine.config import TrainConfig, read_config
from yolov9_fast.errors import UserError
from yolov9_fast.paper.cells import make_cells, run_cells
from yolov9_fast.paper.rows import Row, check_counts, counted, measured, printed, write_measured
from yolov9_fast.paper.systems import BRANCH_ROWS, PGI, TABLES, System

log = logging.getLogger(__name__)
_EPILOG = """examples:
  yolov9-fast paper {target} --dry
  yolov9-fast paper {target} --data my.yaml --epochs 30 --imgsz 320 --seeds 3

A cell (one system, one seed) that is finished is never trained again; stop the command at any time and give it again.
Several processes with the same --project share the work. The recipe is `yolov9-fast train`'s; --config changes it for
every system alike."""
_RECIPE = ("data", "epochs", "imgsz", "batch", "device", "workers")


def configure(parser: argparse.ArgumentParser, target: str) -> None:
    parser.epilog = _EPILOG.format(target=target)
    parser.add_argument("--dry", action="store_true", help="only count parameters and GFLOPs, as deployed at 640 px")
    if target == "tables":
        return
    if target != "table6":
        parser.add_argument("--size", action="append", choices=sorted(PGI), help="only this size (again for several)")
    if target == "table4":
        parser.add_argument(
            "--row", action="append", choices=tuple(BRANCH_ROWS), help="only this row (again for several)"
        )
    if target == "table2":
        parser.add_argument("--block", action="append", metavar="NAME", help="this block too: a name or module:Class")
    parser.add_argument("--data", metavar="FILE.yaml", help="data file to train and evaluate on")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0..N-1 per system (default 3)")
    parser.add_argument("--config", metavar="FILE.yaml", help="recipe file, as for `yolov9-fast train`")
    parser.add_argument("--epochs", type=int, metavar="N", help="epochs per cell")
    parser.add_argument("--imgsz", type=int, metavar="PIXELS", help="image size")
    parser.add_argument("--batch", type=int, metavar="N", help="images per step")
    parser.add_argument("--device", metavar="TEXT", help="cpu or 0")
    parser.add_argument("--workers", type=int, metavar="N", help="loader processes")
    parser.add_argument(
        "--project", default="runs/paper", metavar="FOLDER", help="cells and results (default runs/paper)"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.target == "tables":
        if not arguments.dry:
            raise UserError("`paper tables` counts: give --dry; `paper table5 --data FILE.yaml` trains one table")
        return max([_dry(name, systems()) for name, systems in TABLES.items()])
    systems = _systems(arguments)
    if arguments.dry:
        return _dry(arguments.target, systems)
    if arguments.seeds < 1:
        raise UserError(f"--seeds: expected at least 1, got {arguments.seeds}")
    for system in systems:
        if system.untrainable:
            log.info(f"{system.row} is not trained: {system.untrainable}")
    systems = [system for system in systems if not system.untrainable]
    if not systems:
        raise UserError("none of these rows can be trained")
    recipe = _recipe(arguments)
    project = user_path(arguments.project, "--project", UserError)
    cells = make_cells(systems, range(arguments.seeds), recipe, project)
    run_cells(cells)
    rows = measured(systems, cells)
    print(printed(arguments.target, rows))
    path = project / f"{arguments.target}.json"
    write_measured(path, arguments.target, rows, recipe)
    print(f"numbers in {path}, plot in {path.with_suffix('.png')}")
    return 0


def _systems(arguments: argparse.Namespace) -> list[System]:
    options: dict[str, Any] = {"sizes": getattr(arguments, "size", None)}
    if getattr(arguments, "row", None):
        options["rows"] = arguments.row
    if getattr(arguments, "block", None):
        options["blocks"] = arguments.block
    try:
        return TABLES[arguments.target](**options)
    except ValueError as error:
        raise UserError(str(error)) from error


def _recipe(arguments: argparse.Namespace) -> TrainConfig:
    """One recipe for all cells: the file's, changed by the flags that were given."""
    config = read_config(user_path(arguments.config, "--config", UserError)) if arguments.config else TrainConfig()
    given = {name: getattr(arguments, name) for name in _RECIPE if getattr(arguments, name) is not None}
    config = dataclasses.replace(config, plots=False, tensorboard=False, patience=0, **given)
    config.require_data()
    return config


def _dry(table: str, systems: Sequence[System]) -> int:
    rows: list[Row] = counted(systems)
    print(printed(table, rows))
    wrong = check_counts(rows)
    for text in wrong:
        print(text)
    print()
    return 1 if any(text.startswith("differs") for text in wrong) else 0
