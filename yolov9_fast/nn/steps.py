"""The steps of which plans are made: what each block computes, fused and without copies, and how it is planned.

The planners serve the blocks of `nn.blocks` and, through `accelerate`, those of other code: they read the structure of
a module, whoever built it. In a CSP-ELAN block every producer writes into the buffer that the aggregation reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from yolov9_fast.nn.convolution import Sources, convolve, convolve_small, is_pointwise, is_same_size
from yolov9_fast.nn.parts import Parts, widths
from yolov9_fast.nn.plan import KNOWN_FORWARDS, Planner, Planning, Slot, Step, own_forward
from yolov9_fast.nn.sync_batch_norm import SyncBatchNorm2d, arguments, process_group
from yolov9_fast.nn.weight_casts import weight_of
from yolov9_fast.ops._adown_pool import adown_pool
from yolov9_fast.ops._bn_silu import bias_silu, bn_silu
from yolov9_fast.ops._cbfuse import cbfuse
from yolov9_fast.ops._concat import tap
from yolov9_fast.ops._conv1x1 import conv1x1_pair
from yolov9_fast.ops._rep_bn_silu import rep_bn_silu
from yolov9_fast.ops._spp import spp_with_input

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm2d)
MEMORY_FORMAT = "_yolov9_fast_memory_format"
"""On a class: the memory format in which the convolutions of its units read their weights."""
_NORM_READINGS = ("momentum", "eps", "track_running_stats", "num_features")


# ---- the convolution unit


@dataclass(frozen=True)
class Unit:
    """activation(norm(conv(x))): a convolution, and one pass for BatchNorm, SiLU and residual."""

    conv: nn.Conv2d
    norm: _BatchNorm | None
    """None: folded into the convolution."""
    silu: bool
    pointwise: bool
    width: int
    memory_format: torch.memory_format | None = None
    """In which the convolution reads its weights; None: as they are."""
    small: bool = False
    """A 3×3 convolution that the operator `convs` can compute, where the map is small."""

    def __call__(self, x: Sources, residual: Tensor | None = None, slot: Slot | None = None) -> Tensor:
        if self.norm is None:
            return self._folded(x, residual, slot)
        found = convolve_small(x, self.conv) if self.small else None
        y = convolve(x, self.conv, self.pointwise, memory_format=self.memory_format) if found is None else found[0]
        return self.normalised(y, residual, slot)

    def normalised(self, y: Tensor, residual: Tensor | None = None, slot: Slot | None = None) -> Tensor:
        """What follows the convolution."""
        norm = self.norm
        assert norm is not None
        own, training, momentum = arguments(norm)
        return bn_silu(
            y,
            *own,
            training=training,
            momentum=momentum,
            eps=norm.eps,
            residual=residual,
            out=None if slot is None else slot(y),
            activation=self.silu,
            group=process_group(norm) if training and type(norm) is not nn.BatchNorm2d else None,
        )

    def _folded(self, x: Sources, residual: Tensor | None, slot: Slot | None) -> Tensor:
        """Without gradients one pass follows the convolution, in place or into the slot.

        A CPU's convolution adds the bias itself; a GPU's leaves it to a pass of its own, so there it joins the SiLU.
        """
        if torch.is_grad_enabled():
            y = convolve(x, self.conv, self.pointwise, memory_format=self.memory_format)
            y = nn.functional.silu(y) if self.silu else y
            return y if residual is None else y + residual
        on_cpu = self.conv.weight.device.type == "cpu"
        y = convolve(x, self.conv, self.pointwise, add_bias=on_cpu, memory_format=self.memory_format)
        out = y if slot is None else slot(y)
        if not on_cpu:
            return bias_silu(y, self.conv.bias, residual=residual, out=out, activation=self.silu)
        if self.silu:
            torch.ops.aten.silu.out(y, out=out)
        elif out is not y:
            out.copy_(y)
        return out if residual is None else out.add_(residual)


def unit_reason(unit: Any) -> str | None:
    """Why `unit` is no convolution unit (children conv, bn and act, or conv with a bias and act); None when it is."""
    conv, norm, act = getattr(unit, "conv", None), getattr(unit, "bn", None), getattr(unit, "act", None)
    if type(conv) is not nn.Conv2d:
        return f"conv is {_kind(conv)}, not Conv2d"
    if conv.padding_mode != "zeros":
        return f"padding mode {conv.padding_mode!r}"
    if norm is not None and type(norm) not in (*_NORMS, nn.Identity):
        return f"bn is {_kind(norm)}, not BatchNorm2d"
    if type(act) not in (nn.SiLU, nn.Identity):
        return f"act is {_kind(act)}, not SiLU"
    for name, part in (("conv", conv), ("bn", norm), ("act", act)):
        if part is not None and not own_forward(part):
            return f"{name} has a forward of its own"
    return None


def _kind(module: Any) -> str:
    return "missing" if module is None else type(module).__name__


def unit(block: Any, planning: Planning) -> Unit | None:
    conv: Any = getattr(block, "conv", None)
    norm, act = getattr(block, "bn", None), getattr(block, "act", None)
    if not planning.plain(conv, norm, act) or unit_reason(block) is not None:
        return None
    planning.read(conv, "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "out_channels")
    return Unit(
        conv,
        norm if type(norm) in _NORMS else None,
        type(act) is nn.SiLU,
        is_pointwise(conv),
        conv.out_channels,
        getattr(type(block), MEMORY_FORMAT, None),
        is_same_size(conv) and not is_pointwise(conv),
    )


# ---- RepConv and the blocks made of it


@dataclass(frozen=True)
class RepUnit:
    """SiLU(BN(conv 3×3) + BN(conv 1×1)): two convolutions, and one pass for the rest."""

    first: Unit
    second: Unit
    act: nn.Module

    @property
    def width(self) -> int:
        return self.first.width

    def __call__(self, x: Tensor, residual: Tensor | None = None, slot: Slot | None = None) -> Tensor:
        first, second = self.first, self.second
        norm1, norm2 = first.norm, second.norm
        assert norm1 is not None
        assert norm2 is not None
        if norm1.training is not norm2.training:
            y: Tensor = self.act(first(x) + second(x))
            return y if residual is None else y + residual
        found = convolve_small(x, first.conv, second.conv) if first.small and second.pointwise else None
        if found is None:
            y1 = convolve(x, first.conv, first.pointwise, memory_format=first.memory_format)
            y2 = convolve(x, second.conv, second.pointwise, memory_format=second.memory_format)
        else:
            y1, y2 = found
        own1, training, momentum = arguments(norm1)
        own2, _, _ = arguments(norm2)
        return rep_bn_silu(
            y1,
            own1,
            y2,
            own2,
            training=training,
            momentum=momentum,
            eps=norm1.eps,
            residual=residual,
            out=None if slot is None else slot(y1),
            group=process_group(norm1) if training and type(norm1) is not nn.BatchNorm2d else None,
        )


def rep_reason(rep: Any) -> str | None:
    """Why `rep` is no RepConv of two branches (or one convolution, once fused); None when it is."""
    if type(getattr(rep, "act", None)) is not nn.SiLU:
        return f"act is {_kind(getattr(rep, 'act', None))}, not SiLU"
    if getattr(rep, "bn", None) is not None:
        return "it has an identity branch"
    branches = _branches(rep)
    if branches is None:
        return None if type(getattr(rep, "conv", None)) is nn.Conv2d else "no children conv1 and conv2, nor conv"
    for name, branch in zip(("conv1", "conv2"), branches, strict=True):
        reason = unit_reason(branch)
        if reason is None and type(branch.act) is not nn.Identity:
            reason = "act is not the identity"
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _branches(rep: Any) -> tuple[Any, Any] | None:
    first, second = getattr(rep, "conv1", None), getattr(rep, "conv2", None)
    return None if first is None or second is None else (first, second)


def rep_unit(block: Any, planning: Planning, branch_planner: Planner | None = None) -> Step | None:
    """`branch_planner`: for branches of classes that have no planner."""
    branches = _branches(block)
    if branches is None:
        return unit(block, planning)
    first, second = (planning.step(branch, branch_planner) for branch in branches)
    if not planning.plain(block.act) or rep_reason(block) is not None:
        return None
    if not (isinstance(first, Unit) and isinstance(second, Unit)):
        return None
    norms = [one.norm for one in (first, second)]
    for norm in norms:
        if norm is None or type(norm) is not type(norms[0]):
            return None
        planning.read(norm, *_NORM_READINGS)
    same = all(getattr(norms[0], name) == getattr(norms[1], name) for name in _NORM_READINGS)
    return RepUnit(first, second, block.act) if same else None


@dataclass(frozen=True)
class Bottleneck:
    """last(first(x)), plus x where it is residual: the sum is taken while the last step's result is written."""

    first: Step
    last: Step
    residual: bool

    @property
    def width(self) -> int | None:
        return self.last.width

    def __call__(self, x: Tensor, residual: Tensor | None = None, slot: Slot | None = None) -> Tensor:
        y = self.last(self.first(x), x if self.residual else None, slot)
        return y if residual is None else y + residual


