"""The style of all plots, and saving them; without matplotlib's global state, so that any thread may plot."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from yolov9_fast._lazy import require
from yolov9_fast.atomic import atomic_write

BLUE, ORANGE, GREEN, VERMILION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
INK, FAINT = "#333333", "#9AA0A6"

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E5E8",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "figure.dpi": 120,
}


def save_figure(out: str | Path, size: tuple[float, float], paint: Callable[[Any], None]) -> Path:
    """Make a figure of `size` inches, call `paint(figure)` and write it atomically.

    The format follows the suffix of `out` (png, svg, pdf, jpg). Raises `UserError` when it cannot be written.
    """
    matplotlib = require("matplotlib")
    figure_module = require("matplotlib.figure")
    out = Path(out)
    with matplotlib.rc_context(_STYLE):
        figure = figure_module.Figure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
        paint(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=out.suffix.lstrip(".").lower() or "png")
    return atomic_write(out, buffer.getvalue())


def write_empty(axes: Any, text: str) -> None:
    """Write `text` in the middle of axes without data."""
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color=FAINT)
