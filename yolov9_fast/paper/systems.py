"""The systems that the paper's tables compare, as graphs; each table is a list of rows over composable parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from yolov9_fast.models import Graph, attach, load_graph
from yolov9_fast.models.variants import gelan
from yolov9_fast.paper import published
from yolov9_fast.paper.published import PublishedRow


@dataclass(frozen=True)
class System:
    """One row of a table.

    Attributes:
        group: what it is compared within: the size, or the chain.
        row: its name in the table.
        graph: the network as trained.
        options: options of `TrainConfig` that belong to the system (lead-head guided assignment).
        published: the paper's row; None where it has none.
        untrainable: why it cannot be trained here; None where it can.
        exception: why its counts differ from the published ones; None where they may not.
    """

    group: str
    row: str
    graph: Graph
    options: dict[str, Any] = field(default_factory=dict)
    published: PublishedRow | None = None
    untrainable: str | None = None
    exception: str | None = None

    @property
    def name(self) -> str:
        """Short, unique and fit for a folder."""
        guided = "-lhg" if self.options.get("lead_head_guided") else ""
        return self.graph.name.replace(",", "_").replace(":", "_") + guided


PGI = {"t": "fpn", "s": "fpn", "m": "icn", "c": "icn", "e": "fpn"}
"""The auxiliary branch of each published YOLOv9."""
BRANCH_ROWS = {
    "none": ("–", "none", "none", False),
    "pfh": ("PFH", "pfh", "none", False),
    "fpn": ("FPN", "fpn", "none", False),
    "pan": ("PAN", "pan", "none", False),
    "icn": ("ICN", "icn", "none", False),
    "lhg-icn": ("LHG-ICN", "icn", "none", True),
    "none,icn": ("– / ICN", "none", "icn", False),
    "fpn,icn": ("FPN / ICN", "fpn", "icn", False),
}
"""Table 4's rows: name in the table, branch on the backbone, on the neck, lead-head guided."""
PUBLISHED_BRANCH_ROWS = {
    "c": ("none", "pfh", "fpn", "none,icn", "fpn,icn", "icn", "lhg-icn"),
    "e": ("none", "pfh", "fpn", "pan", "fpn,icn"),
}


def _published(table: str, name: str, **variant: Any) -> PublishedRow | None:
    """The row of one of the paper's tables; None where it has no such row."""
    rows = (row for row in published.table(table) if row.name == name)
    return next((row for row in rows if all(row.variant[key] == value for key, value in variant.items())), None)


def _group(size: str) -> str:
    return f"GELAN-{size.upper()}"


def table2(sizes: Sequence[str] | None = None, blocks: Sequence[str] = ()) -> list[System]:
    """Computational blocks in GELAN-S, ELAN depth 2, block depth 1; and any others by name or import path."""
    rows = {"Conv": "conv", "Res": "res", "Dark": "dark", "CSP": "csp", **{block: block for block in blocks}}
    return [
        System(
            _group(size),
            row,
            gelan(f"gelan-{size}", block=block, depth=1, elan_depth=2),
            published=_published("table2", _group(size), block=row),
        )
        for size in sizes or ("s",)
        for row, block in rows.items()
    ]


def table3(sizes: Sequence[str] | None = None) -> list[System]:
    """ELAN depth and CSP depth in GELAN-S, -M and -C."""
    rows = {"c": ((1, 1), (2, 1), (2, 2), (3, 1), (2, 3))}
    return [
        System(
            _group(size),
            f"({e}, {d})",
            gelan(f"gelan-{size}", depth=d, elan_depth=e),
            published=_published("table3", _group(size), elan_depth=e, csp_depth=d),
        )
        for size in sizes or ("s", "m", "c")
        for e, d in rows.get(size, ((2, 1), (2, 2), (3, 1), (2, 3)))
    ]


def table4(sizes: Sequence[str] | None = None, rows: Sequence[str] | None = None) -> list[System]:
    """PGI on backbone and neck; for other sizes than the paper's C and E every row."""
    return [
        _branch(size, key)
        for size in sizes or ("c", "e")
        for key in rows or PUBLISHED_BRANCH_ROWS.get(size, tuple(BRANCH_ROWS))
    ]


def _branch(size: str, key: str) -> System:
    row, backbone, neck, guided = BRANCH_ROWS[key]
    graph = attach(load_graph(f"gelan-{size}"), backbone, neck=neck)
    left, _, right = row.partition(" / ")
    names = {"backbone": None if left == "–" else left, "neck": right or None}
    options = {"lead_head_guided": True} if guided else {}
    return System(_group(size), row, graph, options, _published("table4", _group(size), **names))


def table5(sizes: Sequence[str] | None = None) -> list[System]:
    """GELAN, with deep supervision (heads on the backbone's levels), and with the published PGI."""
    return [
        System(
            _group(size),
            row,
            attach(load_graph(f"gelan-{size}"), branch),
            published=_published("table5", _group(size), supervision=supervision),
        )
        for size in sizes or ("s", "m", "c", "e")
        for row, supervision, branch in (
            ("GELAN", None, "none"),
            ("+ DS", "DS", "pfh"),
            ("+ PGI", "PGI", PGI[size]),
        )
    ]


def table6(sizes: Sequence[str] | None = None) -> list[System]:
    """From YOLOv7 to YOLOv9-E: anchor-free, GELAN, dual backbones with DHLC links, PGI. It has one size."""
    anchors = "its loss is that of anchor boxes, which this library does not have"
    biases = "the published number counts every bias as a multiply-add (so counted: 104.7)"
    chain = [
        (None, load_graph("yolov7"), anchors),
        ("AF", load_graph("yolov7-af"), None),
        ("GELAN", load_graph("yolov7-af-gelan"), None),
        ("DHLC", load_graph("gelan-e"), None),
        ("PGI", attach(load_graph("gelan-e"), PGI["e"]), None),
    ]
    return [
        System(
            "chain",
            "YOLOv7" if step is None else f"+ {step}",
            graph,
            published=_published("table6", "YOLOv7", step=step),
            untrainable=reason,
            exception=biases if step is None else None,
        )
        for step, graph, reason in chain
    ]


def table1(sizes: Sequence[str] | None = None) -> list[System]:
    """The paper's own rows of the comparison: GELAN and YOLOv9 of every size."""
    return [
        System(
            kind,
            f"{kind}-{size.upper()}",
            attach(load_graph(f"gelan-{size}"), "none" if kind == "GELAN" else PGI[size]),
            published=_published("table1", f"{kind}-{size.upper()}"),
        )
        for kind in ("GELAN", "YOLOv9")
        for size in sizes or ("s", "m", "c", "e")
    ]


TABLES: dict[str, Callable[..., list[System]]] = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "table4": table4,
    "table5": table5,
    "table6": table6,
}
