"""`paper recovery`: how much of a picture each architecture's features keep, by depth (section 3, as an experiment)."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import logging
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from yolov9_fast.errors import UserError
from yolov9_fast.paper import readout
from yolov9_fast.paper.files import add_out, figure_path, read_numbers, write_numbers
from yolov9_fast.paper.pictures import crops
from yolov9_fast.paper.readout import Settings
from yolov9_fast.paper.stacks import ACTIVATIONS, ARCHITECTURES, NORMALISATIONS, TITLES
from yolov9_fast.viz.figure import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, VERMILION, save_figure

log = logging.getLogger(__name__)
_EPILOG = """examples:
  yolov9-fast paper recovery                      scenes drawn by program, 405 networks
  yolov9-fast paper recovery photos/ --seeds 5
  yolov9-fast paper recovery --normalisations initial --double --out runs/paper/recovery_float64.png

Finished networks are stored in the JSON next to the figure; the same command continues where it stopped."""
QUICK = Settings(depths=(0, 5, 10), seeds=1, width=28, crop=24, train=3, test=2)
COLOURS = {"plainnet": INK, "resnet": ORANGE, "cspnet": GREEN, "elan": PURPLE, "gelan": BLUE}
_FLOOR = 1e-4
_SECONDS_BETWEEN_WRITES = 10
_YARDSTICKS = (3, 9, 33)
_NORMALISATION_TITLES = {
    "initial": "BatchNorm untrained\n(mean 0, variance 1)",
    "batch": "BatchNorm over\nthe crops' statistics",
    "none": "no BatchNorm,\nbiases",
}
# What the cells' numbers do not depend on: which of them are measured.
_LISTS = ("architectures", "depths", "normalisations", "seeds")


def configure(parser: argparse.ArgumentParser, target: str) -> None:
    parser.epilog = _EPILOG
    default = Settings()
    add = parser.add_argument
    add(
        "images", nargs="*", metavar="IMAGE|FOLDER", help="pictures to take crops of (default: scenes drawn by program)"
    )
    add("--quick", action="store_true", help="a few small networks, in seconds; other options still count")
    add("--architectures", nargs="+", choices=ARCHITECTURES, metavar="NAME", help=f"of {', '.join(ARCHITECTURES)}")
    add("--depths", nargs="+", type=int, metavar="N", help=f"convolution layers (default {_words(default.depths)})")
    add("--normalisations", nargs="+", choices=NORMALISATIONS, metavar="NAME", help=f"of {', '.join(NORMALISATIONS)}")
    add("--neighbourhoods", nargs="+", type=int, metavar="N", help="sides of the square of features read (default 1 3)")
    add("--activation", choices=tuple(ACTIVATIONS), help=f"default {default.activation}")
    add("--double", action="store_true", default=None, help="networks in float64: mixed or only rounded away?")
    add("--ridge", type=float, metavar="X", help=f"penalty of the readout (default {default.ridge:g})")
    for name, text in (
        ("seeds", "networks of each kind"),
        ("width", "channels"),
        ("crop", "side of a crop in pixels"),
        ("train", "crops to fit the readout on"),
        ("test", "crops to measure it on"),
    ):
        add(f"--{name}", type=int, metavar="N", help=f"{text} (default {getattr(default, name)})")
    add_out(parser, "recovery", "the numbers as .json")


def _words(values: tuple[int, ...]) -> str:
    return " ".join(map(str, values))


def run(arguments: argparse.Namespace) -> int:
    out = figure_path(arguments.out)
    settings = settings_from(arguments)
    images = crops(arguments.images, settings.train + settings.test, settings.crop)
    numbers = measure_all(settings, images, out.with_suffix(".json"), source=_source(arguments.images))
    draw(numbers, out)
    print(table(numbers))
    print(f"figure in {out}, numbers in {out.with_suffix('.json')}")
    return 0


def settings_from(arguments: argparse.Namespace) -> Settings:
    """The defaults, or those of `--quick`, with the options that were given."""
    base = QUICK if arguments.quick else Settings()
    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(Settings)}
    changes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    settings = dataclasses.replace(base, **changes)
    settings.check()
    return settings


def _source(images: list[str]) -> str:
    return "scenes drawn by program" if not images else f"{len(images)} files or folders given"


def measure_all(settings: Settings, images: Tensor, path: Path, *, source: str = "") -> dict[str, Any]:
    """Measure every network that `path` does not hold yet and keep it there, also when interrupted; all numbers.

    Raises:
        UserError: `path` holds the numbers of other crops or settings.
    """
    fixed = {k: v for k, v in settings.as_dict().items() if k not in _LISTS}
    fixed["crops_sha256"] = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    cells: dict[str, Any] = {}
    seconds = 0.0
    if path.is_file():
        before = read_numbers(path)
        differing = [k for k, v in fixed.items() if before.get("fixed", {}).get(k) != v]
        if differing:
            raise UserError(f"{path} holds an experiment with another {', '.join(differing)}; choose another --out")
        cells, seconds = before["cells"], before["seconds"]
    wanted = list(settings.cells())
    missing = [cell for cell in wanted if cell.key not in cells]
    log.info("%d networks, %d of them measured before", len(wanted), len(wanted) - len(missing))
    written = time.perf_counter()
    try:
        for count, cell in enumerate(missing, start=1):
            began = time.perf_counter()
            found = readout.measure(cell, images, settings)
            cells[cell.key] = {str(side): dataclasses.asdict(one) for side, one in found.items()}
            seconds += time.perf_counter() - began
            if time.perf_counter() - written > _SECONDS_BETWEEN_WRITES:
                written = time.perf_counter()
                log.info("%d of %d: %s", count, len(missing), cell.key)
                write_numbers(path, _numbers(settings, fixed, cells, seconds, images, source))
    finally:
        numbers = _numbers(settings, fixed, cells, seconds, images, source)
        write_numbers(path, numbers)
    return numbers


def _numbers(
    settings: Settings, fixed: dict[str, Any], cells: dict[str, Any], seconds: float, images: Tensor, source: str
) -> dict[str, Any]:
    return {
        "what": "1 − R² of a linear readout of each pixel's RGB, on held-out crops",
        "source": source,
        "settings": settings.as_dict(),
        "fixed": fixed,
        "seconds": round(seconds, 1),
        "blur_error": {str(side): readout.blur_error(images, settings.train, side) for side in _YARDSTICKS},
        "summary": readout.summary(cells, settings),
        "cells": cells,
    }


def table(numbers: dict[str, Any]) -> str:
    """Mean errors over the seeds: a block per normalisation and neighbourhood, a row per architecture."""
    settings = numbers["settings"]
    lines = []
    for normalisation in settings["normalisations"]:
        for side in settings["neighbourhoods"]:
            lines.append(f"normalisation {normalisation}, neighbourhood {side}×{side}: 1 − R² by depth")
            lines.append("".join(f"{word:>10}" for word in ("", *settings["depths"])))
            for architecture in settings["architectures"]:
                errors = (row["error"]["mean"] for row in _rows(numbers, architecture, normalisation, side))
                lines.append("".join((f"{TITLES[architecture]:>10}", *(f"{error:>10.4f}" for error in errors))))
            lines.append("")
    return "\n".join(lines)


def _rows(numbers: dict[str, Any], architecture: str, normalisation: str, side: int) -> list[dict[str, Any]]:
    wanted = (architecture, normalisation, side)
    return [r for r in numbers["summary"] if (r["architecture"], r["normalisation"], r["neighbourhood"]) == wanted]


def draw(numbers: dict[str, Any], out: Path) -> None:
    """A panel per normalisation and neighbourhood: mean over the seeds, and the band from the least to the largest."""
    settings = numbers["settings"]
    normalisations, sides = settings["normalisations"], settings["neighbourhoods"]

    def paint(figure: Any) -> None:
        grid = figure.subplots(len(sides), len(normalisations), sharex=True, sharey=True, squeeze=False)
        for axes_row, side in zip(grid, sides, strict=True):
            for axes, normalisation in zip(axes_row, normalisations, strict=True):
                _curves(axes, numbers, normalisation, side, named=normalisation == normalisations[0])
            axes_row[0].set_ylabel(f"1 − R², read from {side}×{side} features")
        for axes, normalisation in zip(grid[0], normalisations, strict=True):
            axes.set_title(_NORMALISATION_TITLES[normalisation], fontsize=10)
        for axes in grid[-1]:
            axes.set_xlabel("convolution layers")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.suptitle("What a linear readout recovers of a pixel's colour (0 all, 1 nothing)", fontweight="bold")

    save_figure(out, (1.6 + 3.3 * len(normalisations), 1.5 + 2.7 * len(sides)), paint)


def _curves(axes: Any, numbers: dict[str, Any], normalisation: str, side: int, *, named: bool) -> None:
    """Errors below 1e-4 are drawn there; `named`: say what the yardsticks are."""
    depths = numbers["settings"]["depths"]
    for architecture in numbers["settings"]["architectures"]:
        rows = _rows(numbers, architecture, normalisation, side)
        mean, low, high = ([max(r["error"][k], _FLOOR) for r in rows] for k in ("mean", "min", "max"))
        colour = COLOURS[architecture]
        shown = depths[: len(rows)]
        axes.fill_between(shown, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(shown, mean, "o-", color=colour, markersize=3.5, linewidth=1.6, label=TITLES[architecture])
    for size, error in numbers["blur_error"].items():
        axes.axhline(error, color=VERMILION, linewidth=0.8, linestyle=":", zorder=0)
        if named:
            axes.annotate(
                f"blur of {size} px", (1, error), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                fontsize=7, color=VERMILION,
            )  # fmt: skip
    axes.axhline(1, color=FAINT, linewidth=0.8, zorder=0)
    axes.set_yscale("log")
    axes.set_ylim(_FLOOR / 1.3, 2.0)
