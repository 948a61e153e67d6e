"""`accelerate` and `restore`: instances in a model run plans of the operators, or the forward of their class again."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from yolov9_fast._accelerate.matching import KINDS, OPERATORS, Kind, match
from yolov9_fast.nn.plan import PLAN, planned_forward

_CONVERTED = "_yolov9_fast_converted"
"""On a module: names of its parameters that were contiguous before."""


@dataclass
class Report:
    """What `accelerate` did: `accelerated` module name → kind, `skipped` module name → reason."""

    accelerated: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    memory_format: torch.memory_format | None = None

    def counts(self) -> dict[str, int]:
        """How many modules of each kind run the operators."""
        return {kind.name: n for kind in KINDS if (n := sum(each == kind.name for each in self.accelerated.values()))}

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {name}" for name, n in self.counts().items()) or "nothing"
        lines = [f"accelerated: {counts}; memory format {self.memory_format or 'as it was'}"]
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def accelerate(
    model: nn.Module,
    *,
    ops: str | Iterable[str] = "all",
    memory_format: torch.memory_format | None = torch.channels_last,
) -> Report:
    """Make the blocks of a YOLOv9 of any code run the fused operators, in place.

    Modules are recognised by class name and children, and only the `forward` of the instances changes: parameters,
    buffers, state_dict, hooks, pickling, deepcopy (EMA), DDP, SyncBatchNorm conversion before or after, `.half()`, the
    model's own `fuse()` and `torch.compile` work as before. Results equal the model's own up to rounding. Models of
    this library use the operators without it; for them only the memory format changes. A second call changes nothing.

    Args:
        model: a module; modules inside wrappers such as DistributedDataParallel are found.
        ops: "all", or the operators to use among bn_silu, rep_bn_silu, concat, spp, adown_pool, cbfuse: a block that
            needs another one is skipped.
        memory_format: of the parameters; None keeps it. With channels_last nothing in a CSP-ELAN block is copied.

    Returns:
        Report: per module what runs, or why not.

    Raises:
        TypeError: `model` is no module.
        ValueError: an operator that does not exist.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    chosen = _chosen(ops)
    report = Report(memory_format=memory_format)
    for name, module in model.named_modules():
        _accelerate_one(name, module, chosen, report)
    if memory_format is not None:
        _set_format(model, memory_format)
    return report


def restore(model: nn.Module) -> int:
    """Undo `accelerate`: every module runs the forward of its class, parameters have their former memory format.

    Returns: the number of modules restored.
    """
    count = 0
    for module in model.modules():
        if accelerated_kind(module) is not None:
            del module.__dict__["forward"]
            module.__dict__.pop(PLAN, None)
            count += 1
        for name in module.__dict__.pop(_CONVERTED, ()):
            parameter = getattr(module, name)
            parameter.data = parameter.data.contiguous()
    return count


def accelerated_kind(module: nn.Module) -> Kind | None:
    """The kind as which `accelerate` patched this instance; None where it did not, or something replaced it."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, functools.partial) and forward.func is planned_forward:
        return _KIND_OF[forward.args[0]]
    return None


_KIND_OF = {kind.planner: kind for kind in KINDS}


def _chosen(ops: str | Iterable[str]) -> frozenset[str]:
    if ops == "all":
        return OPERATORS
    names = frozenset({ops} if isinstance(ops, str) else ops)
    if names - OPERATORS:
        unknown = ", ".join(sorted(names - OPERATORS))
        raise ValueError(f"ops: expected 'all' or names among {', '.join(sorted(OPERATORS))}, got {unknown}")
    return names


def _accelerate_one(name: str, module: nn.Module, chosen: frozenset[str], report: Report) -> None:
    kind, reason = match(module)
    if kind is None:
        if reason is not None:
            report.skipped[name] = reason
        return
    if not kind.operators <= chosen:
        report.skipped[name] = f"it needs {', '.join(sorted(kind.operators - chosen))}, left out by ops"
        return
    if type(module).__module__.startswith("yolov9_fast.nn"):
        report.accelerated[name] = kind.name
        return
    if "forward" in module.__dict__ and accelerated_kind(module) is None:
        report.skipped[name] = "its forward has been replaced on the instance already"
        return
    module.__dict__["forward"] = functools.partial(planned_forward, kind.planner, module)
    report.accelerated[name] = kind.name


def _set_format(model: nn.Module, memory_format: torch.memory_format) -> None:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() != 4 or parameter.is_contiguous(memory_format=memory_format):
                continue
            module.__dict__[_CONVERTED] = (*module.__dict__.get(_CONVERTED, ()), name)
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
