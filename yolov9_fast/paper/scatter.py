"""`paper fig1`, `paper fig5`: AP against parameters and GFLOPs, a line per family, your own results among them."""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yolov9_fast.atomic import atomic_write
from yolov9_fast.errors import UserError
from yolov9_fast.paper.files import add_out, figure_path, write_numbers
from yolov9_fast.paper.published import PublishedRow, comparison, table
from yolov9_fast.viz.figure import BLUE, INK, VERMILION, save_figure

_EPILOG = """examples:
  yolov9-fast paper {target}
  yolov9-fast paper {target} --mine my-detector:7.2:27.0:47.1 --mine my-larger:20.4:76.9:51.5
  yolov9-fast paper {target} --mine runs/train/exp/weights/best.safetensors:46.9 --out compare.svg

NAME:PARAMETERS_IN_MILLIONS:GFLOPS:AP, or WEIGHTS:AP, whose parameters and GFLOPs (640 pixels) are counted as deployed.
Results of one family, NAME-X, are joined by a line."""

# Colours of families: the paper's own stand out, the others are told apart by marker too.
_LOOK = {
    "YOLOv9": (VERMILION, "o", 2.6, 7.0),
    "GELAN": (BLUE, "o", 2.0, 5.5),
    "YOLOv5": ("#7B8794", "s", 1.2, 4.5),
    "YOLOv6": ("#B08D57", "D", 1.2, 4.5),
    "YOLOv7": ("#5B7C99", "^", 1.2, 5.0),
    "YOLOv7 AF": ("#3C9D8F", "^", 1.2, 5.0),
    "YOLOv8": ("#9B6FB0", "v", 1.2, 5.0),
    "DAMO YOLO": ("#6FA84F", "P", 1.2, 5.5),
    "Gold YOLO": ("#C9A227", "X", 1.2, 5.5),
    "YOLO MS": ("#56B4E9", "h", 1.2, 5.5),
    "RT-DETR": ("#CC79A7", "*", 1.2, 8.0),
    "RTMDet": ("#8C564B", "p", 1.2, 6.0),
    "PPYOLOE": ("#BCBD22", "<", 1.2, 5.5),
    "Dy-YOLOv7": ("#17A2A2", ">", 1.2, 5.5),
}
_PANELS = {
    "fig1": (("parameters", "parameters, millions"),),
    "fig5": (("parameters", "parameters, millions"), ("gflops", "GFLOPs at 640 pixels")),
}
_TITLES = {
    "fig1": "COCO val AP against size: detectors trained from scratch",
    "fig5": "COCO val AP against size and cost",
}
_NAMED = ("YOLOv9", "GELAN")
# GELAN is just below YOLOv9; a user's results are named above their stars.
_NAME_PLACES = {"YOLOv9": ((-4, 7), "right"), "GELAN": ((5, -11), "left")}
_MINE_COLOURS = (INK, "#E69F00", "#009E73", "#CC79A7")


def configure(parser: argparse.ArgumentParser, target: str) -> None:
    parser.epilog = _EPILOG.format(target=target)
    parser.add_argument(
        "--mine",
        action="append",
        default=[],
        metavar="NAME:PARAMS_M:GFLOPS:AP",
        help="your own result, or WEIGHTS:AP; may be repeated",
    )
    add_out(parser, target, "the numbers as .json and .csv")


def run(arguments: argparse.Namespace) -> int:
    out = figure_path(arguments.out)
    mine = [parse_result(text) for text in arguments.mine]
    # Figure 1 compares training from scratch: Table 1; Figure 5 adds the other settings of appendix Table 3.
    published = list(table("table1")) if arguments.target == "fig1" else comparison()
    rows = [{"source": "paper", **_plain(r)} for r in published] + [{"source": "mine", **_plain(r)} for r in mine]
    draw(arguments.target, published, mine, out)
    write_numbers(out.with_suffix(".json"), {"figure": arguments.target, "rows": rows})
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(out.with_suffix(".csv"), buffer.getvalue())
    print(f"figure in {out}, numbers in {out.with_suffix('.json')} and {out.with_suffix('.csv')}")
    return 0


def _plain(row: PublishedRow) -> dict[str, Any]:
    return {name: getattr(row, name) for name in ("name", "family", "parameters", "gflops", "ap")}


