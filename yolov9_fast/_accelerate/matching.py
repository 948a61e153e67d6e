"""Which modules of a model the operators can run, recognised by class name and children, without their code.

The names are those under which the YOLOv9 family builds the paper's blocks (official code, MIT YOLO, Ultralytics and
their descendants). A class of another name with the right children may compute something else, so it is not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from yolov9_fast.nn import steps
from yolov9_fast.nn.plan import Planner, Planning, Step


@dataclass(frozen=True)
class Kind:
    """A block: its name in reports, its class names, why a module of such a class is none, and its planner.

    `operators`: those that it needs, by which `accelerate(ops=...)` chooses.
    """

    name: str
    classes: frozenset[str]
    reason: Callable[[nn.Module], str | None]
    planner: Planner
    operators: frozenset[str]


def _unit(module: Any, name: str) -> str | None:
    if not isinstance(module, nn.Module):
        return f"no child {name}"
    reason = steps.unit_reason(module)
    return reason and f"{name}: {reason}"


def _units(block: Any, *numbers: int) -> str | None:
    for number in numbers:
        reason = _unit(steps.child(block, number), f"child {number}")
        if reason:
            return reason
    return None


def _only_children(module: Any, allowed: set[str]) -> str | None:
    other = sorted({name for name, _ in module.named_children()} - allowed)
    return f"unknown children {', '.join(other)}" if other else None


def _conv_reason(module: Any) -> str | None:
    return _only_children(module, {"conv", "bn", "act"}) or steps.unit_reason(module)


def _rep_reason(module: Any) -> str | None:
    return _only_children(module, {"conv1", "conv2", "conv", "act", "bn"}) or steps.rep_reason(module)


def _bottleneck_reason(module: Any) -> str | None:
    known = {"cv1", "cv2", "conv1", "conv2"}
    if not any(hasattr(module, name) for name in ("add", "residual")):
        return "no attribute add or residual says whether it is residual"
    if not isinstance(steps.child(module, 1), nn.Module):
        return "no child 1"
    return _only_children(module, known) or _units(module, 2)


def _csp_reason(module: Any) -> str | None:
    known = {"cv1", "cv2", "cv3", "conv1", "conv2", "conv3", "m", "bottleneck"}
    reason = _only_children(module, known) or _units(module, 1, 2, 3)
    if reason:
        return reason
    inner = list(steps.inner_blocks(module))
    if not inner:
        return "no bottlenecks"
    if type(inner[-1]).__name__ not in BOTTLENECK.classes:
        return f"bottlenecks of class {type(inner[-1]).__name__}"
    return _bottleneck_reason(inner[-1])


def _elan_reason(module: Any) -> str | None:
    children = steps.numbered(module)
    names = {name for name, child in module.named_children() if any(child is each for each in children)}
    reason = _only_children(module, names)
    if reason:
        return reason
    if len(children) < 3:
        return "fewer than three numbered children"
    first, *stages, last = children
    reason = _unit(first, "child 1") or _unit(last, f"child {len(children)}")
    if reason:
        return reason
    for number, stage in enumerate(stages, start=2):
        tail = stage[-1] if isinstance(stage, nn.Sequential) and len(stage) else stage
        reason = _unit(tail, f"the end of child {number}")
        if reason:
            return reason
    split = first.conv.out_channels
    widths = split + sum(steps.tail_unit(stage).conv.out_channels for stage in stages)
    if split % 2 or last.conv.in_channels != widths:
        return f"its last convolution takes {last.conv.in_channels} channels, split and stages give {widths}"
    return None


def _max_pool(module: Any) -> bool:
    pool = module.m if isinstance(getattr(module, "m", None), nn.Module) else module
    pair = {5, (5, 5)}
    return (
        type(pool) is nn.MaxPool2d
        and pool.kernel_size in pair
        and pool.stride in {1, (1, 1)}
        and pool.padding in {2, (2, 2)}
        and pool.dilation in {1, (1, 1)}
        and not pool.ceil_mode
    )


def _spp_reason(module: Any) -> str | None:
    reason = _units(module, 1, 5)
    if reason:
        return reason
    pools = [steps.child(module, number) for number in (2, 3, 4)]
    if any(pool is None for pool in pools):
        inner = [child for name, child in module.named_children() if name in ("pools", "pool")]
        pools = list(inner[0]) if inner and isinstance(inner[0], nn.ModuleList | nn.Sequential) else inner * 3
    if len(pools) != 3 or not all(_max_pool(pool) for pool in pools):
        return "its pools are not three max pools 5×5, stride 1, padding 2"
    if steps.child(module, 5).conv.in_channels != 4 * steps.child(module, 1).conv.out_channels:
        return "its last convolution does not take the four parts"
    return None


def _pools_reason(module: Any) -> str | None:
    """Why a pool or another child is not what the operator computes; pools called as functions cannot be checked."""
    for name, child in module.named_children():
        if isinstance(child, nn.AvgPool2d):
            if (child.kernel_size, child.stride, child.padding) not in {(2, 1, 0), ((2, 2), (1, 1), (0, 0))}:
                return f"{name} is not an average pool 2×2, stride 1"
        elif isinstance(child, nn.MaxPool2d):
            if (child.kernel_size, child.stride, child.padding) not in {(3, 2, 1), ((3, 3), (2, 2), (1, 1))}:
                return f"{name} is not a max pool 3×3, stride 2, padding 1"
        elif steps.unit_reason(child) is not None:
            return f"unknown child {name}"
    return None


def _adown_reason(module: Any) -> str | None:
    return _units(module, 1, 2) or _pools_reason(module)


def _aconv_reason(module: Any) -> str | None:
    unit = steps.a_conv_unit(module)
    return _unit(unit, "its convolution") or _pools_reason(module)


def _cbfuse_reason(module: Any) -> str | None:
    if steps.cb_fuse_indices(module) is None:
        return "no attribute idx, index or indices"
    return _only_children(module, set())


def _rep_unit(block: Any, planning: Planning) -> Step | None:
    """The branches are units by their structure, whether accelerated too or not."""
    return steps.rep_unit(block, planning, steps.unit)


BOTTLENECK = Kind(
    "bottleneck",
    frozenset({"RepNBottleneck", "RepBottleneck", "RepConvBottleneck"}),
    _bottleneck_reason,
    steps.bottleneck,
    frozenset({"bn_silu"}),
)
KINDS = (
    Kind("conv", frozenset({"Conv"}), _conv_reason, steps.unit, frozenset({"bn_silu"})),
    Kind("rep_conv", frozenset({"RepConvN", "RepConv"}), _rep_reason, _rep_unit, frozenset({"rep_bn_silu"})),
    BOTTLENECK,
    Kind("csp", frozenset({"RepNCSP", "RepCSP"}), _csp_reason, steps.csp, frozenset({"bn_silu", "concat"})),
    Kind(
        "elan",
        frozenset({"RepNCSPELAN4", "RepNCSPELAN", "CSPELAN", "ELAN1", "ELAN", "RepNCSPELAND"}),
        _elan_reason,
        steps.elan,
        frozenset({"bn_silu", "concat"}),
    ),
    Kind("spp_elan", frozenset({"SPPELAN"}), _spp_reason, steps.spp_elan, frozenset({"bn_silu", "concat", "spp"})),
    Kind("a_down", frozenset({"ADown"}), _adown_reason, steps.a_down, frozenset({"bn_silu", "concat", "adown_pool"})),
    Kind("a_conv", frozenset({"AConv"}), _aconv_reason, steps.a_conv, frozenset({"adown_pool"})),
    Kind("cb_fuse", frozenset({"CBFuse"}), _cbfuse_reason, steps.cb_fuse, frozenset({"cbfuse"})),
)
OPERATORS = frozenset().union(*(kind.operators for kind in KINDS))


def match(module: Any) -> tuple[Kind | None, str | None]:
    """The kind of `module`; or None, with the reason where its class has the name of a kind."""
    name = type(module).__name__
    for kind in KINDS:
        if name in kind.classes:
            reason = kind.reason(module)
            return (kind, None) if reason is None else (None, f"{name} is no {kind.name}: {reason}")
    if {"conv", "bn", "act"} <= {child for child, _ in module.named_children()}:
        return None, f"class {name} is unknown; its children look like a convolution unit, its forward may differ"
    return None, None
