"""Programmable gradient information: auxiliary branches attached to any detector graph with levels of stride 8, 16, 32.

Paper, sections 4.1 and 5.4 (tables 4 and 5). A branch reads feature levels of the main branch and ends in three maps
A3, A4, A5, which an auxiliary head supervises while training; `Graph.deploy` takes it off again.

| name | what it adds |
| --- | --- |
| none | nothing: plain GELAN |
| pfh | nothing but the head, on the levels themselves (prediction from the feature hierarchy: deep supervision) |
| fpn | SPP-ELAN and a top-down path: multi-level auxiliary information (PGI of YOLOv9-T, -S and -E) |
| pan | the same and a bottom-up path |
| icn | an auxiliary reversible branch: a second backbone from the image (PGI of YOLOv9-M and -C), into which every |
|     | level is fused by DHLC links, CBLinear and CBFuse |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from yolov9_fast._lazy import import_callable
from yolov9_fast._untrusted import shown
from yolov9_fast.models.graph import ATTACHED, Graph, GraphError, Layer, build_layer, graph_from_dict
from yolov9_fast.nn import SPPELAN
from yolov9_fast.nn.registry import channels_of
from yolov9_fast.ops._boxes import STRIDES

_PROBE_SIZE = 128
"""Pixels of the image on which strides are found; nothing is computed, the tensors have no memory."""


class BranchBuilder:
    """A graph that grows: layers of the main branch first, then what `add` appends.

    Every layer is built and run without memory as it is added, so that one that does not fit is named at once.

    Attributes:
        main: the graph that the branch is attached to.
    """

    def __init__(self, graph: Graph) -> None:
        self.main = graph
        self.layers: list[Layer] = list(graph.layers[:-1])
        self._outputs: list[Any] = list(_outputs(graph))

    def add(self, block: str, source: int | Sequence[int], *arguments: Any) -> int:
        """Append a layer and return its index.

        Args:
            block: a block's name, as in graph files.
            source: index of the layer it reads (−1: the image); several for Concat and CBFuse.
            arguments: of the block, as in graph files: the output's channels first.

        Raises:
            GraphError: unknown block, or a layer that does not fit its input.
        """
        sources = (source,) if isinstance(source, int) else tuple(source)
        bad = [s for s in sources if not -1 <= s < len(self.layers)]
        if bad:
            raise GraphError(f"{block} reads layer {bad[0]}, of {len(self.layers)} layers")
        self._append(Layer(sources, block, arguments))
        return len(self.layers) - 1

    def channels(self, index: int) -> int:
        """Channels of a layer's map; of a CBLinear all of them together."""
        found = self._outputs[index] if index >= 0 else None
        return 3 if found is None else sum(m.shape[1] for m in found) if isinstance(found, list) else found.shape[1]

    def stride(self, index: int) -> int:
        """Pixels of the image per cell of a layer's map."""
        found = self._outputs[index] if index >= 0 else None
        first = found[0] if isinstance(found, list) else found
        return 1 if first is None else _PROBE_SIZE // int(first.shape[2])

    def _append(self, layer: Layer) -> None:
        self._outputs.append(_output(self.main.name, layer, len(self.layers), self._outputs))
        self.layers.append(layer)


@lru_cache(maxsize=64)
def _outputs(graph: Graph) -> tuple[Any, ...]:
    """What every layer but the head returns for a probe image; tensors without memory."""
    outputs: list[Any] = []
    for index, layer in enumerate(graph.layers[:-1]):
        outputs.append(_output(graph.name, layer, index, outputs))
    return tuple(outputs)


@torch.no_grad()
def _output(name: str, layer: Layer, index: int, outputs: Sequence[Any]) -> Any:
    with torch.device("meta"):
        inputs = [outputs[s] if s >= 0 else torch.empty(1, 3, _PROBE_SIZE, _PROBE_SIZE) for s in layer.sources]
        try:
            module, _ = build_layer(layer, [channels_of(x) for x in inputs], {})
            return module.eval()(inputs if layer.spec.inputs == "many" else inputs[0])
        except (TypeError, ValueError, RuntimeError, KeyError, AssertionError) as error:
            raise GraphError(f"{name}: layer {index}, {layer}: {error}") from error


Branch = Callable[[BranchBuilder, Sequence[int]], Sequence[int]]
"""`branch(builder, levels)` adds layers that read `levels` (strides 8, 16, 32); returns the indices of A3, A4, A5."""
_branches: dict[str, Branch] = {}


def branch_names() -> list[str]:
    """Names of the auxiliary branches known now, "none" first."""
    return ["none", *sorted(_branches)]


