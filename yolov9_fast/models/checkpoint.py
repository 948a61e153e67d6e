"""Weights in files: ours (safetensors with their graph) written and read back exactly, foreign ones recognised."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yolov9_fast._lazy import require
from yolov9_fast.atomic import atomic_write
from yolov9_fast.errors import CheckpointError, UserError
from yolov9_fast.models import reparameterize
from yolov9_fast.models.foreign import Architecture, first_difference, identify, official_state, parse_names, read_file
from yolov9_fast.models.graph import Graph, GraphError, graph_from_dict
from yolov9_fast.models.model import DetectionModel

FORMAT_VERSION = 1
_METADATA_KEY = "yolov9_fast"

logger = logging.getLogger(__name__)


def load_checkpoint(path: str | Path, *, device: str | torch.device = "cpu") -> DetectionModel:
    """The network that a file holds, with its weights, in evaluation mode.

    Takes our own files, and any of WongKinYiu/yolov9, MultimediaTechLab/YOLO (MIT) and Ultralytics: whole pickled
    modules, state dicts, `.npz`, `.safetensors`. Nothing in the file is executed. A training graph gives a yolov9-X
    network with its auxiliary branch, a converted one gelan-X, a fused state dict a fused network.

    Args:
        path: the file.
        device: where the network goes.

    Raises:
        CheckpointError: missing or damaged file, or one that fits no known network; names the first key that differs.
    """
    content = read_checkpoint(path)
    model = content.build()
    for name, parameter in model.named_parameters():
        if not math.isfinite(parameter.sum().item()):
            logger.warning("%s: %s holds numbers that are not finite", path, name)
            break
    return model.to(device).eval()


def suggest_architecture(path: str | Path) -> Architecture:
    """The network in a file, for building one that its weights fit: graph, class count, tower width, box groups.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    return read_checkpoint(path).architecture


def save_weights(model: DetectionModel, path: str | Path, *, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write the model's weights and all that is needed to build it again as safetensors, whole or not at all.

    Args:
        model: fused or not, of a published or a user's graph; tensors keep their dtype.
        path: ends in `.safetensors`.
        metadata: JSON values to store with the weights (epoch, AP); `CheckpointContent.metadata` gives them back.

    Raises:
        UserError: another suffix, or the file cannot be written (the previous one is then intact).
    """
    if Path(path).suffix.lower() != ".safetensors":
        raise UserError(f"weights are saved as .safetensors, got {path}")
    save = require("safetensors.torch").save
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    header = {
        "format_version": FORMAT_VERSION,
        "graph_name": model.graph_name,
        "graph": model.graph.as_dict(),
        "num_classes": model.num_classes,
        "names": {str(k): v for k, v in model.names.items()},
        "class_tower": model.class_tower,
        "box_groups": model.box_groups,
        "fused": model.is_fused,
        "metadata": dict(metadata or {}),
    }
    return atomic_write(path, save(state, metadata={"format": "pt", _METADATA_KEY: json.dumps(header)}))


def convert(source: str | Path, target: str | Path, *, deploy: bool = False, fuse: bool = False) -> DetectionModel:
    """Read weights of any known origin and write them as ours.

    Args:
        source: any file that `load_checkpoint` takes.
        target: ends in `.safetensors`.
        deploy: drop the auxiliary branch (yolov9-X → gelan-X).
        fuse: fold BatchNorm and RepConv.

    Returns:
        The network as written.

    Raises:
        CheckpointError: as `load_checkpoint`.
        UserError: as `save_weights`.
    """
    model = load_checkpoint(source)
    if deploy:
        model = reparameterize.to_deploy(model)
    if fuse:
        model = reparameterize.fuse(model)
    save_weights(model, target, metadata={"source": Path(source).name})
    return model


@dataclass(frozen=True)
class CheckpointContent:
    """A file's weights in official spelling, the network they belong to, and what else the file says.

    Attributes:
        state: official key → tensor on the CPU.
        architecture: the network.
        names: class index → name, where the file has one for every class.
        metadata: of our own files what `save_weights` was given; of foreign ones `names`, `nc`, `yaml`, ….
    """

    state: dict[str, Tensor]
    architecture: Architecture
    names: dict[int, str] | None
    metadata: dict[str, Any]

    def build(self) -> DetectionModel:
        """The network with these weights, on the CPU; it shares no memory with `state`'s larger storages."""
        model = self.architecture.build()
        model.load_state_dict({key: _owned(value) for key, value in self.state.items()}, strict=True, assign=True)
        if self.names is not None:
            model.names = dict(self.names)
        return model


def _owned(value: Tensor) -> Tensor:
    """Contiguous, and not a view that keeps a larger storage alive or shares it with another weight."""
    value = value.contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def read_checkpoint(path: str | Path, *, graphs: tuple[Graph, ...] = ()) -> CheckpointContent:
    """Read and recognise a file of any known origin without building the network.

    Args:
        path: the file.
        graphs: networks to consider besides the published ones (a foreign file of a user's own graph).

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    path = Path(path)
    state, metadata = read_file(path)
    if _METADATA_KEY in metadata:
        return _own(path, state, metadata[_METADATA_KEY])
    state, source = official_state(state)
    architecture = identify(state, source=source, graphs=graphs, origin=str(path))
    return CheckpointContent(
        state, architecture, parse_names(metadata.get("names"), architecture.num_classes), metadata
    )


def _count(value: Any) -> int | None:
    return None if value is None else int(value)


def _own(path: Path, state: dict[str, Tensor], text: str) -> CheckpointContent:
    try:
        header = json.loads(text)
        version = header["format_version"]
        if version > FORMAT_VERSION:
            raise CheckpointError(f"{path} has format version {version}; this yolov9_fast reads up to {FORMAT_VERSION}")
        architecture = Architecture(
            source="yolov9_fast",
            graph=graph_from_dict(header["graph"], str(path)),
            num_classes=int(header["num_classes"]),
            class_tower=_count(header["class_tower"]),
            box_groups=_count(header["box_groups"]),
            fused=bool(header["fused"]),
        )
        wanted = {key: tuple(value.shape) for key, value in architecture.build().state_dict().items()}
        metadata = dict(header.get("metadata") or {})
        names = parse_names(header.get("names"), architecture.num_classes)
    except (ValueError, KeyError, TypeError, GraphError) as error:
        raise CheckpointError(f"{path}: its description of the network cannot be read: {error!r}") from error
    found = {key: tuple(value.shape) for key, value in state.items()}
    if wanted != found:
        raise CheckpointError(
            f"{path} does not fit the network it names, {architecture}: {first_difference(wanted, found)}"
        )
    return CheckpointContent(state, architecture, names, metadata)
