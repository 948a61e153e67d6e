"""Weights in files of any origin: read without running anything from them, and recognised by their graph.

Known are the whole-module pickles of WongKinYiu/yolov9 and Ultralytics, state dicts of MultimediaTechLab/YOLO (MIT),
Lightning checkpoints, `.npz` and `.safetensors`. What a file is, is read from its keys and shapes, never from its name.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yolov9_fast._text import printable
from yolov9_fast._untrusted import user_path
from yolov9_fast.errors import CheckpointError
from yolov9_fast.limits import above_limit, limit
from yolov9_fast.models.array_files import read_npz, read_safetensors
from yolov9_fast.models.foreign_archive import restricted_load
from yolov9_fast.models.foreign_keys import layer_index, official_keys
from yolov9_fast.models.foreign_modules import MAX_KEY, ModuleContent, read_torch
from yolov9_fast.models.graph import Graph, GraphError, list_models, load_graph
from yolov9_fast.models.model import DetectionModel
from yolov9_fast.models.reparameterize import fuse
from yolov9_fast.nn import Conv
from yolov9_fast.nn.heads import HeadOptions, Shapes

__all__ = ["Architecture", "identify", "read_state_dict", "restricted_load"]

_NAMED_AS_NEAREST = 2
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPES = (*_FLOATS, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


@dataclass(frozen=True)
class Architecture:
    """The network that a state dict belongs to.

    Attributes:
        source: whose spelling or form it is: "official", "mit" or "ultralytics" (dense box towers).
        graph: the network's layers.
        num_classes: of the class convolutions.
        class_tower: width of the main branch's class tower (None: the published rule, or an anchor-based head).
        box_groups: groups of the box tower's convolutions (None: the graph's own, or an anchor-based head).
        fused: BatchNorm and RepConv are folded.
    """

    source: str
    graph: Graph
    num_classes: int
    class_tower: int | None
    box_groups: int | None
    fused: bool

    @property
    def graph_name(self) -> str:
        return self.graph.name

    def build(self) -> DetectionModel:
        """The network without numbers (on the meta device), to be loaded with `assign=True`."""
        return copy.deepcopy(_template(self))

    def __str__(self) -> str:
        form = "fused" if self.fused else "not fused"
        if self.box_groups is None:
            return f"{self.graph_name} ({self.num_classes} classes, {self.graph.head.block}, {form})"
        return (
            f"{self.graph_name} ({self.num_classes} classes, class tower {self.class_tower or 'as published'}, "
            f"box groups {self.box_groups}, {form})"
        )


@lru_cache(maxsize=16)
def _template(architecture: Architecture) -> DetectionModel:
    with torch.device("meta"):
        model = DetectionModel(
            architecture.graph,
            architecture.num_classes,
            class_tower=architecture.class_tower,
            box_groups=architecture.box_groups,
        )
        return fuse(model) if architecture.fused else model


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of a file, keys in official spelling, floating-point numbers as float32 on the CPU.

    Of a training file the averaged weights (`ema`) are taken before `model`.

    Args:
        path: `.pt`, `.pth`, `.ckpt`, `.npz` or `.safetensors`.

    Returns:
        The state dict, and what the file says about it: `source`, and where present as plain data `names`, `nc`,
        `yaml`, `stride`, `class_path`; for safetensors its metadata.

    Raises:
        CheckpointError: missing, damaged, of another kind, or without weights.
    """
    content, metadata = read_file(path)
    numbers, source = official_state(content.state)
    return numbers, {"source": source, **metadata}


def official_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """`state` in official spelling as float32, and whose spelling it was."""
    renamed, source = official_keys(state)
    return as_float32(renamed), source


