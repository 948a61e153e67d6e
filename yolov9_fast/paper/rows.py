"""Rows of an ablation's table: counted and published numbers, measured AP with spread, as text, JSON and plot."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from yolov9_fast.atomic import atomic_write
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.models import Cost, Graph, graph_cost
from yolov9_fast.paper.cells import METRICS, Cell
from yolov9_fast.paper.published import COLUMNS as LABELS
from yolov9_fast.paper.published import PublishedRow
from yolov9_fast.paper.systems import System
from yolov9_fast.viz.figure import BLUE, FAINT, INK, ORANGE, save_figure

_ROUNDING = 1e-9
_SIZES = ("ap_small", "ap_medium", "ap_large")
COLUMNS = {
    "table1": METRICS,
    "table2": ("ap",),
    "table3": ("ap",),
    "table4": ("ap", *_SIZES),
    "table5": ("ap", "ap50", "ap75"),
    "table6": ("ap", *_SIZES),
}
"""The columns of accuracy that the paper prints."""


@dataclass
class Row:
    """A system with its costs (millions of parameters, GFLOPs at 640 px; deployed and fused) and its cells' results."""

    system: System
    params: float
    gflops: float
    train_params: float
    results: list[dict[str, Any]] = field(default_factory=list)

    def metric(self, name: str = "ap") -> dict[int, float]:
        """The metric after the last epoch, by seed; seeds without it (no object of that size) are left out."""
        found = {result["seed"]: result["last"].get(name) for result in self.results}
        return {seed: value for seed, value in found.items() if value is not None}


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def paired_difference(row: Row, base: Row, name: str = "ap") -> tuple[float, float]:
    """Mean difference to `base` over the seeds that both have, and its standard error."""
    mine, other = row.metric(name), base.metric(name)
    mean, deviation = mean_and_spread([mine[seed] - other[seed] for seed in sorted(mine.keys() & other.keys())])
    return mean, deviation / math.sqrt(len(mine.keys() & other.keys()))


def counted(systems: Sequence[System]) -> list[Row]:
    """Rows with their costs; nothing is trained or allocated."""
    rows = []
    for system in systems:
        deployed = _cost(system.graph.deploy()[0], fused=True)
        trained = _cost(system.graph, fused=False)
        rows.append(Row(system, deployed.parameters / 1e6, deployed.gflops, trained.parameters / 1e6))
    return rows


@lru_cache(maxsize=256)
def _cost(graph: Graph, *, fused: bool) -> Cost:
    return graph_cost(graph, deployed=False, fused=fused)


def measured(systems: Sequence[System], cells: Sequence[Cell]) -> list[Row]:
    """Rows with the results of the cells."""
    rows = counted(systems)
    for row in rows:
        own = [cell for cell in cells if cell.system.name == row.system.name]
        row.results = [result for cell in own if (result := cell.result()) is not None]
    return rows


def check_counts(rows: Sequence[Row]) -> list[str]:
    """Cells that differ from the published ones by more than one unit of the last digit; known exceptions say why."""
    found = []
    for row in rows:
        for name, value in (("parameters", row.params), ("gflops", row.gflops)):
            published = getattr(row.system.published, name, None)
            if published is None or abs(round(value, 1) - published) <= 0.1 + _ROUNDING:
                continue
            reason = row.system.exception
            where = f"{row.system.group} {row.system.row}: {name} {value:.1f}, published {published:.1f}"
            found.append(f"exception: {where}: {reason}" if reason else f"differs: {where}")
    return found


def printed(table: str, rows: Sequence[Row]) -> str:
    """The table as text: costs counted and published, the paper's columns, and measured ones where there are."""
    columns = COLUMNS[table]
    trained = any(row.results for row in rows)
    lines = [_header(table, columns, trained)]
    base: Row | None = None
    for row in rows:
        if base is None or row.system.group != base.system.group:
            base = row
        lines.append(_line(row, base, columns, trained))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _header(table: str, columns: Sequence[str], trained: bool) -> list[str]:
    cells = [table, "row", "params M (paper)", "GFLOPs (paper)", "in training M"]
    for name in columns:
        cells.append(f"{LABELS[name]} paper")
        cells += [f"{LABELS[name]} ± sd"] if trained else []
    return cells + (["seeds", "AP to first row ± se"] if trained else [])


