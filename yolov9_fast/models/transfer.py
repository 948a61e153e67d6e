"""Transfer of weights into a network that differs: other classes, other tower, the training graph of a deployed one."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from yolov9_fast.errors import CheckpointError
from yolov9_fast.models.checkpoint import CheckpointContent, read_checkpoint
from yolov9_fast.models.class_names import class_order, name_differences
from yolov9_fast.models.foreign import Architecture, identify
from yolov9_fast.models.foreign_keys import official_keys
from yolov9_fast.models.graph import Graph
from yolov9_fast.models.model import DetectionModel
from yolov9_fast.models.module_options import set_norm_options
from yolov9_fast.models.reparameterize import deployed_key_origin, fuse, unfuse

_BOX_TOWER = re.compile(r"\.cv[24]\.\d\.[12]\.(?:conv\.)?weight$")
_CLASS_TOWER = re.compile(r"\.cv[35]\.\d\.")
_CLASS_LAYER = re.compile(r"\.cv[35]\.\d\.2\.(?:weight|bias)$")

logger = logging.getLogger(__name__)


@dataclass
class TransferReport:
    """What became of each weight.

    Attributes:
        origin: the network that the weights come from.
        loaded: keys of the model that were copied.
        skipped: (key, reason) of weights in the file that were not.
        missing: keys of the model that the file has nothing for; they keep their values.
    """

    origin: str
    loaded: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Counts, and the reasons for what was skipped."""
        total = len(self.loaded) + len(self.skipped) + len(self.missing)
        lines = [f"weights from {self.origin}: {len(self.loaded)} of {total} entries loaded"]
        reasons = Counter(reason for _, reason in self.skipped)
        for reason, count in reasons.items():
            keys = [key for key, why in self.skipped if why == reason]
            shown = ", ".join(keys[:6]) + (", …" if count > 6 else "")
            lines.append(f"  skipped {count} ({reason}): {shown}")
        if self.missing:
            layers = sorted({int(key.split(".")[1]) for key in self.missing})
            lines.append(f"  kept as they were: {len(self.missing)} that the file lacks (layers {_ranges(layers)})")
        return "\n".join(lines)


def load_pretrained(
    model: DetectionModel, path: str | Path, *, names: Mapping[int, str] | None = None
) -> TransferReport:
    """Start `model` from a file's weights as far as they fit, and log what was loaded and what not.

    A loaded BatchNorm takes the eps and momentum that the file holds for it.

    Args:
        model: changed in place.
        path: the file.
        names: class index → name of the model's classes. The file's classes are matched to them by name; if it has as
            many classes of other names, the last convolutions of the model's class branch stay as they are, with a
            warning. None, or a file without names: matched by index.

    Raises:
        CheckpointError: a file that fits no known network, or has nothing for this one.
    """
    content = read_checkpoint(path, graphs=_related(model.graph))
    order = None
    if names is not None and content.architecture.num_classes == model.num_classes:
        order = _file_classes(content, names, path)
    report = _transfer(model, content, order)
    report.origin = f"{path}, {report.origin}"
    if not report.loaded:
        raise CheckpointError(f"{path} holds {content.architecture}; none of its weights fits {model.graph_name}")
    logger.info("%s", report.summary(), extra={"lines": True})
    return report


def _file_classes(content: CheckpointContent, names: Mapping[int, str], path: str | Path) -> list[int] | None:
    """For each class of `names` its index in the file; empty if the file has other names, None for the same order."""
    order = class_order(content.names, names)
    if order is None:
        assert content.names is not None
        logger.warning(
            "%s: %s; the last convolutions of the class branch start anew (--classes-by-index loads them)",
            path,
            name_differences(content.names, names),
        )
        return []
    if order == sorted(order):
        return None
    logger.info("%s has the same classes in another order: they are matched by name", path)
    return order


def transfer_weights(model: DetectionModel, state_dict: Mapping[str, Tensor]) -> TransferReport:
    """Copy what fits of a state dict (any known spelling, fused or not) into `model`, in place.

    Keys are matched by graph: a deployed network's weights go to the main branch of its training graph, and back.
    Where class counts, tower widths or box groups differ, those weights are skipped and the reason is reported; a
    grouped box tower fits a dense one exactly, as a block-diagonal weight.

    Raises:
        CheckpointError: the state dict fits no known network, or has nothing for this one.
    """
    state, source = official_keys(state_dict)
    architecture = identify(state, source=source, graphs=_related(model.graph))
    report = _transfer(model, CheckpointContent(state, architecture, None, {}))
    if not report.loaded:
        raise CheckpointError(f"the weights are those of {architecture}; none of them fits {model.graph_name}")
    return report


def _related(graph: Graph) -> tuple[Graph, ...]:
    return (graph, graph.deploy()[0]) if graph.has_auxiliary else (graph,)


