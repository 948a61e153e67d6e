"""`paper comparison`, `paper recipe`, `paper network`: the appendix's tables, printed from the data files."""

from __future__ import annotations

import argparse

from yolov9_fast.atomic import atomic_write
from yolov9_fast.paper.published import RECIPE, SORTS, comparison, network, text_table

_EPILOG = {
    "comparison": """examples:
  yolov9-fast paper comparison                  appendix Table 3
  yolov9-fast paper comparison --sort params    appendix Table 4
  yolov9-fast paper comparison --sort gflops    appendix Table 5""",
    "recipe": """examples:
  yolov9-fast paper recipe
  yolov9-fast paper recipe --out recipe.yaml && yolov9-fast train --config recipe.yaml --data my.yaml""",
    "network": "",
}


def configure(parser: argparse.ArgumentParser, target: str) -> None:
    parser.epilog = _EPILOG[target]
    if target == "comparison":
        parser.add_argument("--sort", choices=SORTS, default="table", help="order of the rows (default %(default)s)")
    if target == "recipe":
        parser.add_argument("--out", metavar="FILE.yaml", help="write it there (default: print it)")


def run(arguments: argparse.Namespace) -> int:
    if arguments.target == "comparison":
        print(text_table(comparison(arguments.sort)))
    elif arguments.target == "recipe":
        text = RECIPE.read_text(encoding="utf-8")
        print(atomic_write(arguments.out, text) if arguments.out else text, end="\n" if arguments.out else "")
    else:
        print(network_table())
    return 0


def network_table() -> str:
    """Appendix Table 2 as text."""
    lines = [f"{'':>3} {'module':<10}{'route':<14}{'filters':<16}depth"]
    for index, layer in enumerate(network()):
        route, filters, depth = (", ".join(map(str, values)) for values in (layer.route, layer.filters, layer.depth))
        lines.append(f"{index:>3} {layer.module:<10}{route:<14}{filters:<16}{depth}")
    return "\n".join(lines)
