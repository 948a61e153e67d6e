"""What the blocks compute, fused and without copies, on modules of the right structure whoever built them.

The blocks of `nn.blocks` and, through `accelerate`, those of other code run the same functions. A unit is a module with
children `conv`, `bn` and `act`; where a child is of an unexpected type or carries hooks it is called as it is.
Slots: in a CSP-ELAN block every producer writes where the aggregation reads (`ops.concat`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from yolov9_fast.nn.sync_batch_norm import SyncBatchNorm2d
from yolov9_fast.ops._adown_pool import adown_pool
from yolov9_fast.ops._backend import fuses, get_backend
from yolov9_fast.ops._batch_norm import Norm
from yolov9_fast.ops._bn_silu import bn_silu
from yolov9_fast.ops._cbfuse import cbfuse
from yolov9_fast.ops._concat import ConcatBuffer, tap
from yolov9_fast.ops._conv1x1 import conv1x1_pair
from yolov9_fast.ops._conv_bn_silu import (
    Convolution,
    Sources,
    Upsampled,
    conv_bias_silu,
    conv_bn_silu,
    convolve,
    joined,
)
from yolov9_fast.ops._rep_bn_silu import rep_bn_silu
from yolov9_fast.ops._spp import spp_with_input


def fused(x: Any) -> bool:
    """Whether blocks run fused on this input: where `bn_silu` runs anything but its eager form.

    torch.compile fuses the eager form by itself, so there only a backend set by name counts. So it is without gradients
    on a CPU: the convolution adds the bias, SiLU works in place, copies are cheap, and the eager form was 1.0 to 1.3
    times as fast (gelan-t and -s, folded, batches of 1 and 8).
    """
    while not isinstance(x, Tensor):
        x = x.source if isinstance(x, Upsampled) else x[-1]
    if x.device.type == "cpu" and not torch.is_grad_enabled() and get_backend("bn_silu") == "auto":
        return False
    return fuses("bn_silu", x)


_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm2d)
_NORMS_OR_NONE = (*_NORMS, nn.Identity)
_ACTIVATIONS = (nn.SiLU, nn.Identity)


class Slot:
    """Channels of a concatenation that a producer is asked to write into."""

    def __init__(self, slots: Slots, first: int, count: int) -> None:
        self.slots, self.first, self.count = slots, first, count

    def open(self, like: Tensor) -> Tensor:
        """The slice to write into, of the batch, size, dtype and layout of `like`, the producer's own tensor."""
        if self.slots.buffer is None:
            self.slots.buffer = ConcatBuffer.beside(like, self.slots.widths)
        self.slots.written += self.count
        return self.slots.buffer.slot(self.first, self.count)


class Slots:
    """The slots of one concatenation, made when the first producer writes."""

    def __init__(self, widths: Sequence[int]) -> None:
        self.widths = tuple(widths)
        self.buffer: ConcatBuffer | None = None
        self.written = 0

    def __call__(self, first: int, count: int = 1) -> Slot:
        return Slot(self, first, count)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """All parts side by side; a producer that could not write into its slot costs one copy of everything."""
        if self.buffer is None or self.written < len(self.widths):
            return torch.cat(tuple(parts), 1)
        return self.buffer.join(*parts)


def unit_reason(unit: Any) -> str | None:
    """Why `unit` is no convolution unit (children conv, bn and act, or conv with a bias and act); None when it is."""
    conv, norm, act = getattr(unit, "conv", None), getattr(unit, "bn", None), getattr(unit, "act", None)
    if type(conv) is not nn.Conv2d:
        return f"conv is {_kind(conv)}, not Conv2d"
    if conv.padding_mode != "zeros":
        return f"padding mode {conv.padding_mode!r}"
    if norm is not None and type(norm) not in (*_NORMS, nn.Identity):
        return f"bn is {_kind(norm)}, not BatchNorm2d"
    if type(act) not in _ACTIVATIONS:
        return f"act is {_kind(act)}, not SiLU"
    return None