@torch.no_grad()
def _transfer(
    model: DetectionModel, content: CheckpointContent, file_classes: list[int] | None = None
) -> TransferReport:
    """Copy what fits. `file_classes`: index in the file of each class of the model; empty: other classes."""
    architecture = content.architecture
    source = _same_form(content, fused=model.is_fused)
    names = key_map(architecture, model)
    target = model.state_dict()
    report = TransferReport(str(architecture))
    matched = {names[key]: value for key, value in source.items() if names.get(key) in target}
    report.skipped = [(key, "the model has no such layer") for key in source if names.get(key) not in target]
    reasons = {name: _misfit(name, value, target[name], architecture, model) for name, value in matched.items()}
    if file_classes is not None:
        for name in filter(_CLASS_LAYER.search, matched):
            if file_classes:
                matched[name] = matched[name][file_classes]
            else:
                reasons[name] = "other class names"
    for name, value in matched.items():
        # Statistics and biases belong to their convolution: with new weights they are wrong.
        owner = f"{name.partition('.bn.')[0]}.conv" if ".bn." in name else name.removesuffix(".bias")
        reason = reasons[name] or reasons.get(f"{owner}.weight")
        if reason:
            report.skipped.append((name, reason))
        else:
            target[name].copy_(_fit(name, value, target[name]))
            report.loaded.append(name)
    norms = {key: pair for name, pair in content.norms.items() if (key := names.get(f"{name}.running_var"))}
    loaded = set(report.loaded)
    set_norm_options(model, {key.removesuffix(".running_var"): pair for key, pair in norms.items() if key in loaded})
    met = {*report.loaded, *(key for key, _ in report.skipped)}
    report.missing = [key for key in target if key not in met]
    return report


def _same_form(content: CheckpointContent, *, fused: bool) -> Mapping[str, Tensor]:
    """The weights with BatchNorm and RepConv folded or not, as the receiving network has them."""
    if content.architecture.fused == fused:
        return content.state
    model = content.build()
    return (fuse(model) if fused else unfuse(model)).state_dict()


def key_map(architecture: Architecture, model: DetectionModel) -> dict[str, str]:
    """Key of the file → key of the model."""
    source = replace(architecture, fused=model.is_fused).build()
    keys = source.state_dict().keys()
    if architecture.graph.layers == model.graph.layers:
        return {key: key for key in keys}
    deployed, origin = model.graph.deploy()
    if deployed.layers == architecture.graph.layers:
        return {key: deployed_key_origin(model, key, origin) for key in keys}
    deployed, origin = architecture.graph.deploy()
    if deployed.layers == model.graph.layers:
        return {deployed_key_origin(source, key, origin): key for key in model.state_dict()}
    return {key: key for key in keys}


def _fit(name: str, value: Tensor, target: Tensor) -> Tensor:
    """`value` in the target's shape, where `_misfit` has no objection."""
    groups = _block_diagonal(name, value, target)
    if groups == 1:
        return value
    dense = torch.zeros_like(target)
    rows, columns = value.shape[0] // groups, value.shape[1]
    for g in range(groups):
        block = slice(g * rows, (g + 1) * rows)
        dense[block, g * columns : (g + 1) * columns] = value[block].to(dense)
    return dense


def _block_diagonal(name: str, value: Tensor, target: Tensor) -> int:
    """Groups of a box tower's weight that a dense one takes as blocks; 1 where shapes agree, 0 where they do not."""
    if value.shape == target.shape:
        return 1
    if not _BOX_TOWER.search(name) or value.shape[0] != target.shape[0] or value.shape[2:] != target.shape[2:]:
        return 0
    groups, rest = divmod(target.shape[1], value.shape[1])
    return groups if groups > 1 and not rest and not value.shape[0] % groups else 0


def _misfit(name: str, value: Tensor, target: Tensor, architecture: Architecture, model: DetectionModel) -> str:
    """Why `value` cannot be `target`; empty where it can."""
    if _block_diagonal(name, value, target):
        return ""
    if _CLASS_TOWER.search(name) and name.startswith(f"model.{len(model.graph.layers) - 1}."):
        differences = []
        if architecture.num_classes != model.num_classes and name.rsplit(".", 2)[-2] == "2":
            differences.append(f"{architecture.num_classes} classes in the file, {model.num_classes} in the model")
        if architecture.class_tower != model.class_tower:
            differences.append(
                f"class tower {architecture.class_tower} wide in the file, {model.class_tower} in the model"
            )
        if differences:
            return "; ".join(differences)
    if _BOX_TOWER.search(name) and architecture.box_groups != model.box_groups:
        return f"box tower with {architecture.box_groups} groups in the file, {model.box_groups} in the model"
    if architecture.graph_name != model.graph_name:
        return f"other shape in {architecture.graph_name} than in {model.graph_name}"
    return f"shape {list(value.shape)} in the file, {list(target.shape)} in the model"


def _ranges(numbers: list[int]) -> str:
    """`[1, 2, 3, 7]` → "1-3, 7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
