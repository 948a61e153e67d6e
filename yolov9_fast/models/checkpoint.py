"""Weights in files: ours (safetensors with their graph) written and read back exactly, foreign ones recognised."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yolov9_fast._lazy import require
from yolov9_fast._text import printable
from yolov9_fast._untrusted import reason, shown, user_path
from yolov9_fast.atomic import atomic_write
from yolov9_fast.errors import CheckpointError, UserError
from yolov9_fast.limits import limit
from yolov9_fast.models import reparameterize
from yolov9_fast.models.build_limits import build_limits
from yolov9_fast.models.foreign import (
    Architecture,
    as_float32,
    first_difference,
    identify,
    parse_names,
    read_file,
)
from yolov9_fast.models.foreign_keys import official_keys
from yolov9_fast.models.graph import MAX_ARGUMENT, Graph, GraphError, graph_from_dict
from yolov9_fast.models.model import DetectionModel
from yolov9_fast.models.module_options import (
    NormOptions,
    check_attributes,
    norm_options,
    read_norm_options,
    set_norm_options,
    stored_norm_options,
)
from yolov9_fast.nn.blocks import BN_EPS, BN_MOMENTUM

FORMAT_VERSION = 2
"""1: every BatchNorm has the eps and momentum of this library. 2: `batch_norm` lists those that have others."""
_METADATA_KEY = "yolov9_fast"

logger = logging.getLogger(__name__)


def load_checkpoint(path: str | Path, *, device: str | torch.device = "cpu") -> DetectionModel:
    """The network that a file holds, with its weights, in evaluation mode.

    Takes our own files, and any of WongKinYiu/yolov9, MultimediaTechLab/YOLO (MIT) and Ultralytics: whole pickled
    modules, state dicts, `.npz`, `.safetensors`. Nothing in the file is executed. A training graph gives a yolov9-X
    network with its auxiliary branch, a converted one gelan-X, a fused state dict a fused network. The eps and momentum
    of each BatchNorm are those that the file holds. Reading takes at most 8 times the file's size and 1 GiB.

    Args:
        path: the file.
        device: where the network goes.

    Raises:
        CheckpointError: missing or damaged file, one above a limit (`yolov9_fast.limits`), or one that fits no known
            network; names the first key that differs.
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
    norms = {name: pair for name, pair in norm_options(model).items() if pair != (BN_EPS, BN_MOMENTUM)}
    header = {
        "format_version": 2 if norms else 1,
        "graph_name": model.graph_name,
        "graph": model.graph.as_dict(),
        "num_classes": model.num_classes,
        "names": {str(k): v for k, v in model.names.items()},
        "class_tower": model.class_tower,
        "box_groups": model.box_groups,
        "fused": model.is_fused,
        "metadata": dict(metadata or {}),
        **({"batch_norm": norms} if norms else {}),
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
        norms: eps and momentum of BatchNorms by module name, where the file says them.
    """

    state: dict[str, Tensor]
    architecture: Architecture
    names: dict[int, str] | None
    metadata: dict[str, Any]
    norms: dict[str, NormOptions] = field(default_factory=dict)

    def build(self) -> DetectionModel:
        """The network with these weights, on the CPU; it shares no memory with `state`'s larger storages."""
        model = self.architecture.build()
        model.load_state_dict({key: _owned(value) for key, value in self.state.items()}, strict=True, assign=True)
        set_norm_options(model, self.norms)
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
    path = user_path(path, "checkpoint", CheckpointError)
    content, metadata = read_file(path)
    if _METADATA_KEY in metadata:
        return _own(path, _counters(content.state, path), metadata[_METADATA_KEY])
    renamed, source = official_keys(content.state)
    architecture = identify(renamed, source=source, graphs=graphs, origin=str(path))
    names = _names(path, metadata.get("names"), architecture)
    try:
        norms = read_norm_options(content, renamed)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if content.attributes:
        check_attributes(content, renamed, architecture.build(), str(path))
    return CheckpointContent(as_float32(_counters(renamed, path)), architecture, names, metadata, norms)


def _names(path: Path, value: Any, architecture: Architecture) -> dict[int, str] | None:
    try:
        return parse_names(value, architecture.num_classes)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _counters(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Batch counters as integers, all else as it is; raises `CheckpointError` for weights that are integers."""
    result = {}
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            value = value.to(torch.int64)
        elif not value.is_floating_point():
            raise CheckpointError(f"{path}: {printable(key, 100)}: expected floating-point weights, got {value.dtype}")
        result[key] = value
    return result


def _count(header: dict[str, Any], key: str, largest: int) -> int:
    value = header[key]
    if type(value) is not int or not 1 <= value <= largest:
        raise ValueError(f"{key}: expected an integer in [1, {largest:,}], got {shown(value)}")
    return value


def _optional_count(header: dict[str, Any], key: str) -> int | None:
    return None if header[key] is None else _count(header, key, MAX_ARGUMENT)


def _own(path: Path, state: dict[str, Tensor], text: str) -> CheckpointContent:
    found = {key: tuple(value.shape) for key, value in state.items()}
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("expected a mapping")
        version = _count(header, "format_version", 1_000_000)
        if version > FORMAT_VERSION:
            raise CheckpointError(f"{path} has format version {version}; this yolov9_fast reads up to {FORMAT_VERSION}")
        architecture = Architecture(
            source="yolov9_fast",
            graph=graph_from_dict(header["graph"], "graph"),
            num_classes=_count(header, "num_classes", limit("CLASSES")),
            class_tower=_optional_count(header, "class_tower"),
            box_groups=_optional_count(header, "box_groups"),
            fused=header["fused"] is True,
        )
        # The largest block of two tensors, a fused RepConv, has eight modules before it is fused.
        with build_limits(8 * len(state) + 1000):
            model = architecture.build()
        wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        metadata = dict(header.get("metadata") or {})
        names = _names(path, header.get("names"), architecture)
        norms = norm_options(model) | stored_norm_options(header.get("batch_norm", {}))
    except KeyError as error:
        raise CheckpointError(f"{path}: its description of the network cannot be read: it lacks {error}") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: its description of the network cannot be read: nested too deeply") from error
    except (ValueError, TypeError, OverflowError, AttributeError, RuntimeError, GraphError) as error:
        raise CheckpointError(f"{path}: its description of the network cannot be read: {reason(error)}") from error
    if wanted != found:
        raise CheckpointError(
            f"{path} does not fit the network it names, {architecture}: {first_difference(wanted, found)}"
        )
    return CheckpointContent(state, architecture, names, metadata, norms)
