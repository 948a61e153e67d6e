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


TARGETS: dict[str, Target] = {}
