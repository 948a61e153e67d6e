"""Network graphs: read from YAML, checked, and cut down to the part that is deployed.

A graph is a list of layers `[from, block, arguments]`; a layer's place in the list is its index in the state dict
(`model.{i}.…`). The last layer is the head.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch.nn import Module

from yolov9_fast import nn as blocks
from yolov9_fast._lazy import require
from yolov9_fast.errors import UserError

GRAPH_FOLDER = Path(__file__).parent / "graphs"

_SIZED = {
    name: getattr(blocks, name)
    for name in ("Conv", "RepConv", "ELAN", "CSPELAN", "GELAN", "AConv", "ADown", "MPDown", "SPPELAN", "SPPCSPC")
}
_UNSIZED = {name: getattr(blocks, name) for name in ("Concat", "Upsample", "Silence", "CBLinear", "CBFuse")}
HEADS = {name: getattr(blocks, name) for name in ("DDetect", "DualDDetect", "AnchorDetect")}
BLOCKS = {**_SIZED, **_UNSIZED, **HEADS}
# Names that other implementations' graph files use for the same blocks.
ALIASES = {"ELAN1": "ELAN", "RepNCSPELAN4": "CSPELAN", "nn.Upsample": "Upsample"}
_MULTI_INPUT = ("Concat", "CBFuse", *HEADS)
ATTACHED = "+"
"""Between the name of a graph and the auxiliary branch attached to it: gelan-s+fpn, deployed as gelan-s."""


class GraphError(UserError):
    """A graph file that describes no network."""


@dataclass(frozen=True)
class Layer:
    """One layer: absolute indices of its inputs (−1 is the image), the block's name and its arguments."""

    sources: tuple[int, ...]
    block: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Graph:
    """A network: its name and its layers, the head last."""

    name: str
    layers: tuple[Layer, ...]

    @property
    def head(self) -> Layer:
        return self.layers[-1]

    @property
    def has_auxiliary(self) -> bool:
        return self.head.block == "DualDDetect"

    @property
    def main_sources(self) -> tuple[int, ...]:
        """Indices of the layers that the main branch's head reads: P3, P4, P5."""
        return self.head.sources[-3:]

    def reachable(self, targets: tuple[int, ...]) -> frozenset[int]:
        """Indices of the layers that `targets` depend on, themselves included."""
        found: set[int] = set()
        stack = list(targets)
        while stack:
            index = stack.pop()
            if index >= 0 and index not in found:
                found.add(index)
                stack.extend(self.layers[index].sources)
        return frozenset(found)

    def deploy(self) -> tuple[Graph, tuple[int, ...]]:
        """The graph without its auxiliary branch, and for each of its layers the index it had here.

        What only the auxiliary head reads is dropped; a `Silence` that then only feeds the next layer goes too.
        """
        if not self.has_auxiliary:
            return self, tuple(range(len(self.layers)))
        kept = sorted(self.reachable(self.main_sources))
        redirect: dict[int, int] = {}
        for index in list(kept):
            readers = [k for k in kept if index in self.layers[k].sources]
            if self.layers[index].block == "Silence" and len(readers) == 1 and index not in self.main_sources:
                redirect[index] = self.layers[index].sources[0]
                kept.remove(index)
        new_index = {old: new for new, old in enumerate(kept)} | {-1: -1}

        def moved(sources: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(new_index[redirect.get(s, s)] for s in sources)

        layers = [Layer(moved(self.layers[k].sources), self.layers[k].block, self.layers[k].arguments) for k in kept]
        layers.append(Layer(moved(self.main_sources), "DDetect", self.head.arguments))
        if self.name.startswith("yolov9"):
            name = self.name.replace("yolov9", "gelan")
        else:
            main, attached, _ = self.name.partition(ATTACHED)
            name = main if attached else f"{self.name}-deploy"
        return Graph(name, tuple(layers)), (*kept, len(self.layers) - 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain data that `graph_from_dict` reads back."""
        rows = [[list(layer.sources), layer.block, _plain(layer.arguments)] for layer in self.layers]
        return {"name": self.name, "absolute": True, "layers": rows}

    def as_yaml(self) -> str:
        """The text of a graph file, a layer a line, that `load_graph` reads back."""
        data = self.as_dict()
        rows = [f"  - {json.dumps(row)}  # {index}" for index, row in enumerate(data["layers"])]
        head = f"name: {json.dumps(self.name)}\nabsolute: true  # `from` counts from the first layer; -1 is the image"
        return "\n".join([head, "layers:", *rows, ""])


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value


def graph_from_dict(data: Any, origin: str) -> Graph:
    """Check plain data and make a `Graph` of it; `origin` names the file in errors."""
    if not isinstance(data, dict) or not isinstance(data.get("layers"), list) or not data["layers"]:
        raise GraphError(f"{origin}: a graph needs a list `layers`")
    absolute = bool(data.get("absolute", False))
    layers = []
    for index, row in enumerate(data["layers"]):
        where = f"{origin}: layer {index}"
        if not isinstance(row, list) or len(row) != 3:
            raise GraphError(f"{where}: expected [from, block, arguments], got {row!r}")
        source, block, arguments = row
        block = ALIASES.get(block, block)
        if block not in BLOCKS:
            raise GraphError(f"{where}: unknown block {block!r}; known are {', '.join(sorted(BLOCKS))}")
        sources = source if isinstance(source, list) else [source]
        if not all(isinstance(s, int) for s in sources) or not isinstance(arguments, list):
            raise GraphError(f"{where}: `from` must be layer indices and arguments a list, got {row!r}")
        resolved = tuple(s if absolute or s >= 0 else index + s for s in sources)
        if any(not -1 <= s < index for s in resolved):
            raise GraphError(f"{where}: reads layer {max(resolved)}, but only layers before it exist")
        if block not in _MULTI_INPUT and len(resolved) != 1:
            raise GraphError(f"{where}: {block} reads one layer, got {len(resolved)}")
        if (block in HEADS) != (index == len(data["layers"]) - 1):
            raise GraphError(f"{where}: the head ({' or '.join(HEADS)}) must be the last layer and no other")
        layers.append(Layer(resolved, block, _frozen(arguments)))
    graph = Graph(str(data.get("name") or Path(origin).stem), tuple(layers))
    expected = 6 if graph.has_auxiliary else 3
    if len(graph.head.sources) != expected:
        raise GraphError(f"{origin}: {graph.head.block} reads {expected} layers, got {len(graph.head.sources)}")
    return graph


def build_layer(layer: Layer, inputs: list[Any], head_options: dict[str, Any]) -> tuple[Module, Any]:
    """One layer over inputs of so many channels, and the channels it returns: a number, or a list for CBLinear."""
    block: Any = BLOCKS[layer.block]
    if layer.block in HEADS:
        return block(inputs, **_head_options(block, layer.arguments, head_options)), None
    if layer.block == "Concat":
        return block(), sum(inputs)
    if layer.block == "CBFuse":
        return block(*layer.arguments), inputs[-1]
    if layer.block in ("Upsample", "Silence"):
        return block(*layer.arguments), inputs[0]
    return block(inputs[0], *layer.arguments), _plain(layer.arguments[0])


def _head_options(head: Any, arguments: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any]:
    """The options given (not None), and for the others what the head's layer lists."""
    names = head.graph_arguments
    if len(arguments) > len(names):
        raise TypeError(f"it takes no arguments but {', '.join(names)}")
    listed = dict(zip(names, arguments, strict=False))
    return listed | {name: value for name, value in given.items() if value is not None}


def graph_names() -> list[str]:
    """Names of the networks that come with the package."""
    return sorted(path.stem for path in GRAPH_FOLDER.glob("*.yaml"))


@lru_cache(maxsize=64)
def _read(path: Path, modified: float) -> Graph:
    yaml = require("yaml")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise GraphError(f"{path}: not a YAML file: {error}") from error
    graph = graph_from_dict(data, str(path))
    for index, layer in enumerate(graph.layers):
        if layer.block == "GELAN" and len(layer.arguments) > 3:
            try:
                blocks.load_block(str(layer.arguments[3]))
            except ValueError as error:
                raise GraphError(f"{path}: layer {index}: {error}") from error
    return graph


def load_graph(name: str | Path) -> Graph:
    """Graph by name (`yolov9-c`) or from a YAML file; modules that its GELAN layers name by import path are imported.

    Raises:
        GraphError: unknown name, missing file, or a file that describes no network.
    """
    text = str(name)
    path = GRAPH_FOLDER / f"{text}.yaml"
    if text not in graph_names():
        path = Path(text)
        if path.suffix not in (".yaml", ".yml"):
            raise GraphError(
                f"unknown network {text!r}; known are {', '.join(graph_names())}, or a path to a graph YAML"
            )
        if not path.is_file():
            raise GraphError(f"no graph file {text}")
    return _read(path, path.stat().st_mtime)
