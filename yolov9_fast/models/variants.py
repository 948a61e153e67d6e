"""GELAN networks with other computational blocks and depths: tables 2 and 3 of the paper, for any graph."""

from __future__ import annotations

from pathlib import Path

from yolov9_fast.models.graph import Graph, GraphError, Layer, load_graph
from yolov9_fast.nn import CSPELAN, GELAN, load_block

_CSP = "csp"


def gelan(
    graph: str | Path | Graph, *, block: str = _CSP, depth: int | None = None, elan_depth: int | None = None
) -> Graph:
    """The graph with every CSP-ELAN built of another block, or to other depths.

    Widths do not change; neither do ELAN blocks of plain convolutions (the first one of -T and -S), as in the paper.

    Args:
        graph: a name (`gelan-s`), a graph file, or a graph.
        block: name or import path of a computational block (`nn.register_block`); "csp" is CSP-ELAN.
        depth: depth of the block (D_CSP); None keeps each layer's.
        elan_depth: stages of each ELAN (D_ELAN); None keeps each layer's.

    Raises:
        ValueError: an unknown block or a depth below 1.
        GraphError: the graph has no CSP-ELAN.
    """
    graph = graph if isinstance(graph, Graph) else load_graph(graph)
    for name, value in (("depth", depth), ("elan_depth", elan_depth)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    load_block(block)
    layers = tuple(_changed(layer, block, depth, elan_depth) for layer in graph.layers)
    if not any(layer.spec.make in (CSPELAN, GELAN) for layer in layers):
        raise GraphError(f"{graph.name} has no CSP-ELAN whose block could be exchanged")
    if layers == graph.layers:
        return graph
    marks = [block] if block != _CSP else []
    marks += [f"{letter}{value}" for letter, value in (("E", elan_depth), ("B", depth)) if value is not None]
    return Graph("-".join([graph.name, *marks]), layers)


def _changed(layer: Layer, block: str, depth: int | None, elan_depth: int | None) -> Layer:
    if layer.spec.make is CSPELAN:
        (out, split, stage), rest = layer.arguments[:3], layer.arguments[3:]
    elif layer.spec.make is GELAN:
        (out, split, stage), rest = layer.arguments[:3], layer.arguments[4:]
    else:
        return layer
    own_depth = rest[0] if rest else 1
    own_elan_depth = rest[1] if len(rest) > 1 else 2
    depths = (own_depth if depth is None else depth, own_elan_depth if elan_depth is None else elan_depth)
    if block != _CSP:
        return Layer(layer.sources, "GELAN", (out, split, stage, block, *depths))
    arguments = (out, split, stage, depths[0]) if depths[1] == 2 else (out, split, stage, *depths)
    return Layer(layer.sources, "CSPELAN", arguments)
