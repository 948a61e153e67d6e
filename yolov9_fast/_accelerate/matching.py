"""Which modules of a model the operators can run, recognised by class name and children, without their code.

The names are those under which the YOLOv9 family builds the paper's blocks (official code, MIT YOLO, Ultralytics and
their descendants). A class of another name with the right children may compute something else, so it is not touched;
whether one of a known name does is for `probe.py` to find.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from yolov9_fast.nn import steps
from yolov9_fast.nn.plan import KNOWN_FORWARDS, Planner, Planning, Step, own_forward


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
    return None if isinstance(steps.inner_blocks(module), nn.Module) else "no bottlenecks"


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
        reason = _unit(_tail(stage), f"the end of child {number}")
        if reason:
            return reason
    split = first.conv.out_channels
    widths = split + sum(_tail(stage).conv.out_channels for stage in stages)
    if split % 2 or last.conv.in_channels != widths:
        return f"its last convolution takes {last.conv.in_channels} channels, split and stages give {widths}"
    return None


def _tail(stage: Any) -> Any:
    return stage[-1] if isinstance(stage, nn.Sequential) and len(stage) else stage


_SPP_POOL, _AVG_POOL, _MAX_POOL = nn.MaxPool2d(5, 1, 2), nn.AvgPool2d(2, 1), nn.MaxPool2d(3, 2, 1)


def _same_pool(pool: Any, expected: nn.Module) -> bool:
    """Whether `pool` computes what `expected` computes, of whose class it has to be."""
    return (
        type(pool) is type(expected)
        and own_forward(pool)
        and all(_pair(getattr(pool, name)) == _pair(getattr(expected, name)) for name in _options(expected))
    )


def _options(pool: Any) -> tuple[str, ...]:
    return tuple(pool.__constants__)


def _pair(value: Any) -> Any:
    return (value, value) if type(value) is int else value


def _spp_pools(module: Any) -> list[Any]:
    """The pools of an SPP-ELAN: numbered children, a list of them, or one that is applied three times."""
    pools = [steps.child(module, number) for number in (2, 3, 4)]
    if any(pool is None for pool in pools):
        inner = [child for name, child in module.named_children() if name in ("pools", "pool")]
        pools = list(inner[0]) if inner and isinstance(inner[0], nn.ModuleList | nn.Sequential) else inner * 3
    return pools


def _wrapped_pool(pool: Any) -> Any:
    """The pool inside a module of the class SP, which only calls it; any other module as it is."""
    known = frozenset({"SP"})
    if not isinstance(pool, nn.Module) or type(pool).__name__ not in known or [*pool._modules] != ["m"]:
        return pool
    return pool.m if own_forward(pool) and _class_reason(pool, type(pool), known) is None else pool


def _spp_reason(module: Any) -> str | None:
    numbers = range(1, 6)
    known = {f"{prefix}{number}" for prefix in ("cv", "conv") for number in numbers} | {"pools", "pool"}
    reason = _only_children(module, known) or _units(module, 1, 5)
    if reason:
        return reason
    pools = _spp_pools(module)
    if len(pools) != 3 or not all(_same_pool(_wrapped_pool(pool), _SPP_POOL) for pool in pools):
        return "its pools are not three max pools 5×5, stride 1, padding 2"
    if steps.child(module, 5).conv.in_channels != 4 * steps.child(module, 1).conv.out_channels:
        return "its last convolution does not take the four parts"
    return None


def _pools_reason(module: Any, units: tuple[Any, ...]) -> str | None:
    """Why a pool or another child is not what the operator computes; pools called as functions cannot be checked."""
    for name, child in module.named_children():
        if isinstance(child, nn.AvgPool2d):
            if not _same_pool(child, _AVG_POOL):
                return f"{name} is not an average pool 2×2, stride 1"
        elif isinstance(child, nn.MaxPool2d):
            if not _same_pool(child, _MAX_POOL):
                return f"{name} is not a max pool 3×3, stride 2, padding 1"
        elif not any(child is unit for unit in units):
            return f"unknown child {name}"
    return None


def _adown_reason(module: Any) -> str | None:
    return _units(module, 1, 2) or _pools_reason(module, (steps.child(module, 1), steps.child(module, 2)))


def _aconv_reason(module: Any) -> str | None:
    unit = steps.a_conv_unit(module)
    return _unit(unit, "its convolution") or _pools_reason(module, (unit,))


def _cbfuse_reason(module: Any) -> str | None:
    if steps.cb_fuse_indices(module) is None:
        return "no attribute idx, index or indices"
    return _only_children(module, set())


def _rep_unit(block: Any, planning: Planning) -> Step | None:
    """The branches are units by their structure, whether accelerated too or not."""
    return steps.rep_unit(block, planning, _branch)


def _branch(module: Any, planning: Planning) -> Step | None:
    return steps.unit(module, planning) if own_forward(module) and match(module, type(module))[0] is CONV else None


def _with_pools(planner: Planner) -> Planner:
    """For blocks whose pools are children: they must not have to be called."""

    def plan(block: Any, planning: Planning) -> Step | None:
        others = [child for child in block.modules() if isinstance(child, nn.MaxPool2d | nn.AvgPool2d)]
        wrappers = [child for child in block.modules() if any(pool in others for pool in child._modules.values())]
        for pool in others:
            planning.read(pool, *_options(pool))
        if not planning.plain(*others, *(child for child in wrappers if child is not block)):
            return None
        return planner(block, planning)

    return plan


FOLDED = "forward_fuse"
"""Code of this family folds BatchNorm into the convolution and sets this method, act(conv(x)), on the instance."""


def _folded_unit(block: Any, planning: Planning) -> Step | None:
    known = type(block).__name__ in CONV.classes | REP_CONV.classes
    return steps.unit(block, planning) if known and getattr(block, "bn", None) is None else None


KNOWN_FORWARDS[FOLDED] = _folded_unit
CONV = Kind("conv", frozenset({"Conv"}), _conv_reason, steps.unit, frozenset({"bn_silu"}))
REP_CONV = Kind("rep_conv", frozenset({"RepConvN", "RepConv"}), _rep_reason, _rep_unit, frozenset({"rep_bn_silu"}))
KINDS = (
    CONV,
    REP_CONV,
    Kind(
        "bottleneck",
        frozenset({"RepNBottleneck", "RepBottleneck", "RepConvBottleneck"}),
        _bottleneck_reason,
        steps.bottleneck,
        frozenset({"bn_silu"}),
    ),
    Kind("csp", frozenset({"RepNCSP", "RepCSP"}), _csp_reason, steps.csp, frozenset({"bn_silu", "concat"})),
    Kind(
        "elan",
        frozenset({"RepNCSPELAN4", "RepNCSPELAN", "CSPELAN", "ELAN1", "ELAN", "RepNCSPELAND"}),
        _elan_reason,
        steps.elan,
        frozenset({"bn_silu", "concat"}),
    ),
    Kind(
        "spp_elan",
        frozenset({"SPPELAN"}),
        _spp_reason,
        _with_pools(steps.spp_elan),
        frozenset({"bn_silu", "concat", "spp"}),
    ),
    Kind(
        "a_down",
        frozenset({"ADown"}),
        _adown_reason,
        _with_pools(steps.a_down),
        frozenset({"bn_silu", "concat", "adown_pool"}),
    ),
    Kind("a_conv", frozenset({"AConv"}), _aconv_reason, _with_pools(steps.a_conv), frozenset({"adown_pool"})),
    Kind("cb_fuse", frozenset({"CBFuse"}), _cbfuse_reason, steps.cb_fuse, frozenset({"cbfuse"})),
)
OPERATORS = frozenset().union(*(kind.operators for kind in KINDS))


def match(module: Any, cls: type) -> tuple[Kind | None, str | None]:
    """The kind of `module`, of class `cls`; or None, with the reason where the class has the name of a kind."""
    name = cls.__name__
    for kind in KINDS:
        if name in kind.classes:
            reason = _class_reason(module, cls, kind.classes) or kind.reason(module)
            return (kind, None) if reason is None else (None, f"{name} is no {kind.name}: {reason}")
    if {"conv", "bn", "act"} <= {child for child, _ in module.named_children()}:
        return None, f"class {name} is unknown; its children look like a convolution unit, its forward may differ"
    return None, None


def _class_reason(module: nn.Module, cls: Any, names: frozenset[str]) -> str | None:
    """Why an instance of a class with a known name does not compute what the children say."""
    if cls.__call__ is not nn.Module.__call__:
        return "its class has a __call__ of its own"
    for base in cls.__mro__[1:]:
        if base.__name__ in names and getattr(base, "forward", None) is not cls.forward:
            return f"it overrides the forward of a class {base.__name__}"
    own = [*module._parameters, *module._buffers]
    return f"it has parameters or buffers of its own: {', '.join(own)}" if own else None