def register_branch(name: str) -> Callable[[Branch], Branch]:
    """Decorator that makes an auxiliary branch known by name.

    Raises:
        ValueError: a name that is no word, or is taken.
    """
    if not name.replace("_", "").replace("-", "").isalnum() or name in ("none", "default"):
        raise ValueError(f"name: expected letters, digits, _ or -, and not none or default; got {name!r}")

    def register(branch: Branch) -> Branch:
        known = _branches.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (branch.__module__, branch.__qualname__):
            raise ValueError(f"branch {name!r} is already registered")
        _branches[name] = branch
        return branch

    return register


def find_branch(name: str) -> Branch:
    """The branch of a name, or of an import path `module:function`, which is imported.

    Raises:
        ValueError: there is none.
    """
    if ":" in name:
        return import_callable(name)
    if name not in _branches:
        raise ValueError(
            f"unknown auxiliary branch {shown(name)}; known are {', '.join(branch_names())}, or a path module:function"
        )
    return _branches[name]


def backbone_levels(graph: Graph) -> tuple[int, int, int]:
    """Indices of the backbone's last layers of stride 8, 16 and 32.

    The backbone ends where the first Upsample or CBLinear stands (with two backbones: the first one counts, as in
    YOLOv9-E); pooling pyramids belong to the neck.

    Raises:
        GraphError: a stride is missing there.
    """
    return _backbone_levels(BranchBuilder(graph))


def _backbone_levels(builder: BranchBuilder) -> tuple[int, int, int]:
    layers = builder.main.layers[:-1]
    roles = [layer.spec.role for layer in layers]
    end = next((i for i, role in enumerate(roles) if role in ("upsample", "route")), len(layers))
    found = {builder.stride(i): i for i in range(end) if roles[i] != "pyramid"}
    missing = [stride for stride in STRIDES if stride not in found]
    if missing:
        raise GraphError(f"{builder.main.name}: its backbone has no level of stride {missing[0]}; name the levels")
    return found[8], found[16], found[32]


def attach(graph: Graph, backbone: str = "none", *, neck: str = "none", levels: Sequence[int] | None = None) -> Graph:
    """The graph with an auxiliary branch for training (table 4: G_backbone and G_neck).

    A branch on the neck reads the main branch's own P3, P4, P5. Where both are given the neck's one must be "icn": its
    links then come from the backbone branch's maps as well as from the neck, and its three maps are supervised.
    (The paper names the combination without drawing it; this is the reading that needs one auxiliary head.)

    Args:
        graph: with a single head; it stays as it is.
        backbone, neck: names of branches, or import paths `module:function`.
        levels: the backbone's layers of stride 8, 16 and 32 (None: `backbone_levels`).

    Raises:
        ValueError: an unknown branch, or two branches of which the neck's is not "icn".
        GraphError: the graph has an auxiliary branch already, its levels are not 8, 16, 32, or the branch does not fit.
    """
    if (backbone, neck) == ("none", "none"):
        return graph
    auxiliary_head = graph.head_class.auxiliary_form
    if auxiliary_head is None:
        raise GraphError(f"{graph.name}: head: expected DDetect for an auxiliary branch, got {graph.head.block}")
    if "none" not in (backbone, neck) and neck != "icn":
        raise ValueError(f"neck: expected 'icn' next to a branch on the backbone, got {neck!r}")
    builder = BranchBuilder(graph)
    _check_levels(builder, graph.main_sources, "its head")
    outputs: Sequence[int] = ()
    if backbone != "none":
        levels = tuple(levels) if levels is not None else _backbone_levels(builder)
        _check_levels(builder, levels, "levels")
        outputs = find_branch(backbone)(builder, levels)
        _check_levels(builder, outputs, f"branch {backbone!r}")
    if neck == "icn":
        outputs = _reversible(builder, (*outputs, *graph.main_sources), levels)
    elif neck != "none":
        outputs = find_branch(neck)(builder, graph.main_sources)
        _check_levels(builder, outputs, f"branch {neck!r}")
    head = Layer((*outputs, *graph.main_sources), auxiliary_head, graph.head.arguments)
    name = graph.name + ATTACHED + (backbone if neck == "none" else f"{backbone},{neck}")
    attached = Graph(name, (*builder.layers, head))
    return graph_from_dict(attached.as_dict(), name)


def with_auxiliary(graph: Graph, text: str | None) -> Graph:
    """The graph with another auxiliary branch than its own: "none", "BACKBONE" or "BACKBONE,NECK" (`attach`)."""
    backbone, _, neck = (text or "none").partition(",")
    return attach(graph.deploy()[0], backbone.strip(), neck=neck.strip() or "none")


def _check_levels(builder: BranchBuilder, levels: Sequence[int], what: str) -> None:
    if len(levels) != len(STRIDES) or any(not 0 <= i < len(builder.layers) for i in levels):
        raise GraphError(f"{builder.main.name}: {what}: expected three layers, got {list(levels)}")
    strides = tuple(builder.stride(i) for i in levels)
    if strides != STRIDES:
        raise GraphError(f"{builder.main.name}: {what}: expected strides {STRIDES}, got {strides}")


