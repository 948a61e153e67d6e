"""What a core makes of training images: decoding, augmentation, collation, and the loader, beside Ultralytics'.

A process of one thread for each row; in each round every row makes a few samples, in an order drawn anew. Seconds are
those of the processor, so that a busy machine disturbs them little; the loader's are those of the wall clock.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from yolov9_fast.data.rendered import render_dataset
from yolov9_fast.errors import UserError

from . import machine
from .commands import yolo_copy
from .data_rows import STAGES, enlarged_copy, image_facts
from .processes import ROOT, WorkerProcess
from .records import DATA as FILE
from .records import Record, Recorder, results_folder
from .stats import summarise
from .step_table import NO_PEERS

FAMILY = "images"
WORKER = "yolov9_fast.bench.data_rows:main"
_LEAST_ROUNDS, _COUNT = 3, 8


@dataclass(frozen=True)
class Row:
    """`form`: of `data_rows.FORMS`; `store`: where source images come from."""

    provider: str
    form: str
    store: str
    peers: bool = False


ROWS = {
    "files": Row("ours", "ours", "files"),
    "memory": Row("ours", "ours", "memory"),
    "ultralytics-files": Row("Ultralytics", "ultralytics", "files", True),
    "ultralytics-memory": Row("Ultralytics", "ultralytics", "memory", True),
}
"""By the words of `--rows`."""


def run_data_table(
    data: Path | None = None,
    *,
    sizes: Sequence[int] = (640, 320),
    batch: int = 16,
    workers: int = 2,
    large: int = 1280,
    peers: str | None = None,
    rows: Sequence[str] = tuple(ROWS),
    seconds: float = 20.0,
    out: Path | None = None,
) -> Path:
    """Measure the rows in turns and append them to the record; returns the file.

    Args:
        data: data file with the split train; None: rendered photographs of 640 px.
        sizes: image sizes of training in pixels.
        batch: images of a batch.
        workers: loader processes of the loader's rate; 0: it is not measured.
        large: also a copy of the images at this long side in pixels; 0: none.
        peers: the interpreter of the environment in which the others are installed.
        rows: names of `ROWS`.
        seconds: for the rounds of each size and set.
        out: folder of records, below which the device has its own.

    Raises:
        UserError: an unknown row, or data that cannot be read.
    """
    unknown = set(rows) - set(ROWS)
    if unknown:
        raise UserError(f"--rows: unknown {', '.join(sorted(unknown))}; choose from {', '.join(ROWS)}")
    environment = machine.environment(torch.device("cpu"))
    recorder = Recorder((out or results_folder()) / environment["device"] / FILE, Path(FILE).stem)
    with tempfile.TemporaryDirectory(prefix="yolov9-fast-data-") as name:
        folder = Path(name)
        source = data or render_dataset(folder / "rendered", train=64, val=1, size=640)
        stem = data.stem if data else "rendered"
        sets = {stem: yolo_copy(source, folder / "plain") if data else enlarged_copy(source, folder / "plain", 0)}
        if large:
            sets[f"{stem} at {large} px"] = enlarged_copy(source, folder / "large", large)
        recorder.write("run", command=machine.program_line(), environment=environment)
        for title, file in sets.items():
            facts = image_facts(file)
            for size in sizes:
                shape = {"data": title, "image_size": size, "batch": batch, "workers": workers, **facts}
                for kind, content in _measured(file, shape, peers, rows, seconds):
                    recorder.write(kind, **content)
    return recorder.path


def _measured(
    file: Path, shape: dict[str, Any], peers: str | None, rows: Sequence[str], seconds: float
) -> list[tuple[str, dict[str, Any]]]:
    contents: list[tuple[str, dict[str, Any]]] = []
    with contextlib.ExitStack() as stack:
        opened: dict[str, tuple[WorkerProcess, dict[str, Any]]] = {}
        for name in rows:
            try:
                process = _process(stack, ROWS[name], peers)
                options = {"data": str(file), "size": shape["image_size"], "batch": shape["batch"]}
                answer = process.ask("open", form=ROWS[name].form, store=ROWS[name].store, **options)
                opened[name] = (process, answer)
            except UserError as error:
                reason = str(error).replace(f"{ROOT}: ", "").splitlines()[0][:200]
                contents.append(("absent", _head(name, shape) | {"reason": reason}))
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in opened}
        order, chance, end = list(opened), random.Random(0), time.perf_counter() + seconds
        while order and (len(samples[order[0]]) < _LEAST_ROUNDS or time.perf_counter() < end):
            chance.shuffle(order)
            for name in order:
                samples[name].append(opened[name][0].ask("round", count=_COUNT))
        for name, (process, answer) in opened.items():
            stages = {
                stage: summarise([one[stage] for one in samples[name]]) for stage in STAGES if stage in answer["stages"]
            }
            whole = "sample" if "sample" in stages else "augment"
            content = _head(name, shape) | {
                "package": answer["package"],
                "stages": {stage: summary.median for stage, summary in stages.items()},
                "median": stages[whole].median,
                "p20": stages[whole].p20,
                "p80": stages[whole].p80,
                "samples": [one[whole] for one in samples[name]],
                "per_core": 1 / (stages[whole].median + stages["collate"].median),
            }
            if shape["workers"]:
                content["loader"] = process.ask("loader", workers=shape["workers"], seconds=max(seconds / 4, 0.2))
            contents.append(("measure", content))
    return contents


def _process(stack: contextlib.ExitStack, row: Row, peers: str | None) -> WorkerProcess:
    if row.peers and peers is None:
        raise UserError(NO_PEERS)
    python = peers if row.peers and peers is not None else sys.executable
    environment = {"OMP_NUM_THREADS": "1"}
    return stack.enter_context(WorkerProcess(ROOT, WORKER, python=python, environment=environment, silent=True))


def _head(name: str, shape: dict[str, Any]) -> dict[str, Any]:
    return {
        "case": f"{FAMILY}/{shape['data']}/{shape['image_size']}px/b{shape['batch']}",
        "family": FAMILY,
        "subject": "training sample",
        "shape": shape,
        "row": name,
        "provider": f"{ROWS[name].provider}, {ROWS[name].store}",
        "layout": "",
    }


def text(records: Sequence[Record]) -> str:
    """The table in Markdown, of the last measurement of each row: times of a source image or sample on one core."""
    from .report import table, time_text  # which reports on this

    latest = {(r["case"], r["row"]): r for r in records if r["kind"] in ("measure", "absent")}
    rows = []
    for r in latest.values():
        if r["kind"] == "absent":
            continue
        stages, shape = r["stages"], r["shape"]
        rows.append(
            [
                f"{shape['data']}, {shape['median_size'][0]}×{shape['median_size'][1]}",
                f"{shape['image_size']} px",
                r["provider"],
                r["package"] or "this library",
                *(time_text(stages[stage]) if stage in stages else "" for stage in ("decode", "augment", "collate")),
                time_text(r["median"]),
                f"{r['per_core']:.0f}",
                f"{r['loader']:.0f} by {shape['workers']}" if "loader" in r else "",
            ]
        )
    head = ("images", "size", "from", "package", "decode", "augment", "collate", "whole sample")
    lines = [table((*head, "images/s, one core", "images/s, loader processes"), rows)]
    lines += [f"- {r['case']}, {r['provider']}: {r['reason']}" for r in latest.values() if r["kind"] == "absent"]
    return "\n".join(lines)
