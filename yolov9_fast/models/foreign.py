"""Weights in files of any origin: read without running anything from them, and recognised by their graph.

Known are the whole-module pickles of WongKinYiu/yolov9 and Ultralytics, state dicts of MultimediaTechLab/YOLO (MIT),
Lightning checkpoints, `.npz` and `.safetensors`. What a file is, is read from its keys and shapes, never from its name.
"""

from __future__ import annotations

import copy
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from yolov9_fast._lazy import require
from yolov9_fast.errors import CheckpointError
from yolov9_fast.models.foreign_archive import restricted_load
from yolov9_fast.models.foreign_keys import official_keys
from yolov9_fast.models.graph import Graph, list_models, load_graph
from yolov9_fast.models.model import DetectionModel
from yolov9_fast.models.reparameterize import fuse
from yolov9_fast.models.restricted_pickle import Stub
from yolov9_fast.nn import Conv
from yolov9_fast.nn.heads import HeadOptions, Shapes

__all__ = ["Architecture", "identify", "read_state_dict", "restricted_load"]

_MAX_MODULE_DEPTH = 64
_MAX_MODULES = 100_000
_MAX_PLAIN_VALUES = 20_000
_METADATA = ("names", "nc", "yaml", "stride")


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
    state, metadata = read_file(path)
    numbers, source = official_state(state)
    return numbers, {"source": source, **metadata}


def official_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """`state` in official spelling as float32, and whose spelling it was."""
    renamed, source = official_keys(state)
    return {k: v.float() if v.is_floating_point() else v for k, v in renamed.items()}, source


def read_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and metadata of a file as they are; errors as `read_state_dict`."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path}")
    readers = {".npz": _read_npz, ".safetensors": read_safetensors}
    state, metadata = readers.get(path.suffix.lower(), _read_torch)(path)
    if not state:
        raise CheckpointError(f"{path} holds no weights")
    return state, metadata