def _kind(module: Any) -> str:
    return "missing" if module is None else type(module).__name__


def hooked(*modules: Any) -> bool:
    """Whether one of the modules (None and others are passed over) has hooks that a direct call would leave out."""
    for m in modules:
        if isinstance(m, nn.Module) and (
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        ):
            return True
    return False


def _overridden(unit: Any) -> bool:
    """Whether the instance has a forward of its own that is neither ours nor the one of a folded unit."""
    forward = unit.__dict__.get("forward")
    name = getattr(getattr(forward, "func", forward), "__name__", "")
    return forward is not None and name not in ("accelerated_forward", "forward_fuse")


def _fusible(unit: Any) -> bool:
    """`unit_reason` is None and no child has hooks; asked at every call, so without detours."""
    children = unit._modules
    conv, norm, act = children.get("conv"), children.get("bn"), children.get("act")
    return (
        type(conv) is nn.Conv2d
        and type(act) in _ACTIVATIONS
        and (norm is None or type(norm) in _NORMS_OR_NONE)
        and conv.padding_mode == "zeros"
        and not hooked(conv, norm, act)
    )


def conv_unit(unit: Any, x: Sources, *, residual: Tensor | None = None, slot: Slot | None = None) -> Tensor:
    """act(bn(conv(x))) (+ residual) of a unit; several inputs stand for their concatenation."""
    if not _fusible(unit):
        inner = unit.conv(joined(x))
        norm = getattr(unit, "bn", None)
        y = unit.act(inner if norm is None else norm(inner))
        return y if residual is None else y + residual
    return _fused_unit(unit, x, residual, slot)


def _fused_unit(unit: Any, x: Sources, residual: Tensor | None, slot: Slot | None) -> Tensor:
    children = unit._modules
    conv, norm, silu = convolution(children["conv"]), children.get("bn"), type(children["act"]) is nn.SiLU
    out = None if slot is None else slot.open
    if norm is None or type(norm) is nn.Identity:
        return conv_bias_silu(x, conv, residual=residual, out=out, activation=silu)
    return conv_bn_silu(x, conv, norm.weight, norm.bias, **_options(norm), residual=residual, out=out, activation=silu)


def _options(norm: Any) -> dict[str, Any]:
    """A BatchNorm's statistics and mode, as `bn_silu` takes them; counts the batch."""
    mean, var, training, momentum = statistics(norm)
    return {
        "running_mean": mean,
        "running_var": var,
        "training": training,
        "momentum": momentum,
        "eps": norm.eps,
        "group": process_group(norm) if training else None,
    }