def bottleneck(block: Any, planning: Planning) -> Bottleneck:
    planning.read(block, "residual", "add")
    residual = bool(getattr(block, "residual", getattr(block, "add", False)))
    return Bottleneck(planning.step(child(block, 1)), planning.step(child(block, 2)), residual)


@dataclass(frozen=True)
class Chain:
    """Steps one after the other."""

    before: tuple[Step, ...]
    last: Step

    @property
    def width(self) -> int | None:
        return self.last.width

    def __call__(self, x: Tensor, residual: Tensor | None = None, slot: Slot | None = None) -> Tensor:
        for step in self.before:
            x = step(x)
        return self.last(x, residual, slot)


def chain(modules: Sequence[nn.Module], planning: Planning) -> Step | None:
    """The step of a Sequential or of a list of modules; None for an empty one."""
    steps = [planning.step(module) for module in modules]
    return Chain(tuple(steps[:-1]), steps[-1]) if steps else None


@dataclass(frozen=True)
class Csp:
    """1×1 and bottlenecks on one branch, a 1×1 on the other, a 1×1 over both, in one buffer."""

    first: Step
    second: Step
    inner: Step
    last: Step
    channels: tuple[int, ...] | None

    @property
    def width(self) -> int | None:
        return self.last.width

    def __call__(self, x: Tensor, residual: Tensor | None = None, slot: Slot | None = None) -> Tensor:
        parts = Parts(self.channels)
        first, second = self.first, self.second
        if isinstance(x, Tensor) and _is_product(first) and _is_product(second):
            y1, y2 = conv1x1_pair(x, weight_of(first.conv), weight_of(second.conv))
            y, other = first.normalised(y1), second.normalised(y2, None, parts.slot(1))
        else:
            y, other = first(x), second(x, None, parts.slot(1))
        return self.last(parts.joined(self.inner(y, None, parts.slot(0)), other), residual, slot)