@register_branch("pfh")
def _feature_hierarchy(builder: BranchBuilder, levels: Sequence[int]) -> Sequence[int]:
    return levels


@register_branch("fpn")
def _feature_pyramid(builder: BranchBuilder, levels: Sequence[int]) -> Sequence[int]:
    level3, level4, level5 = levels
    a5 = _like(builder, _pooling(builder), level5)
    a4 = _like(builder, _joining(builder, 16), builder.add("Concat", (builder.add("Upsample", a5, 2), level4)))
    a3 = _like(builder, _joining(builder, 8), builder.add("Concat", (builder.add("Upsample", a4, 2), level3)))
    return a3, a4, a5


@register_branch("pan")
def _path_aggregation(builder: BranchBuilder, levels: Sequence[int]) -> Sequence[int]:
    a3, f4, f5 = _feature_pyramid(builder, levels)
    p3, p4, _ = builder.main.main_sources
    joined4 = builder.add("Concat", (_like(builder, _halving(builder, p3), a3), f4))
    a4 = _like(builder, _joining(builder, 16, upwards=True), joined4)
    joined5 = builder.add("Concat", (_like(builder, _halving(builder, p4), a4), f5))
    a5 = _like(builder, _joining(builder, 32, upwards=True), joined5)
    return a3, a4, a5


@register_branch("icn")
def _integrated_network(builder: BranchBuilder, levels: Sequence[int]) -> Sequence[int]:
    return _reversible(builder, levels, levels)


def _reversible(builder: BranchBuilder, links: Sequence[int], levels: Sequence[int] | None) -> tuple[int, int, int]:
    """A second backbone like the one up to `levels`; where it reaches stride 8, 16, 32 it takes every link of at least
    that stride."""
    levels = levels or _backbone_levels(builder)
    kept = sorted(builder.main.reachable(tuple(levels)))
    first = {stride: next(i for i in kept if builder.stride(i) == stride) for stride in STRIDES}
    widths = [builder.channels(first[stride]) for stride in STRIDES]
    routes = []
    for link in links:
        reached = [width for stride, width in zip(STRIDES, widths, strict=True) if stride <= builder.stride(link)]
        routes.append((builder.stride(link), builder.add("CBLinear", link, tuple(reached))))
    copy = {-1: -1}
    for index in kept:
        layer = builder.main.layers[index]
        if layer.spec.role == "identity":
            copy[index] = copy[layer.sources[0]]
            continue
        copy[index] = builder.add(layer.block, tuple(copy[s] for s in layer.sources), *layer.arguments)
        for level, stride in enumerate(STRIDES):
            if index == first[stride]:
                fused = [route for reach, route in routes if reach >= stride]
                copy[index] = builder.add("CBFuse", (*fused, copy[index]), (level,) * len(fused))
    a3, a4, a5 = (copy[i] for i in levels)
    return a3, a4, a5


def _like(builder: BranchBuilder, layer: Layer | int | tuple[str, tuple[Any, ...]], source: int) -> int:
    """Add a layer of the same block and arguments as another one of the main graph."""
    if isinstance(layer, int):
        layer = builder.main.layers[layer]
    block, arguments = layer if isinstance(layer, tuple) else (layer.block, layer.arguments)
    return builder.add(block, source, *arguments)


def _pooling(builder: BranchBuilder) -> Any:
    """The main graph's pooling pyramid; where it has none, a 1×1 to half of the deepest level."""
    for index, layer in enumerate(builder.main.layers[:-1]):
        if layer.spec.make is SPPELAN and builder.stride(index) == 32:
            return index
    return "Conv", (builder.channels(builder.main.main_sources[-1]), 1, 1)


def _joining(builder: BranchBuilder, stride: int, *, upwards: bool = False) -> Any:
    """The block by which the main graph's top-down path takes up a level: the first that reads a Concat there. Of its
    bottom-up path (`upwards`): the block that ends the level."""
    layers = builder.main.layers[:-1]
    end = builder.main.main_sources[STRIDES.index(stride)]
    for index in (end,) if upwards else range(len(layers)):
        layer = layers[index]
        joined = layer.sources[0] >= 0 and layers[layer.sources[0]].spec.role == "concat"
        if joined and layer.spec.role == "elan" and builder.stride(index) == stride:
            return index
    width = builder.channels(end) // 4 * 4 or 4
    return "CSPELAN", (width, width, width // 2, 1)


def _halving(builder: BranchBuilder, source: int) -> Any:
    """The layer by which the main graph's bottom-up path leaves `source`; where there is none, an average and 3×3."""
    for index, layer in enumerate(builder.main.layers[:-1]):
        if layer.sources == (source,) and builder.stride(index) == 2 * builder.stride(source):
            return index
    return "AConv", (builder.channels(source),)
