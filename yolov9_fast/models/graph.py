"""Network graphs: read from YAML, checked, and cut down to the part that is deployed.

A graph is a list of layers `[from, block, arguments]`; a layer's position in the list is its index in the state dict
(`model.{i}.…`). The last layer is the head. Blocks are those of `nn.registry`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from torch.nn import Module

from yolov9_fast._untrusted import absence, read_yaml, shown, user_path
from yolov9_fast.errors import UserError
from yolov9_fast.limits import above_limit, limit
from yolov9_fast.nn import BlockSpec, Head, block_names, find_block, load_block
from yolov9_fast.nn.registry import Channels, is_import_path

GRAPH_FOLDER = Path(__file__).parent / "graphs"

ALIASES = {"ELAN1": "ELAN", "RepNCSPELAN4": "CSPELAN", "nn.Upsample": "Upsample"}
"""Names that other implementations' graph files use for the same blocks."""
ATTACHED = "+"
"""Separates the name of a graph from the auxiliary branch attached to it: gelan-s+fpn, deployed as gelan-s."""


MAX_ARGUMENT = 1 << 20
"""The largest number that a block's argument may be: a width, a depth, a factor."""
_MAX_ARGUMENTS = 1000
_MAX_TEXT = 200


class GraphError(UserError):
    """A graph file that describes no network."""


@dataclass(frozen=True)
class Layer:
    """One layer: absolute indices of its inputs (−1 is the image), the block's name or import path, its arguments."""

    sources: tuple[int, ...]
    block: str
    arguments: tuple[Any, ...]

    @property
    def spec(self) -> BlockSpec:
        """What is known of the block.

        Raises:
            ValueError: it is not registered, or its module is not loaded.
        """
        return find_block(self.block)

    def __str__(self) -> str:
        return f"{self.block}{list(self.arguments)}"