def _line(row: Row, base: Row, columns: Sequence[str], trained: bool) -> list[str]:
    published = row.system.published
    cells = [row.system.group, row.system.row]
    cells += [f"{row.params:.1f} ({_published(published, 'parameters')})"]
    cells += [f"{row.gflops:.1f} ({_published(published, 'gflops')})", f"{row.train_params:.1f}"]
    for name in columns:
        cells.append(_published(published, name))
        cells += [_spread(row, name)] if trained else []
    if not trained:
        return cells
    cells.append(str(len(row.results)))
    if base is row or not base.metric().keys() & row.metric().keys():
        return [*cells, "–"]
    mean, error = paired_difference(row, base)
    return [*cells, f"{100 * mean:+.2f} ± {100 * error:.2f}"]


def _published(row: PublishedRow | None, name: str) -> str:
    value = getattr(row, name, None)
    return "–" if value is None else f"{value:.1f}"


def _spread(row: Row, name: str) -> str:
    values = list(row.metric(name).values())
    if not values:
        return "–"
    mean, deviation = mean_and_spread(values)
    return f"{100 * mean:.2f} ± {100 * deviation:.2f}"


def write_measured(path: Path, table: str, rows: Sequence[Row], recipe: TrainConfig) -> None:
    """The table's numbers as JSON, and the plot next to it."""
    options = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in ("project", "name", "model", "device")}
    options["data"] = Path(recipe.data).name
    entries = []
    for row in rows:
        spread = {name: mean_and_spread(list(row.metric(name).values())) for name in METRICS if row.metric(name)}
        entries.append(
            {
                "group": row.system.group,
                "row": row.system.row,
                "system": row.system.name,
                "params": row.params,
                "gflops": row.gflops,
                "params_in_training": row.train_params,
                "published": _published_numbers(row.system.published),
                "mean": {name: mean for name, (mean, _) in spread.items()},
                "standard_deviation": {name: _or_none(deviation) for name, (_, deviation) in spread.items()},
                "cells": [{k: v for k, v in result.items() if k != "recipe"} for result in row.results],
            }
        )
    atomic_write(path, json.dumps({"table": table, "recipe": options, "rows": entries}, indent=1, ensure_ascii=False))
    plot(path.with_suffix(".png"), table, rows)


def _published_numbers(row: PublishedRow | None) -> dict[str, float]:
    names = ("parameters", "gflops", *METRICS)
    return {name: value for name in names if (value := getattr(row, name, None)) is not None}


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def plot(out: Path, table: str, rows: Sequence[Row]) -> None:
    """Every cell as a dot, the mean as a bar, the paper's AP (of COCO, another scale) as text; a panel a group."""
    groups = list(dict.fromkeys(row.system.group for row in rows))

    def paint(figure: Any) -> None:
        panels = figure.subplots(1, len(groups), squeeze=False, sharey=False)[0]
        for axes, group in zip(panels, groups, strict=True):
            own = [row for row in rows if row.system.group == group]
            for place, row in enumerate(own):
                values = [100 * v for v in row.metric().values()]
                if not values:
                    continue
                axes.plot([place] * len(values), values, "o", color=BLUE, alpha=0.75, markeredgewidth=0)
                axes.hlines(statistics.fmean(values), place - 0.3, place + 0.3, color=ORANGE, linewidth=2.5)
                if row.system.published is not None:
                    text, where = f"paper (COCO) {_published(row.system.published, 'ap')}", ("data", "axes fraction")
                    axes.annotate(text, (place, 1), xycoords=where, ha="center", va="top", color=FAINT)
            axes.set_xticks(range(len(own)), [row.system.row for row in own], color=INK)
            axes.set_xlim(-0.6, len(own) - 0.4)
            axes.margins(y=0.15)
            axes.set_title(group)
            axes.set_ylabel("AP after the last epoch, % (dots: seeds; bar: mean)")

    save_figure(out, (1.6 + 1.15 * len(rows), 4.2), paint)
