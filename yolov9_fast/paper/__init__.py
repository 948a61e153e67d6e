"""The paper (arXiv 2402.13616), reproduced by command: its tables, figures and appendix, one room each.

`TARGETS` names what `yolov9-fast paper` can rebuild; each room has `configure(parser, target)` and `run(arguments)`,
where `arguments.target` is the name it was called by.
"""

from __future__ import annotations

from typing import NamedTuple


class Target(NamedTuple):
    """A table or figure: the room that rebuilds it, and one line on what it shows."""

    room: str
    text: str


TARGETS: dict[str, Target] = {
    "graph": Target("network", "a network with other blocks, depths or auxiliary branch, as a graph file to train"),
    "tables": Target("ablation", "tables 1 to 6: parameters and GFLOPs beside the published ones (--dry)"),
    "table1": Target("ablation", "GELAN and YOLOv9 of every size"),
    "table2": Target("ablation", "computational blocks in GELAN: Conv, Res, Dark, CSP, and your own"),
    "table3": Target("ablation", "ELAN depth and CSP depth"),
    "table4": Target("ablation", "auxiliary branches on backbone and neck: PFH, FPN, PAN, ICN, lead-head guided"),
    "table5": Target("ablation", "GELAN, deep supervision, PGI"),
    "table6": Target("ablation", "the chain from YOLOv7: anchor-free, GELAN, DHLC, PGI"),
}
