"""What the paper prints, read from the data files in `published/`: tables, the recipe, the network's configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from yolov9_fast._lazy import require
from yolov9_fast.errors import UserError

FOLDER = Path(__file__).parent / "published"
RECIPE = FOLDER / "recipe.yaml"


@dataclass(frozen=True)
class PublishedRow:
    """A row of Tables 1 to 6 or of appendix Table 3; None where the paper prints nothing.

    `parameters` in millions, `gflops` at 640 pixels, the APs in percent on COCO val. `variant` holds the columns that a
    table has of its own (`block`, `elan_depth`, `csp_depth`, `backbone`, `neck`, `supervision`, `step`).
    """

    name: str
    family: str = ""
    parameters: float | None = None
    gflops: float | None = None
    ap: float | None = None
    ap50: float | None = None
    ap75: float | None = None
    ap_small: float | None = None
    ap_medium: float | None = None
    ap_large: float | None = None
    variant: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PublishedLayer:
    """A layer of appendix Table 2: module, the layers it reads, filters, (stages, CSP depth)."""

    module: str
    route: tuple[int, ...]
    filters: tuple[int, ...]
    depth: tuple[int, ...]


@lru_cache
def table(name: str) -> tuple[PublishedRow, ...]:
    """`table1` … `table6` or `appendix_table3`, in the paper's order."""
    own = {f.name for f in fields(PublishedRow)}
    rows = []
    for row in _rows(name):
        known = {key: value for key, value in row.items() if key in own}
        variant = {key: value for key, value in row.items() if key not in own}
        rows.append(PublishedRow(**known, variant=variant))
    return tuple(rows)


@lru_cache
def network() -> tuple[PublishedLayer, ...]:
    """Appendix Table 2: YOLOv9-C as it is deployed."""
    return tuple(
        PublishedLayer(r["module"], tuple(r["route"]), tuple(r["filters"]), tuple(r["depth"])) for r in _rows("network")
    )


def _rows(name: str) -> list[dict[str, Any]]:
    data = require("yaml").safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]


SORTS = ("table", "params", "gflops", "ap")
_SORT_COLUMNS = {"params": "parameters", "gflops": "gflops", "ap": "ap"}


def comparison(sort: str = "table") -> list[PublishedRow]:
    """Appendix Table 3: all detectors compared; by parameters and by GFLOPs they are appendix Tables 4 and 5.

    `params` and `gflops` start with the smallest, `ap` with the best; rows without the number come last.
    """
    if sort not in SORTS:
        raise UserError(f"rows can be sorted by {', '.join(SORTS)}, not {sort!r}")
    rows = [*table("table1"), *table("appendix_table3")]
    if sort == "table":
        return rows
    column, sign = _SORT_COLUMNS[sort], -1 if sort == "ap" else 1

    def place(row: PublishedRow) -> tuple[bool, float]:
        value = getattr(row, column)
        return value is None, sign * (value or 0.0)

    return sorted(rows, key=place)


COLUMNS = {
    "parameters": "params M",
    "gflops": "GFLOPs",
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "APs",
    "ap_medium": "APm",
    "ap_large": "APl",
}


def text_table(rows: Sequence[PublishedRow]) -> str:
    """The rows as a table of text; – where nothing is printed."""
    width = max(len(row.name) for row in rows) + 2
    lines = ["".join((" " * width, *(f"{title:>10}" for title in COLUMNS.values())))]
    for row in rows:
        cells = (getattr(row, column) for column in COLUMNS)
        lines.append(f"{row.name:<{width}}" + "".join(f"{'–' if c is None else format(c, '.1f'):>10}" for c in cells))
    return "\n".join(lines)
