"""`accelerate` and `restore`: instances in a model run plans of the operators, or the forward of their class again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from yolov9_fast._accelerate.captured import is_captured_class, set_captured
from yolov9_fast._accelerate.classes import origin_of, reset_class, set_class
from yolov9_fast._accelerate.matching import FOLDED, KINDS, OPERATORS, Kind, match
from yolov9_fast._accelerate.probe import differs

_CONVERTED = "_yolov9_fast_converted"
"""On a block of this library: that the parameters below it were contiguous before."""


@dataclass
class Report:
    """What `accelerate` did: `accelerated` module name → kind, `skipped` module name → reason.

    `capture`: whether the network was asked to replay CUDA graphs; `not_captured`: why it will not.
    """

    accelerated: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    memory_format: torch.memory_format | None = None
    capture: bool = False
    not_captured: str | None = None

    def counts(self) -> dict[str, int]:
        """How many modules of each kind run the operators."""
        return {kind.name: n for kind in KINDS if (n := sum(each == kind.name for each in self.accelerated.values()))}

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {name}" for name, n in self.counts().items()) or "nothing"
        lines = [f"accelerated: {counts}; memory format {self.memory_format or 'as it was'}"]
        if self.capture:
            lines.append(
                f"not captured: {self.not_captured}"
                if self.not_captured
                else "captured: forward and backward, for each shape of the input after 3 calls"
            )
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def accelerate(
    model: nn.Module,
    *,
    ops: str | Iterable[str] = "all",
    memory_format: torch.memory_format | None = torch.channels_last,
    capture: bool = False,
) -> Report:
    """Make the blocks of a YOLOv9 of any code run the fused operators, in place.

    Modules are recognised by class name, children and the result of a copy on a small input. An instance changes only
    its class, to a subclass of the same name: parameters, buffers, state_dict, hooks, copies (EMA), DDP, SyncBatchNorm,
    `.half()`, the model's own `fuse()` and `torch.compile` work as before, and pickling writes the model's own classes.
    Results equal the model's own up to rounding; the model's own forward runs while something traces or transforms
    it, as torch.jit.trace or torch.func.grad. Models of this library use the operators without it; for them only the
    memory format of the parameters changes. A second call changes nothing.

    Args:
        model: a module; modules inside wrappers such as DistributedDataParallel are found.
        ops: "all", or the operators to use among bn_silu, rep_bn_silu, concat, spp, adown_pool, cbfuse: a block that
            needs another one is skipped.
        memory_format: in which convolutions read their weights, and so of the maps; the parameters of other code keep
            theirs. None reads them as they are. With channels_last nothing in a CSP-ELAN block is copied but weights.
        capture: also replay the whole network's forward and backward as CUDA graphs, on a GPU, for each shape of an
            input that is one tensor, after three calls; where that is not possible its calls are plain.
            False leaves a network as it is.

    Returns:
        Report: per module what runs, or why not.

    Raises:
        TypeError: `model` is no module.
        ValueError: an operator that does not exist; `capture` of DistributedDataParallel or DataParallel.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    chosen = _chosen(ops)
    report = Report(memory_format=memory_format)
    probed: dict[Any, bool | None] = {}
    for name, module in model.named_modules():
        _accelerate_one(name, module, chosen, report, probed)
    if capture:
        report.capture, report.not_captured = True, set_captured(model)
    return report


def restore(model: nn.Module) -> int:
    """Undo `accelerate`: every module has its own class again, and blocks of this library their memory format.

    Returns: the number of modules restored.
    """
    count = 0
    for module in model.modules():
        if is_captured_class(module):
            reset_class(module)
        count += reset_class(module)
        if module.__dict__.pop(_CONVERTED, False):
            for parameter in module.parameters():
                parameter.data = parameter.data.contiguous()
    return count


def accelerated_kind(module: nn.Module) -> Kind | None:
    """The kind as which `accelerate` changed this instance; None where it did not or its forward was replaced since."""
    origin = origin_of(module)
    return None if origin is None or "forward" in module.__dict__ else origin.kind


def _chosen(ops: str | Iterable[str]) -> frozenset[str]:
    if ops == "all":
        return OPERATORS
    names = frozenset({ops} if isinstance(ops, str) else ops)
    if names - OPERATORS:
        unknown = ", ".join(sorted(names - OPERATORS))
        raise ValueError(f"ops: expected 'all' or names among {', '.join(sorted(OPERATORS))}, got {unknown}")
    return names


def _accelerate_one(
    name: str, module: nn.Module, chosen: frozenset[str], report: Report, probed: dict[Any, bool | None]
) -> None:
    """`probed`: for each class whether its forward computes something else than its kind; None: not known yet."""
    origin = origin_of(module)
    kind, reason = match(module, type(module) if origin is None else origin.base)
    if kind is None:
        if reason is not None:
            report.skipped[name] = reason
        return
    if not kind.operators <= chosen:
        report.skipped[name] = f"it needs {', '.join(sorted(kind.operators - chosen))}, left out by ops"
        return
    if type(module).__module__.startswith("yolov9_fast.nn"):
        if report.memory_format is not None:
            _set_format(module, report.memory_format)
        report.accelerated[name] = kind.name
        return
    if "forward" in module.__dict__ and not _is_folded(module):
        report.skipped[name] = "its forward has been replaced on the instance already"
        return
    if "forward" in module.__dict__ and getattr(module, "bn", None) is not None:
        report.skipped[name] = f"its forward is {FOLDED}, which leaves out its norm"
        return
    if origin is None or origin.kind is None:
        key = type(module), "forward" in module.__dict__
        if probed.get(key) is None:
            probed[key] = differs(module, kind)
        if probed[key]:
            report.skipped[name] = f"{type(module).__name__} is no {kind.name}: its forward gives another result"
            return
    reset_class(module)
    try:
        set_class(module, kind, report.memory_format)
    except Exception as error:  # the class of other code may refuse subclasses in any way
        report.skipped[name] = f"class {type(module).__name__} cannot be derived from: {error}"
        return
    report.accelerated[name] = kind.name


def _is_folded(module: nn.Module) -> bool:
    """Whether the forward of the instance is its own method for a folded BatchNorm."""
    forward = module.__dict__["forward"]
    return getattr(forward, "__self__", None) is module and forward.__name__ == FOLDED


def _set_format(block: nn.Module, memory_format: torch.memory_format) -> None:
    for parameter in block.parameters():
        if parameter.dim() == 4 and not parameter.is_contiguous(memory_format=memory_format):
            block.__dict__[_CONVERTED] = True
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