def parse_result(text: str) -> PublishedRow:
    """A result from the words of `--mine`: NAME:PARAMS_M:GFLOPS:AP, or WEIGHTS:AP.

    Raises:
        UserError: another form, a number that is none or cannot be, or weights that cannot be read.
    """
    parts = text.rsplit(":", 3)
    if len(parts) == 4 and parts[0]:
        parameters, gflops, ap = (_number(part, text) for part in parts[1:])
        return _checked(PublishedRow(parts[0], _family(parts[0]), parameters, gflops, ap), text)
    path, _, ap_text = text.rpartition(":")
    if path and Path(path).suffix and ":" not in path.removeprefix(Path(path).drive):
        return _checked(_counted(Path(path), _number(ap_text, text)), text)
    raise UserError(f"--mine: expected NAME:PARAMETERS_IN_MILLIONS:GFLOPS:AP or WEIGHTS:AP, got {text!r}")


def _number(word: str, text: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise UserError(f"--mine {text!r}: {word!r} is not a number") from None


def _checked(row: PublishedRow, text: str) -> PublishedRow:
    assert row.parameters is not None
    assert row.gflops is not None
    assert row.ap is not None
    if not (0 < row.parameters < math.inf and 0 < row.gflops < math.inf):
        raise UserError(f"--mine: expected positive parameters and GFLOPs, got {text!r}")
    if not 0 <= row.ap <= 100:
        raise UserError(f"--mine {text!r}: AP is in percent, 0 to 100")
    return row


def _family(name: str) -> str:
    """`my-detector` of `my-detector-s`: what stands before the last dash, where something does."""
    return name.rpartition("-")[0] or name


def _counted(path: Path, ap: float) -> PublishedRow:
    from yolov9_fast.models import fuse, load_checkpoint, to_deploy
    from yolov9_fast.models.profile import count_gflops, count_parameters

    model = load_checkpoint(path)
    model = to_deploy(model) if model.has_auxiliary else model
    model = model if model.is_fused else fuse(model)
    name = path.parent.parent.name if path.parent.name == "weights" else path.stem
    return PublishedRow(name or path.stem, name or path.stem, count_parameters(model) / 1e6, count_gflops(model), ap)


def draw(target: str, published: Sequence[PublishedRow], mine: Sequence[PublishedRow], out: Path) -> None:
    """A panel per measure of cost; the families of the paper named at their points."""
    panels = _PANELS[target]

    def paint(figure: Any) -> None:
        for axes, (column, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for family in _LOOK:
                _line(axes, [r for r in published if r.family == family], column, family)
            for number, family in enumerate(dict.fromkeys(r.family for r in mine)):
                rows = [r for r in mine if r.family == family]
                colour = _MINE_COLOURS[number % len(_MINE_COLOURS)]
                _points(axes, rows, column, family, (colour, "*", 2.0, 13.0), named=True)
            axes.set(xlabel=label, ylabel="AP, %")
            axes.margins(x=0.06)
        figure.axes[-1].legend(
            loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, title="family", alignment="left"
        )
        figure.suptitle(_TITLES[target], fontweight="bold", x=0.01, ha="left")

    save_figure(out, (1.8 + 6.4 * len(panels), 5.4), paint)


def _line(axes: Any, rows: Sequence[PublishedRow], column: str, family: str) -> None:
    _points(axes, rows, column, family, _LOOK[family], named=family in _NAMED)


def _points(
    axes: Any,
    rows: Sequence[PublishedRow],
    column: str,
    family: str,
    look: tuple[str, str, float, float],
    *,
    named: bool,
) -> None:
    points = sorted((getattr(r, column), r.ap, r.name) for r in rows if getattr(r, column) is not None)
    if not points:
        return
    colour, marker, width, size = look
    front = 3 if named else 2
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    axes.plot(
        xs, ys, marker=marker, color=colour, linewidth=width, markersize=size, markeredgecolor="white",
        markeredgewidth=0.6, label=family, zorder=front, alpha=1.0 if named else 0.85,
    )  # fmt: skip
    if not named:
        return
    for x, y, name in points:
        if " " in name and family in _NAMED:
            continue  # The variants of YOLOv9-E between its neighbours: no room for their names.
        place, side = _NAME_PLACES.get(family, ((0, 9), "center"))
        axes.annotate(
            name, (x, y), xytext=place, textcoords="offset points", ha=side, fontsize=8, color=colour,
            fontweight="bold", zorder=4,
        )  # fmt: skip
