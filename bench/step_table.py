"""A whole training step beside other people's code: a process for each row, and all of them in turns.

The packages of the others are installed in an environment of their own (bench/METHOD.md says how), and run as they are.
"""

from __future__ import annotations

import contextlib
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from yolov9_fast.errors import UserError

from . import machine
from .detection import CLASSES
from .networks import OBJECTS_PER_IMAGE
from .processes import ROOT, WorkerProcess
from .progress import progress
from .records import STEP_TABLE, Record, Recorder, results_folder
from .stats import ratio_of_medians, summarise
from .step_rows import ROWS, Row

FAMILY = "peers"
WORKER = "yolov9_fast.bench.step_rows:main"
NO_PEERS = "no interpreter with the packages of others (--peers PYTHON)"
_LEAST_ROUNDS = 3
_ALLOWED = {"float32": {"loss": 1e-3, "gradient": 1e-2}, "bfloat16": {"loss": 2e-2}}
"""How far a row's loss and gradient norm may be from those of the first row with the same weights, relative.

The gradients of random weights in bf16 are mostly rounding, whoever computes them: no limit tells right from wrong.
"""


def run_step_table(
    *,
    peers: str | None = None,
    rows: Sequence[str] = tuple(ROWS),
    size: int = 320,
    batch: int = 8,
    threads: int | None = None,
    seconds: float = 200.0,
    out: Path | None = None,
) -> Path:
    """Measure the rows in turns and record them; returns the file, which is written anew.

    Args:
        peers: the interpreter of the environment in which the others are installed.
        rows: names of `ROWS`.
        size: of the images in pixels.
        threads: of every process; None: as many as torch takes here.
        seconds: for the rounds, of which there are at least three.
        out: folder of records, below which the device has its own.

    Raises:
        UserError: an unknown row.
    """
    unknown = set(rows) - set(ROWS)
    if unknown:
        raise UserError(f"--rows: unknown {', '.join(sorted(unknown))}; choose from {', '.join(ROWS)}")
    threads = threads or torch.get_num_threads()
    environment = machine.environment(torch.device("cpu")) | {"threads": threads}
    path: Path = (out or results_folder()) / environment["device"] / STEP_TABLE
    shape = {"image_size": size, "batch": batch, "objects": OBJECTS_PER_IMAGE, "classes": CLASSES, "threads": threads}
    contents: list[tuple[str, dict[str, Any]]] = []
    with contextlib.ExitStack() as stack:
        opened: dict[str, tuple[WorkerProcess, dict[str, Any]]] = {}
        for name in progress(rows, str):
            try:
                process = _process(stack, ROWS[name], peers)
                answer = process.ask("open", row=name, size=size, batch=batch, threads=threads)
            except UserError as error:
                contents.append(("absent", _head(name, shape) | {"reason": _reason(error)}))
                continue
            wrong = _wrong(name, answer, {other: one[1] for other, one in opened.items()})
            if wrong is not None:
                contents.append(("absent", _head(name, shape) | {"reason": wrong, "wrong": True}))
                continue
            opened[name] = (process, answer)
        samples = _turns({name: process for name, (process, _) in opened.items()}, seconds)
        for name, (process, answer) in opened.items():
            contents.append(("measure", _measured(name, shape, answer, samples, process.ask("memory"))))
    recorder = Recorder(path, path.stem)
    path.unlink(missing_ok=True)
    recorder.write("run", command=machine.program_line(), environment=environment)
    for kind, content in contents:
        recorder.write(kind, **content)
    return path


def _process(stack: contextlib.ExitStack, row: Row, peers: str | None) -> WorkerProcess:
    if row.interpreter == "peers" and peers is None:
        raise UserError(NO_PEERS)
    python = peers if row.interpreter == "peers" and peers is not None else sys.executable
    return stack.enter_context(WorkerProcess(ROOT, WORKER, python=python, silent=True))


def _reason(error: UserError) -> str:
    """Without the machine's paths."""
    return str(error).replace(f"{ROOT}: ", "").splitlines()[0][:200]