def _is_product(step: Step) -> TypeGuard[Unit]:
    """Whether `step` is a 1×1 convolution without bias and a norm, so that it can read its input with another."""
    return isinstance(step, Unit) and step.pointwise and step.norm is not None and step.conv.bias is None


def csp(block: Any, planning: Planning) -> Csp | None:
    first, second, last = (planning.step(child(block, number)) for number in (1, 2, 3))
    inner = inner_blocks(block)
    if isinstance(inner, nn.ModuleList):
        planning.plain(inner)
        step = chain([*inner], planning)
    else:
        step = planning.step(inner)
    return None if step is None else Csp(first, second, step, last, widths(step, second))


@dataclass(frozen=True)
class Elan:
    """Split of the first step's result, stages in a chain on its second half, a 1×1 over all parts, in one buffer."""

    first: Step
    stages: tuple[Step, ...]
    last: Step
    channels: tuple[int, ...] | None
    """Of both halves and of every stage; None where one of them does not write into its slot."""

    @property
    def width(self) -> int | None:
        return self.last.width

    def __call__(self, x: Sources, residual: Tensor | None = None, slot: Slot | None = None) -> Tensor:
        parts = Parts(self.channels)
        y = self.first(x, None, parts.slot(0, 2))
        halves, y = tap(y, (y.shape[1] + 1) // 2)
        results = [halves]
        for number, stage in enumerate(self.stages, start=2):
            y = stage(y, None, parts.slot(number))
            results.append(y)
        return self.last(parts.joined(*results), residual, slot)


def elan(block: Any, planning: Planning) -> Elan:
    first, *stages, last = map(planning.step, numbered(block))
    half = None if first.width is None or first.width % 2 else first.width // 2
    others = widths(*stages)
    channels = None if half is None or others is None else (half, half, *others)
    return Elan(first, tuple(stages), last, channels)


@dataclass(frozen=True)
class SppElan:
    """1×1, three successive max pools 5×5, 1×1 over all four, in one buffer."""

    first: Step
    last: Step

    @property
    def width(self) -> int | None:
        return self.last.width

    def __call__(self, x: Tensor, residual: Tensor | None = None, slot: Slot | None = None) -> Tensor:
        parts = Parts(None if self.first.width is None else (self.first.width,) * 4)
        y = self.first(x, None, parts.slot(0))
        return self.last(parts.joined(*spp_with_input(y, parts.slots(y, 1, 2, 3))), residual, slot)


def spp_elan(block: Any, planning: Planning) -> SppElan:
    return SppElan(planning.step(child(block, 1)), planning.step(child(block, 5)))


@dataclass(frozen=True)
class ADown:
    """Average pool, then two halves (Conv 3×3 stride 2; max pool, Conv 1×1) written into one buffer."""

    first: Step
    second: Step
    channels: tuple[int, ...] | None
    width: None = None

    def __call__(self, x: Tensor, residual: Tensor | None = None, slot: Slot | None = None) -> Tensor:
        parts = Parts(self.channels)
        left, right = adown_pool(x)
        assert right is not None
        y = parts.joined(self.first(left, None, parts.slot(0)), self.second(right, None, parts.slot(1)))
        return y if residual is None else y + residual


def a_down(block: Any, planning: Planning) -> ADown:
    first, second = planning.step(child(block, 1)), planning.step(child(block, 2))
    return ADown(first, second, widths(first, second))


@dataclass(frozen=True)
class AConv:
    """Average pool, then Conv 3×3 stride 2."""

    unit: Step

    @property
    def width(self) -> int | None:
        return self.unit.width

    def __call__(self, x: Tensor, residual: Tensor | None = None, slot: Slot | None = None) -> Tensor:
        return self.unit(adown_pool(x, split=False)[0], residual, slot)


def a_conv(block: Any, planning: Planning) -> AConv:
    return AConv(planning.step(a_conv_unit(block)))


@dataclass(frozen=True)
class CbFuse:
    """Sum of the chosen split of every CBLinear, nearest-resized to the last input, and the last input itself."""

    indices: tuple[int, ...]
    width: None = None

    def __call__(self, x: Sequence[Any], residual: Tensor | None = None, slot: Slot | None = None) -> Tensor:
        target: Tensor = x[-1]
        chosen = [split[index] for split, index in zip(x[:-1], self.indices, strict=True)]
        y = cbfuse(chosen, target) if chosen else target
        return y if residual is None else y + residual


def cb_fuse(block: Any, planning: Planning) -> CbFuse:
    planning.read(block, *_INDICES)
    indices = cb_fuse_indices(block)
    assert indices is not None
    return CbFuse(tuple(indices))


KNOWN_FORWARDS[nn.Sequential.forward] = chain


# ---- the structure of blocks, whoever built them


def child(block: Any, number: int) -> Any:
    """The numbered child, `cv1` here and in the official code, `conv1` elsewhere; None when there is none."""
    found = getattr(block, f"cv{number}", None)
    return getattr(block, f"conv{number}", None) if found is None else found


def numbered(block: Any) -> list[Any]:
    """The children 1, 2, … up to the first number that is missing."""
    found: list[Any] = []
    while (module := child(block, len(found) + 1)) is not None:
        found.append(module)
    return found


def inner_blocks(block: Any) -> Any:
    """The bottlenecks of a CSP block: a Sequential, a ModuleList, or another module; None when there are none."""
    found = getattr(block, "m", None)
    return getattr(block, "bottleneck", None) if found is None else found


def a_conv_unit(block: Any) -> Any:
    """The convolution of an AConv, under either of its names."""
    return getattr(block, "cv1", None) or getattr(block, "conv", None)


_INDICES = ("indices", "idx", "index")


def cb_fuse_indices(block: Any) -> Sequence[int] | None:
    """Which split of each CBLinear a CBFuse takes; the attribute has three names in the field."""
    return next((getattr(block, name) for name in _INDICES if hasattr(block, name)), None)