@dataclass(frozen=True)
class Graph:
    """A network: its name and its layers, the head last."""

    name: str
    layers: tuple[Layer, ...]

    @property
    def head(self) -> Layer:
        return self.layers[-1]

    @property
    def head_class(self) -> type[Head]:
        return cast("type[Head]", self.head.spec.make)

    @property
    def has_auxiliary(self) -> bool:
        return self.head_class.deployed_form is not None

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

        Layers that only the auxiliary head reads are dropped, and so is a `Silence` that then has a single reader.
        """
        deployed_head = self.head_class.deployed_form
        if deployed_head is None:
            return self, tuple(range(len(self.layers)))
        kept = sorted(self.reachable(self.main_sources))
        redirect: dict[int, int] = {}
        for index in list(kept):
            readers = [k for k in kept if index in self.layers[k].sources]
            if self.layers[index].spec.role == "identity" and len(readers) == 1 and index not in self.main_sources:
                redirect[index] = self.layers[index].sources[0]
                kept.remove(index)
        new_index = {old: new for new, old in enumerate(kept)} | {-1: -1}

        def moved(sources: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(new_index[redirect.get(s, s)] for s in sources)

        layers = [Layer(moved(self.layers[k].sources), self.layers[k].block, self.layers[k].arguments) for k in kept]
        layers.append(Layer(moved(self.main_sources), deployed_head, self.head.arguments))
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
        """The text of a graph file, one layer per line, that `load_graph` reads back."""
        data = self.as_dict()
        rows = [f"  - {json.dumps(row)}  # {index}" for index, row in enumerate(data["layers"])]
        head = f"name: {json.dumps(self.name)}\nabsolute: true  # `from` counts from the first layer; -1 is the image"
        return "\n".join([head, "layers:", *rows, ""])


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value


def graph_from_dict(data: Any, origin: str, *, import_blocks: bool = False) -> Graph:
    """Check plain data and make a `Graph` of it.

    Args:
        data: `name` and `layers`, as in a graph file.
        origin: the file, for errors.
        import_blocks: import the modules that layers and their arguments name by import path.

    Raises:
        GraphError: it describes no network.
    """
    if not isinstance(data, dict) or not isinstance(data.get("layers"), list) or not data["layers"]:
        raise GraphError(f"{origin}: a graph needs a list `layers`")
    if len(data["layers"]) > limit("LAYERS"):
        raise GraphError(f"{origin}: {above_limit('LAYERS', len(data['layers']))}")
    absolute = data.get("absolute", False)
    if not isinstance(absolute, bool):
        raise GraphError(f"{origin}: absolute: expected true or false, got {shown(absolute)}")
    name = data.get("name") or Path(origin).stem
    if not isinstance(name, str) or len(name) > limit("CLASS_NAME"):
        raise GraphError(f"{origin}: name: expected a short text, got {shown(name)}")
    layers = []
    for index, row in enumerate(data["layers"]):
        where = f"{origin}: layer {index}"
        if not isinstance(row, list) or len(row) != 3:
            raise GraphError(f"{where}: expected [from, block, arguments], got {shown(row)}")
        source, block, arguments = row
        sources = source if isinstance(source, list) else [source]
        if not all(type(s) is int for s in sources) or not isinstance(arguments, list):
            raise GraphError(f"{where}: expected indices of layers and a list of arguments, got {shown(row)}")
        if not isinstance(block, str) or len(block) > _MAX_TEXT or len(sources) > limit("LAYERS"):
            raise GraphError(f"{where}: expected the name of a block and the layers that it reads, got {shown(row)}")
        block = ALIASES.get(block, block)
        _check_arguments(arguments, where)
        try:
            if import_blocks:
                for name in filter(is_import_path, [block, *arguments]):
                    load_block(name)
            spec = find_block(block)
        except ValueError as error:
            raise GraphError(f"{where}: {error}") from error
        resolved = tuple(s if absolute or s >= 0 else index + s for s in sources)
        if any(not -1 <= s < index for s in resolved):
            raise GraphError(f"{where}: reads layer {max(resolved)}, but only layers before it exist")
        if spec.inputs == "one" and len(resolved) != 1:
            raise GraphError(f"{where}: {block} reads one layer, got {len(resolved)}")
        if (spec.role == "head") != (index == len(data["layers"]) - 1):
            heads = " or ".join(block_names("head"))
            raise GraphError(f"{where}: the head ({heads}) must be the last layer and no other")
        layers.append(Layer(resolved, block, _frozen(arguments)))
    graph = Graph(name, tuple(layers))
    expected = graph.head_class.num_inputs
    if len(graph.head.sources) != expected:
        raise GraphError(f"{origin}: {graph.head.block} reads {expected} layers, got {len(graph.head.sources)}")
    return graph


def _check_arguments(arguments: list[Any], where: str) -> None:
    """Raise `GraphError` for arguments that are not numbers of a usable size, texts, or a few lists of these."""
    level, count = arguments, 0
    for _ in range(4):
        count += len(level)
        if count > _MAX_ARGUMENTS:
            raise GraphError(f"{where}: expected at most {_MAX_ARGUMENTS} arguments")
        for value in level:
            is_number = isinstance(value, int | float) and -MAX_ARGUMENT <= value <= MAX_ARGUMENT
            is_text = isinstance(value, str) and len(value) <= _MAX_TEXT
            if not (value is None or is_number or is_text or isinstance(value, list | tuple)):
                raise GraphError(
                    f"{where}: arguments: expected numbers up to {MAX_ARGUMENT:,}, texts and lists of them, "
                    f"got {shown(value)}"
                )
        level = [inner for value in level if isinstance(value, list | tuple) for inner in value]
    if level:
        raise GraphError(f"{where}: arguments: expected lists within one another up to 3 times")


def build_layer(layer: Layer, inputs: list[Any], head_options: dict[str, Any]) -> tuple[Module, Channels | None]:
    """One layer over inputs of so many channels, and the channels of its output; None for the head."""
    spec = layer.spec
    if spec.role != "head":
        return spec.build(inputs, layer.arguments)
    return spec.make(inputs, **_head_options(spec.make, layer.arguments, head_options)), None


def _head_options(head: Any, arguments: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any]:
    """The options given (not None), and for the others what the head's layer lists."""
    names = head.graph_arguments
    if len(arguments) > len(names):
        raise TypeError(f"it takes no arguments but {', '.join(names)}")
    listed = dict(zip(names, arguments, strict=False))
    return listed | {name: value for name, value in given.items() if value is not None}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the published networks that come with the package, as `create_model` takes them.

    Args:
        pattern: only names of this form, such as "yolov9-*".
    """
    return sorted(path.stem for path in GRAPH_FOLDER.glob("*.yaml") if fnmatchcase(path.stem, pattern))


@lru_cache(maxsize=64)
def _read(path: Path, modified: float) -> Graph:
    return graph_from_dict(read_yaml(path, "graph file", GraphError), str(path), import_blocks=True)


def load_graph(name: str | Path) -> Graph:
    """Graph by name (`yolov9-c`) or from a YAML file; blocks that the file names by import path are imported.

    Raises:
        GraphError: unknown name, missing file, or a file that describes no network.
    """
    text = str(name)
    path = GRAPH_FOLDER / f"{text}.yaml"
    if text not in list_models():
        path = user_path(name, "model", GraphError)
        if path.suffix not in (".yaml", ".yml"):
            raise GraphError(
                f"unknown network {shown(text)}; known are {', '.join(list_models())}, or a path to a graph YAML"
            )
        if not os.path.isfile(path):
            raise GraphError(f"graph file {path} {absence(path)}")
    return _read(path, path.stat().st_mtime)