def as_float32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point numbers as float32, others as they are."""
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def read_file(path: str | Path) -> tuple[ModuleContent, dict[str, Any]]:
    """Weights and metadata of a file as they are; errors as `read_state_dict`."""
    path = user_path(path, "checkpoint", CheckpointError)
    if path.suffix.lower() in (".npz", ".safetensors"):
        state, metadata = (read_npz if path.suffix.lower() == ".npz" else read_safetensors)(path)
        content = ModuleContent(state)
    else:
        content, metadata = read_torch(path)
    if not content.state:
        raise CheckpointError(f"{path} holds no weights")
    for key, value in content.state.items():
        if len(key) > MAX_KEY:
            raise CheckpointError(f"{path}: expected names of at most {MAX_KEY} characters, got {printable(key, 100)}")
        if value.dtype not in _DTYPES:
            raise CheckpointError(f"{path}: {printable(key, 100)}: expected floats or integers, got {value.dtype}")
    return content, metadata


def identify(
    state: Mapping[str, Tensor],
    *,
    source: str = "official",
    graphs: Iterable[Graph] = (),
    origin: str = "the state dict",
) -> Architecture:
    """Recognise the network of a state dict in official spelling by its keys and shapes.

    Args:
        state: from `read_state_dict`.
        source: whose spelling it was, for the record.
        graphs: networks to consider besides the published ten.
        origin: the file, for the error.

    Raises:
        CheckpointError: no network fits; names the nearest one and the first key that differs.
    """
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    if not any(layer_index(key.removeprefix("model.")) >= 0 for key in shapes if key.startswith("model.")):
        first = printable(next(iter(shapes), "nothing"), 100)
        raise CheckpointError(
            f"{origin} fits no known network: its first key is {first}, expected one such as model.0.conv.weight"
        )
    best: tuple[int, Architecture, str] | None = None
    for architecture in _candidates(shapes, source, graphs, origin):
        wanted = _shapes(architecture)
        if wanted is None:
            continue
        if wanted == shapes:
            return architecture
        count = sum(shapes.get(k) != s for k, s in wanted.items()) + len(shapes.keys() - wanted.keys())
        if best is None or count < best[0]:
            best = count, architecture, first_difference(wanted, shapes)
    if best is None:
        raise CheckpointError(f"{origin} fits no known network: its head has a shape that no head has")
    count, nearest, difference = best
    hint = ""
    if any(".cv3.0.0.0.conv." in key or ".cv3.0.0.1.conv." in key for key in shapes):
        hint = "; its class tower is depth-wise, as newer Ultralytics versions build it, which is not supported"
    raise CheckpointError(
        f"{origin} fits no known network; nearest is {nearest}: {difference} ({count} keys differ){hint}"
    )


def _candidates(shapes: Shapes, source: str, graphs: Iterable[Graph], origin: str) -> list[Architecture]:
    """An architecture for every known graph, options read from the head's shapes, the likeliest first."""
    known = [*graphs, *(load_graph(name) for name in list_models())]
    last = max(layer_index(key.removeprefix("model.")) for key in shapes if key.startswith("model."))
    fused = not any(key.endswith(".running_var") for key in shapes)
    heads = {graph: graph.head_class.read_options(shapes, f"model.{last}.") for graph in known}

    def with_options(graph: Graph) -> Architecture:
        options = heads[graph] or HeadOptions(80, None, None)
        if options.num_classes > limit("CLASSES"):
            raise CheckpointError(f"{origin}: {above_limit('CLASSES', options.num_classes)}")
        dense = source == "official" and options.box_groups == 1 and graph.head.arguments != (1,)
        return Architecture("ultralytics" if dense else source, graph, *options, fused)

    # A head of another kind or at another index means other keys: such graphs are only named as the nearest one, and of
    # those only some are built, which takes time.
    likely = [graph for graph in known if heads[graph] is not None and len(graph.layers) == last + 1]
    ordered = sorted(likely or known, key=lambda graph: _stem_differences(graph, shapes))
    return [with_options(graph) for graph in (ordered if likely else ordered[:_NAMED_AS_NEAREST])]


def _stem_differences(graph: Graph, shapes: Shapes) -> int:
    """Number of plain convolutions whose width is not the graph's: enough to try the right size first."""
    convolutions = [(i, layer.arguments[0]) for i, layer in enumerate(graph.layers) if layer.spec.make is Conv]
    return sum(shapes.get(f"model.{i}.conv.weight", ())[:1] != (width,) for i, width in convolutions)


def _shapes(architecture: Architecture) -> dict[str, tuple[int, ...]] | None:
    """Keys and shapes of the architecture's state dict; None where these options cannot be built."""
    try:
        return {key: tuple(value.shape) for key, value in _template(architecture).state_dict().items()}
    except (ValueError, GraphError):
        return None


def first_difference(wanted: Shapes, found: Shapes) -> str:
    """The first key that two state dicts do not share, or not in the same shape."""
    return printable(_first_difference(wanted, found), 300)


def _first_difference(wanted: Shapes, found: Shapes) -> str:
    for key, shape in wanted.items():
        if key not in found:
            return f"{key} is missing (expected {list(shape)})"
        if found[key] != shape:
            return f"{key} has shape {list(found[key])}, expected {list(shape)}"
    key = next(k for k in found if k not in wanted)
    return f"{key} is unexpected (shape {list(found[key])})"


def parse_names(value: Any, num_classes: int) -> dict[int, str] | None:
    """Class names from a list or a mapping, or from JSON text; None unless there is one for every class.

    Raises:
        ValueError: a name of more than `limit("CLASS_NAME")` characters.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or len(value) != num_classes:
        return None
    names = {}
    for key, name in value.items():
        index = int(key) if isinstance(key, str) and re.fullmatch(r"[0-9]{1,9}", key) else key
        if not isinstance(index, int) or not isinstance(name, str | int):
            return None
        if isinstance(name, str) and len(name) > limit("CLASS_NAME"):
            raise ValueError(f"the name of class {index}: {above_limit('CLASS_NAME', len(name))}")
        names[int(index)] = str(name)
    return names if sorted(names) == list(range(num_classes)) else None