def convolution(conv: nn.Conv2d) -> Convolution:
    return Convolution(conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def statistics(norm: Any) -> tuple[Tensor | None, Tensor | None, bool, float]:
    """running_mean, running_var, whether to use the batch's own statistics, and momentum, as BatchNorm2d decides them.

    Counts the batch, as BatchNorm2d does.
    """
    mean, var = norm.running_mean, norm.running_var
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1 / float(norm.num_batches_tracked)
    training = norm.training or (mean is None and var is None)
    if norm.training and not norm.track_running_stats:
        mean, var = None, None
    return mean, var, training, momentum


def process_group(norm: Any) -> Any:
    """The group whose batches a synchronised BatchNorm shares; None where it is alone or no such."""
    if type(norm) is nn.BatchNorm2d or not (dist.is_available() and dist.is_initialized()):
        return None
    group = getattr(norm, "process_group", None) or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


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


def rep_conv(rep: Any, x: Tensor, *, slot: Slot | None = None) -> Tensor:
    """SiLU(BN(conv 3×3) + BN(conv 1×1)), or the one convolution and SiLU of a fused one."""
    branches = _branches(rep)
    if branches is None:
        if hooked(rep.conv, rep.act):
            return rep.act(rep.conv(x))
        return conv_bias_silu(x, convolution(rep.conv), out=None if slot is None else slot.open)
    plain = not hooked(*branches, rep.act) and not any(map(_overridden, branches)) and all(map(_fusible, branches))
    if not plain or not _same_mode(*(getattr(branch, "bn", None) for branch in branches)):
        return rep.act(branches[0](x) + branches[1](x))
    first, second = (convolve(x, convolution(branch.conv)) for branch in branches)
    norms = [branch.bn for branch in branches]
    (mean1, var1, training, momentum), (mean2, var2, _, _) = map(statistics, norms)
    return rep_bn_silu(
        first,
        Norm(norms[0].weight, norms[0].bias, mean1, var1),
        second,
        Norm(norms[1].weight, norms[1].bias, mean2, var2),
        training=training,
        momentum=momentum,
        eps=norms[0].eps,
        out=None if slot is None else slot.open(first),
        group=process_group(norms[0]) if training else None,
    )


def _same_mode(first: Any, second: Any) -> bool:
    """Whether two BatchNorms normalise by the same rule, so that one pass can serve both."""
    return (
        type(first) in _NORMS
        and type(first) is type(second)
        and all(
            getattr(first, name) == getattr(second, name)
            for name in ("training", "momentum", "eps", "track_running_stats", "num_features")
        )
    )


def child(block: Any, number: int) -> Any:
    """The numbered child, `cv1` here and in the official code, `conv1` elsewhere; None when there is none."""
    found = getattr(block, f"cv{number}", None)
    return getattr(block, f"conv{number}", None) if found is None else found


def has_residual(block: Any) -> bool:
    """Whether a bottleneck adds its input; the attribute has two names in the field."""
    return bool(getattr(block, "residual", getattr(block, "add", False)))


def bottleneck(block: Any, x: Tensor, *, slot: Slot | None = None) -> Tensor:
    """Conv 3×3(RepConv(x)), plus x where it is residual: the sum is taken while the last unit is written."""
    return last_unit(child(block, 2), child(block, 1)(x), residual=x if has_residual(block) else None, slot=slot)


def inner_blocks(block: Any) -> list[Any]:
    """The bottlenecks of a CSP block."""
    found: Any = getattr(block, "m", None) or getattr(block, "bottleneck", ())
    return list(found)


def csp(block: Any, x: Tensor) -> Tensor:
    """Cross-stage-partial block: 1×1 and bottlenecks beside a 1×1, then a 1×1 over both, all in one buffer."""
    first, second, last = (child(block, number) for number in (1, 2, 3))
    slots = Slots((_out_channels(first), _out_channels(second)))
    if isinstance(x, Tensor) and _reads_once(first) and _reads_once(second):
        pair = conv1x1_pair(x, first.conv.weight, second.conv.weight)
        y, beside = (
            _normalised(unit, part, slot)
            for unit, part, slot in zip((first, second), pair, (None, slots(1)), strict=True)
        )
    else:
        y, beside = first(x), last_unit(second, x, slot=slots(1))
    *before, deepest = inner_blocks(block)
    for inner in before:
        y = inner(y)
    y = deepest(y) if hooked(deepest) else bottleneck(deepest, y, slot=slots(0))
    return last_unit(last, slots.join((y, beside)))


def _reads_once(unit: Any) -> bool:
    """Whether `unit` is a plain 1×1 unit, so that it can read its input together with another."""
    if hooked(unit) or _overridden(unit) or not _fusible(unit):
        return False
    conv = convolution(unit.conv)
    return conv.pointwise and conv.bias is None and type(getattr(unit, "bn", None)) in _NORMS


def _normalised(unit: Any, y: Tensor, slot: Slot | None) -> Tensor:
    """What follows the convolution in a unit."""
    out = None if slot is None else slot.open(y)
    silu = type(unit.act) is nn.SiLU
    return bn_silu(y, unit.bn.weight, unit.bn.bias, **_options(unit.bn), out=out, activation=silu)


def elan(block: Any, x: Sources) -> Tensor:
    """ELAN and CSP-ELAN: split, stages in a chain on the second half, a 1×1 over everything, all in one buffer."""
    first, *stages, last = numbered(block)
    half = _out_channels(first) // 2
    slots = Slots((half, half, *(_out_channels(tail_unit(stage)) for stage in stages)))
    whole = last_unit(first, x, slot=slots(0, 2))
    whole, part = tap(whole, half)
    parts = [whole]
    for number, stage in enumerate(stages, start=2):
        part = _stage(stage, part, slots(number))
        parts.append(part)
    return last_unit(last, slots.join(parts))


def numbered(block: Any) -> list[Any]:
    """Children 1, 2, … as far as they go."""
    found: list[Any] = []
    while (module := child(block, len(found) + 1)) is not None:
        found.append(module)
    return found


def _stage(stage: Any, x: Tensor, slot: Slot) -> Tensor:
    if not isinstance(stage, nn.Sequential):
        return last_unit(stage, x, slot=slot)
    if hooked(stage):
        return stage(x)
    *before, last = stage
    for module in before:
        x = module(x)
    return last_unit(last, x, slot=slot)


def tail_unit(stage: Any) -> Any:
    return stage[-1] if isinstance(stage, nn.Sequential) else stage


def _out_channels(unit: Any) -> int:
    return unit.conv.out_channels


def spp_elan(block: Any, x: Tensor) -> Tensor:
    """SPP-ELAN: 1×1, three successive max pools 5×5, 1×1 over all four, in one buffer from the start."""
    first, last = child(block, 1), child(block, 5)
    slots = Slots((_out_channels(first),) * 4)
    y = last_unit(first, x, slot=slots(0))
    parts = spp_with_input(y, out=[slots(number).open(y) for number in (1, 2, 3)])
    return last_unit(last, slots.join(parts))


def a_down(block: Any, x: Tensor) -> Tensor:
    """ADown: average pool, then two halves (Conv 3×3 stride 2; max pool, Conv 1×1) written side by side."""
    first, second = child(block, 1), child(block, 2)
    slots = Slots((_out_channels(first), _out_channels(second)))
    left, right = adown_pool(x)
    assert right is not None
    return slots.join((last_unit(first, left, slot=slots(0)), last_unit(second, right, slot=slots(1))))


def a_conv(block: Any, x: Tensor) -> Tensor:
    """AConv: average pool, then Conv 3×3 stride 2."""
    return a_conv_unit(block)(adown_pool(x, split=False)[0])


def a_conv_unit(block: Any) -> Any:
    """The convolution of an AConv, under either of its names."""
    return getattr(block, "cv1", None) or getattr(block, "conv", None)


def cb_fuse(block: Any, inputs: Sequence[Any]) -> Tensor:
    """Sum of the chosen split of every CBLinear, nearest-resized to the last input, and the last input itself."""
    indices = cb_fuse_indices(block)
    assert indices is not None
    target = inputs[-1]
    chosen = [split[index] for split, index in zip(inputs[:-1], indices, strict=True)]
    return cbfuse(chosen, target) if chosen else target


def cb_fuse_indices(block: Any) -> Sequence[int] | None:
    """Which split of each CBLinear a CBFuse takes; the attribute has three names in the field."""
    return next((getattr(block, name) for name in ("indices", "idx", "index") if hasattr(block, name)), None)


def last_unit(unit: Any, x: Sources, *, residual: Tensor | None = None, slot: Slot | None = None) -> Tensor:
    """`unit` on x into `slot`, unless it has hooks of its own or is no unit: then as it is called anywhere."""
    if hooked(unit) or _overridden(unit) or not _fusible(unit):
        y = unit(joined(x))
        return y if residual is None else y + residual
    return _fused_unit(unit, x, residual, slot)