def _head(name: str, shape: dict[str, Any]) -> dict[str, Any]:
    row = ROWS[name]
    return {
        "case": f"{FAMILY}/{shape['image_size']}px/b{shape['batch']}",
        "family": FAMILY,
        "subject": "training step",
        "network": row.network,
        "mode": "step",
        "dtype": row.dtype,
        "shape": shape,
        "count": 1,
        "row": name,
        "provider": row.provider if row.network.startswith("yolo") else f"{row.provider}, {row.network}",
        "layout": row.layout,
    }


def _wrong(name: str, answer: dict[str, Any], others: dict[str, dict[str, Any]]) -> str | None:
    """Why the row does not compute what the first in float32 with its weights does; its error goes into `answer`."""
    same = [
        one for other, one in others.items() if (ROWS[other].same, ROWS[other].dtype) == (ROWS[name].same, "float32")
    ]
    first = next(iter(same), answer)
    errors = {key: abs(answer["check"][key] / value - 1) for key, value in first["check"].items()}
    answer["error"] = max(errors.values())
    for key, allowed in _ALLOWED[ROWS[name].dtype].items():
        if not errors[key] <= allowed:
            return f"wrong result: {key} {answer['check'][key]:.6g} for {first['check'][key]:.6g}"
    return None


def _turns(processes: dict[str, WorkerProcess], seconds: float) -> dict[str, list[dict[str, Any]]]:
    """Samples of every row, one in each round, in an order drawn anew for each."""
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in processes}
    order, chance = list(processes), random.Random(0)
    end = time.perf_counter() + seconds
    rounds = 0
    while order and (rounds < _LEAST_ROUNDS or time.perf_counter() < end):
        chance.shuffle(order)
        for name in order:
            samples[name].append(processes[name].ask("sample"))
        rounds += 1
    return samples


def _measured(
    name: str,
    shape: dict[str, Any],
    answer: dict[str, Any],
    samples: dict[str, list[dict[str, Any]]],
    memory: dict[str, Any],
) -> dict[str, Any]:
    own, first = samples[name], samples[next(iter(samples))]
    times = [one["seconds"] for one in own]
    summary = summarise(times)
    content = _head(name, shape) | {
        "package": answer["package"],
        "accelerated": answer["reports"],
        "check": answer["check"],
        "error": answer["error"],
        "median": summary.median,
        "p20": summary.p20,
        "p80": summary.p80,
        "samples": times,
        "disturbed": sum(one["disturbed"] for one in own),
        "phases": {phase: summarise([one["phases"][phase] for one in own]).median for phase in own[0]["phases"]},
        "per_second": shape["batch"] / summary.median,
        **memory,
    }
    if own is not first:
        ratio = ratio_of_medians([one["seconds"] for one in first], times, paired=True)
        content["speedup"] = {"value": ratio.value, "low": ratio.low, "high": ratio.high}
    return content


def text(records: Sequence[Record]) -> str:
    """The table for the documentation, in Markdown: the first measured row is the unit of "×"."""
    from .report import byte_text, ratio_text, table, time_text  # which reports on this

    measured = [record for record in records if record["kind"] == "measure"]
    rows = []
    for r in measured:
        phases = r["phases"]
        last = phases["optimiser"] + phases.get("ema", 0.0)
        cells = [f"{r['provider']}, {r['layout']}", r["package"] or "this library", time_text(r["median"])]
        cells += [f"[{time_text(r['p20'])}, {time_text(r['p80'])}]", ratio_text(r)]
        cells += [
            *(time_text(phases[name]) if name in phases else "in forward" for name in ("forward", "loss", "backward")),
            time_text(last),
        ]
        rows.append([*cells, byte_text(r["peak_bytes"])])
    head = ("form", "package", "whole step", "[20th, 80th percentile]", "×", "forward", "loss", "backward")
    lines = [table((*head, "optimiser and average", "peak memory"), rows)]
    lines += [f"- {r['provider']}, {r['layout']}: {r['reason']}\n" for r in records if r["kind"] == "absent"]
    return "\n".join(lines) if rows else "Not measured.\n" + "\n".join(lines[1:])
