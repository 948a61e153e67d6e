"""The style of all plots, and saving them; without matplotlib's global state, so that any thread may plot."""

from __future__ import annotations

import functools
import io
import logging
import string
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from yolov9_fast._lazy import require
from yolov9_fast._text import printable
from yolov9_fast.atomic import atomic_write

BLUE, ORANGE, GREEN, VERMILION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
INK, FAINT = "#333333", "#9AA0A6"

log = logging.getLogger(__name__)

_FONT = "DejaVu Sans"
_LONGEST_LABEL = 30
_STYLE = {
    "font.family": _FONT,
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

    The format follows the suffix of `out` (png, svg, pdf, jpg). Characters that the style's font lacks are drawn in an
    installed font that has them; `paint` is then called a second time. Raises `UserError` when the file cannot be
    written.
    """
    matplotlib = require("matplotlib")
    out = Path(out)
    with matplotlib.rc_context(_STYLE):
        figure = _painted(size, paint)
        others = _fonts_for("".join(sorted(_missing(figure))))
        if others:
            matplotlib.rcParams["font.family"] = [_FONT, *others]
            figure = _painted(size, paint)
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # _fonts_for has said so
            figure.savefig(buffer, format=out.suffix.lstrip(".").lower() or "png")
    return atomic_write(out, buffer.getvalue())


def plain(text: str) -> str:
    """`text` as a label that matplotlib draws as given: no mathematics between dollar signs, no control characters."""
    return printable(text, _LONGEST_LABEL).replace("$", r"\$")


def _painted(size: tuple[float, float], paint: Callable[[Any], None]) -> Any:
    figure = require("matplotlib.figure").Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    paint(figure)
    return figure


def _missing(figure: Any) -> set[str]:
    """The characters of a figure's texts that the style's font lacks."""
    shown = set("".join(text.get_text() for text in figure.findobj(require("matplotlib.text").Text)))
    unusual = shown - set(string.printable)
    known = _characters(require("matplotlib.font_manager").findfont(_FONT)) if unusual else frozenset()
    return {character for character in unusual if ord(character) not in known}


@functools.cache
def _fonts_for(missing: str) -> tuple[str, ...]:
    """Names of installed fonts that have the characters; those that no font has are named in one warning."""
    chosen: list[str] = []
    left = set(missing)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it warns of every weight that a font lacks
    installed = require("matplotlib.font_manager").fontManager.ttflist if left else []
    files = {font.name: font.fname for font in installed if not font.name.startswith("Last Resort")}  # has boxes only
    for name in sorted(files):
        found = {character for character in left if ord(character) in _characters(files[name])}
        if found:
            chosen.append(name)
            left -= found
    if left:
        log.warning(f"plots: no installed font has {''.join(sorted(left))[:50]}; a Noto font of that script has")
    return tuple(chosen)


@functools.cache
def _characters(file: str) -> frozenset[int]:
    """Code points that a font file has; none if it cannot be read."""
    try:
        return frozenset(require("matplotlib.font_manager").get_font(file).get_charmap())
    except Exception:  # a damaged font file is no reason to stop
        return frozenset()


def write_empty(axes: Any, text: str) -> None:
    """Write `text` in the middle of axes without data."""
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color=FAINT)
