"""`yolov9-fast info`: the installation, the cost of networks, or what a weights file holds."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from yolov9_fast._text import printable
from yolov9_fast.cli.output import say
from yolov9_fast.errors import UserError
from yolov9_fast.models import Cost, list_models, network_costs

_EPILOG = """examples:
  yolov9-fast info                              versions, compiled operators, what is missing and what that costs
  yolov9-fast info --model yolov9-c             parameters and GFLOPs, in training and deployed, unfused and fused
  yolov9-fast info --model yolov9-t --class-tower 80
  yolov9-fast info --model all
  yolov9-fast info --weights best.safetensors   which network a file holds"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", metavar="NAME", help="network name, graph YAML, or `all`")
    what.add_argument("--weights", metavar="FILE", help="weights file of any known origin")
    add = parser.add_argument
    add("--num-classes", type=int, default=80, metavar="N", help="classes (default %(default)s)")
    add("--class-tower", type=int, metavar="N", help="width of the class branch (default: the published rule)")
    add("--box-groups", type=int, metavar="N", help="groups of the box branch (default: the graph's; 4 as published)")
    add("--imgsz", type=int, default=640, metavar="N", help="image size for GFLOPs (default %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    if arguments.weights:
        say(describe_weights(arguments.weights))
    elif arguments.model:
        names = sorted(list_models(), key=_by_size) if arguments.model == "all" else [arguments.model]
        say(cost_table(_costs(names, arguments)))
        say(
            f"{arguments.num_classes} classes; GFLOPs: 2 x multiply-adds of the convolutions for one image of "
            f"{arguments.imgsz} x {arguments.imgsz} pixels"
        )
    else:
        from yolov9_fast.info import environment_report

        say(environment_report())
    return 0


def _costs(names: Iterable[str], arguments: argparse.Namespace) -> list[tuple[str, Cost]]:
    try:
        return [
            (name, cost)
            for name in names
            for cost in network_costs(
                name,
                arguments.num_classes,
                class_tower=arguments.class_tower,
                box_groups=arguments.box_groups,
                image_size=arguments.imgsz,
            )
        ]
    except ValueError as error:
        raise UserError(str(error)) from error


def _by_size(name: str) -> tuple[int, int]:
    """The yolov9 networks before the gelan ones, small to large; then what else there is, by name."""
    family, _, size = name.partition("-")
    return {"yolov9": 0, "gelan": 1}.get(family, 2), "tsmce".find(size) if len(size) == 1 else 0


def cost_table(costs: Iterable[tuple[str, Cost]]) -> str:
    """Aligned text, a row for each (network, form)."""
    rows = [(name, c.form, c.graph, f"{c.parameters:,}", f"{c.gflops:.2f}") for name, c in costs]
    head = ("network", "form", "graph", "parameters", "GFLOPs")
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(w) if place > 2 else cell.ljust(w)
            for place, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def describe_weights(path: str) -> str:
    """What a weights file holds: origin, network, counts, class names."""
    from yolov9_fast.models.checkpoint import read_checkpoint

    content = read_checkpoint(path)
    numbers = sum(value.numel() for value in content.state.values())
    lines = [
        f"{path}: {content.architecture}",
        f"origin      {content.architecture.source}",
        f"tensors     {len(content.state)}, {numbers:,} numbers",
    ]
    if content.names:
        shown = [f"{index} {printable(name, 60)}" for index, name in content.names.items()]
        lines.append(f"classes     {', '.join(shown[:20])}{', …' if len(shown) > 20 else ''}")
    kept = {key: value for key, value in content.metadata.items() if isinstance(value, str | int | float)}
    kept.pop("yolov9_fast", None)
    lines.extend(f"{key:<12}{printable(value, 100)}" for key, value in kept.items())
    return "\n".join(lines)