def _read_npz(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: torch.from_numpy(np.array(archive[key])) for key in archive.files}, {}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a readable .npz file of plain arrays: {error}") from error


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a safetensors file, as they are.

    Raises:
        CheckpointError: missing, truncated or damaged.
    """
    safetensors = require("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    content = restricted_load(path)
    weights = _find_weights(content)
    if weights is None:
        keys = ", ".join(str(k) for k in list(content)[:8]) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path} holds no weights that can be found (it holds: {keys})")
    if isinstance(weights, dict):
        return weights, {}
    assert isinstance(weights.state, dict)
    metadata = {key: _plain(weights.state[key]) for key in _METADATA if _plain(weights.state.get(key)) is not None}
    try:
        return module_state(weights), {"class_path": weights.path, **metadata}
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _find_weights(content: Any, depth: int = 0) -> dict[str, Tensor] | Stub | None:
    """A state dict or a pickled module, sought under the keys where the projects keep it."""
    if depth > 4:
        return None
    if isinstance(content, Stub):
        state = content.state
        if not isinstance(state, dict):
            return None
        return content if "_modules" in state else _find_weights(state.get("ema"), depth + 1)
    if not isinstance(content, dict):
        return None
    for key in ("ema", "model", "state_dict", "model_state_dict"):
        value = content.get(key)
        found = None if value is None or isinstance(value, Tensor) else _find_weights(value, depth + 1)
        if found is not None:
            return found
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return tensors if tensors and 2 * len(tensors) > len(content) else None


def module_state(module: Stub) -> dict[str, Tensor]:
    """State dict of a pickled `nn.Module`: its parameters and persistent buffers by path.

    Raises:
        ValueError: modules nested without end.
    """
    result: dict[str, Tensor] = {}
    pending: list[tuple[str, Any, int]] = [("", module, 0)]
    visited = 0
    while pending:
        prefix, stub, depth = pending.pop()
        visited += 1
        if depth > _MAX_MODULE_DEPTH or visited > _MAX_MODULES:
            raise ValueError("its modules are nested without end")
        state = stub.state if isinstance(stub, Stub) and isinstance(stub.state, dict) else {}
        transient = state.get("_non_persistent_buffers_set") or ()
        for group in ("_parameters", "_buffers"):
            for name, value in _items(state.get(group)):
                if isinstance(value, Tensor) and not (group == "_buffers" and name in transient):
                    result[f"{prefix}{name}"] = value
        children = _items(state.get("_modules"))
        pending.extend((f"{prefix}{name}.", child, depth + 1) for name, child in reversed(children))
    return result


def _items(group: Any) -> list[tuple[Any, Any]]:
    return list(group.items()) if isinstance(group, dict) else []


def _plain(value: Any) -> Any:
    """`value` where it is plain data of reasonable size, small tensors as lists; None otherwise."""
    budget = [_MAX_PLAIN_VALUES]
    try:
        return _plain_within(value, budget)
    except RecursionError:
        return None


def _plain_within(value: Any, budget: list[int]) -> Any:
    budget[0] -= 1
    if budget[0] < 0:
        return None
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() <= 16 else None
    if isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple) and len(value) <= budget[0]:
        return [_plain_within(v, budget) for v in value]
    if isinstance(value, dict) and len(value) <= budget[0]:
        return {k: _plain_within(v, budget) for k, v in value.items() if isinstance(k, str | int)}
    return None


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
    if not any(re.match(r"model\.\d+\.", key) for key in shapes):
        first = next(iter(shapes), "nothing")
        raise CheckpointError(
            f"{origin} fits no known network: its first key is {first}, expected one such as model.0.conv.weight"
        )
    best: tuple[int, Architecture, str] | None = None
    for architecture in _candidates(shapes, source, graphs):
        wanted = _shapes(architecture)
        if wanted is None:
            continue
        if wanted == shapes:
            return architecture
        count = sum(shapes.get(k) != s for k, s in wanted.items()) + len(shapes.keys() - wanted.keys())
        if best is None or count < best[0]:
            best = count, architecture, first_difference(wanted, shapes)
    assert best is not None
    count, nearest, difference = best
    hint = ""
    if any(".cv3.0.0.0.conv." in key or ".cv3.0.0.1.conv." in key for key in shapes):
        hint = "; its class tower is depth-wise, as newer Ultralytics versions build it, which is not supported"
    raise CheckpointError(
        f"{origin} fits no known network; nearest is {nearest}: {difference} ({count} keys differ){hint}"
    )


def _candidates(shapes: Shapes, source: str, graphs: Iterable[Graph]) -> list[Architecture]:
    """An architecture for every known graph, options read from the head's shapes, the likeliest first."""
    known = [*graphs, *(load_graph(name) for name in list_models())]
    indices = [key.split(".")[1] for key in shapes if key.startswith("model.")]
    last = max((int(index) for index in indices if index.isdigit()), default=-1)
    fused = not any(key.endswith(".running_var") for key in shapes)
    heads = {graph: graph.head_class.read_options(shapes, f"model.{last}.") for graph in known}

    def with_options(graph: Graph) -> Architecture:
        options = heads[graph] or HeadOptions(80, None, None)
        dense = source == "official" and options.box_groups == 1 and graph.head.arguments != (1,)
        return Architecture("ultralytics" if dense else source, graph, *options, fused)

    # A head of another kind or at another index means other keys: such graphs are only named as the nearest one.
    likely = [graph for graph in known if heads[graph] is not None and len(graph.layers) == last + 1]
    ordered = sorted(likely or known, key=lambda graph: _stem_differences(graph, shapes))
    return [with_options(graph) for graph in ordered]


def _stem_differences(graph: Graph, shapes: Shapes) -> int:
    """Number of plain convolutions whose width is not the graph's: enough to try the right size first."""
    convolutions = [(i, layer.arguments[0]) for i, layer in enumerate(graph.layers) if layer.spec.make is Conv]
    return sum(shapes.get(f"model.{i}.conv.weight", ())[:1] != (width,) for i, width in convolutions)


def _shapes(architecture: Architecture) -> dict[str, tuple[int, ...]] | None:
    """Keys and shapes of the architecture's state dict; None where these options cannot be built."""
    try:
        return {key: tuple(value.shape) for key, value in _template(architecture).state_dict().items()}
    except ValueError:
        return None


def first_difference(wanted: Shapes, found: Shapes) -> str:
    for key, shape in wanted.items():
        if key not in found:
            return f"{key} is missing (expected {list(shape)})"
        if found[key] != shape:
            return f"{key} has shape {list(found[key])}, expected {list(shape)}"
    key = next(k for k in found if k not in wanted)
    return f"{key} is unexpected (shape {list(found[key])})"


def parse_names(value: Any, num_classes: int) -> dict[int, str] | None:
    """Class names from a list or a mapping, or from JSON text; None unless there is one for every class."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return None
    try:
        names = {int(k): str(v) for k, v in value.items()}
    except (TypeError, ValueError):
        return None
    return names if sorted(names) == list(range(num_classes)) else None
