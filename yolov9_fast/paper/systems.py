"""The systems that the paper's tables compare, as graphs; each table is a list of rows over composable parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from yolov9_fast.models import Graph, attach, load_graph
from yolov9_fast.models.variants import gelan


@dataclass(frozen=True)
class System:
    """One row of a table.

    Attributes:
        group: what it is compared within: the size, or the chain.
        row: its name in the table.
        graph: the network as trained.
        options: options of `TrainConfig` that belong to the system (lead-head guided assignment).
        published: the paper's numbers by column (`params` in millions, `gflops`, `ap`, …); empty where it has none.
        untrainable: why it cannot be trained here; None where it can.
        exception: why its counts differ from the published ones; None where they may not.
    """

    group: str
    row: str
    graph: Graph
    options: dict[str, Any] = field(default_factory=dict)
    published: dict[str, float] = field(default_factory=dict)
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
    "–": ("none", "none", False),
    "PFH": ("pfh", "none", False),
    "FPN": ("fpn", "none", False),
    "PAN": ("pan", "none", False),
    "ICN": ("icn", "none", False),
    "LHG-ICN": ("icn", "none", True),
    "– / ICN": ("none", "icn", False),
    "FPN / ICN": ("fpn", "icn", False),
}
"""Table 4's rows: branch on the backbone, on the neck, lead-head guided."""
PUBLISHED_BRANCH_ROWS = {
    "c": ("–", "PFH", "FPN", "– / ICN", "FPN / ICN", "ICN", "LHG-ICN"),
    "e": ("–", "PFH", "FPN", "PAN", "FPN / ICN"),
}


def table2(sizes: Sequence[str] | None = None, blocks: Sequence[str] = ()) -> list[System]:
    """Computational blocks in GELAN-S, ELAN depth 2, block depth 1; and any others by name or import path."""
    rows = {"Conv": "conv", "Res": "res", "Dark": "dark", "CSP": "csp", **{block: block for block in blocks}}
    return [
        System(f"GELAN-{size.upper()}", row, gelan(f"gelan-{size}", block=block, depth=1, elan_depth=2))
        for size in sizes or ("s",)
        for row, block in rows.items()
    ]


def table3(sizes: Sequence[str] | None = None) -> list[System]:
    """ELAN depth and CSP depth in GELAN-S, -M and -C."""
    rows = {"c": ((1, 1), (2, 1), (2, 2), (3, 1), (2, 3))}
    return [
        System(f"GELAN-{size.upper()}", f"({e}, {d})", gelan(f"gelan-{size}", depth=d, elan_depth=e))
        for size in sizes or ("s", "m", "c")
        for e, d in rows.get(size, ((2, 1), (2, 2), (3, 1), (2, 3)))
    ]


def table4(sizes: Sequence[str] | None = None, rows: Sequence[str] | None = None) -> list[System]:
    """PGI on backbone and neck; for other sizes than the paper's C and E every row."""
    return [
        _branch(size, row)
        for size in sizes or ("c", "e")
        for row in rows or PUBLISHED_BRANCH_ROWS.get(size, tuple(BRANCH_ROWS))
    ]


def _branch(size: str, row: str) -> System:
    backbone, neck, guided = BRANCH_ROWS[row]
    graph = attach(load_graph(f"gelan-{size}"), backbone, neck=neck)
    return System(f"GELAN-{size.upper()}", row, graph, {"lead_head_guided": True} if guided else {})


def table5(sizes: Sequence[str] | None = None) -> list[System]:
    """GELAN, with deep supervision (heads on the backbone's levels), and with the published PGI."""
    return [
        System(f"GELAN-{size.upper()}", row, attach(load_graph(f"gelan-{size}"), branch))
        for size in sizes or ("s", "m", "c", "e")
        for row, branch in (("GELAN", "none"), ("+ DS", "pfh"), ("+ PGI", PGI[size]))
    ]


def table1(sizes: Sequence[str] | None = None) -> list[System]:
    """The paper's own rows of the comparison: GELAN and YOLOv9 of every size."""
    return [
        System(
            kind,
            f"{kind}-{size.upper()}",
            attach(load_graph(f"gelan-{size}"), "none" if kind == "GELAN" else PGI[size]),
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
}
