"""`yolov9-fast paper graph NAME`: a network with other blocks, depths or auxiliary branch, written as a graph file."""

from __future__ import annotations

import argparse

from yolov9_fast.atomic import atomic_write
from yolov9_fast.errors import UserError
from yolov9_fast.models import branch_names, graph_cost, load_graph
from yolov9_fast.models.pgi import with_auxiliary
from yolov9_fast.models.variants import gelan
from yolov9_fast.nn import block_names

_EPILOG = """examples:
  yolov9-fast paper graph gelan-s --block dark --depth 1 --auxiliary icn --out my.yaml
  yolov9-fast train --model my.yaml --data my-data.yaml
  yolov9-fast paper graph gelan-c --import my_blocks --block mine --auxiliary fpn,icn --out my.yaml"""


def configure(parser: argparse.ArgumentParser, target: str) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("network", metavar="NAME", help="network name or graph YAML")
    blocks = ", ".join(block_names())
    parser.add_argument(
        "--block", default="csp", metavar="NAME", help=f"block in every CSP-ELAN: {blocks}, module:Class"
    )
    parser.add_argument("--depth", type=int, metavar="N", help="depth of the block (D_CSP)")
    parser.add_argument("--elan-depth", type=int, metavar="N", help="stages of each ELAN (D_ELAN)")
    branches = ", ".join(branch_names())
    text = f"auxiliary branch, BACKBONE or BACKBONE,NECK: {branches}, module:function (default: the graph's own)"
    parser.add_argument("--auxiliary", metavar="NAME", help=text)
    parser.add_argument("--out", metavar="FILE.yaml", help="write it here (default: print it)")


def run(arguments: argparse.Namespace) -> int:
    try:
        graph = load_graph(arguments.network)
        if (arguments.block, arguments.depth, arguments.elan_depth) != ("csp", None, None):
            graph = gelan(graph, block=arguments.block, depth=arguments.depth, elan_depth=arguments.elan_depth)
        if arguments.auxiliary is not None:
            graph = with_auxiliary(graph, arguments.auxiliary)
        trained, deployed = graph_cost(graph, deployed=False, fused=False), graph_cost(graph)
    except ValueError as error:
        raise UserError(str(error)) from error
    costs = (
        f"80 classes, 640 px: {trained.parameters / 1e6:.2f} M parameters in training, deployed and fused "
        f"{deployed.parameters / 1e6:.2f} M and {deployed.gflops:.2f} GFLOPs"
    )
    if arguments.out:
        atomic_write(arguments.out, graph.as_yaml())
        print(f"{graph.name} in {arguments.out}; {costs}")
    else:
        print(f"# {costs}\n{graph.as_yaml()}", end="")
    return 0
