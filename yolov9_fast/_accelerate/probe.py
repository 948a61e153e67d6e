"""Whether the class of a block computes what its name says: its own forward and the plan on one small input."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from yolov9_fast._accelerate.matching import FOLDED, Kind
from yolov9_fast.nn import steps
from yolov9_fast.nn.plan import Planning
from yolov9_fast.ops._backend import backend

_SIZE = 8
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def differs(module: nn.Module, kind: Kind) -> bool | None:
    """Whether a copy of `module`, in float64 and evaluation mode, gives another result by its forward than by a plan.

    None where it cannot be run here, as on the meta device, or where running the copy might run the module itself: a
    forward that was set on an instance may hold what it was made for.
    """
    if not all(map(_copied_whole, module.modules())):
        return None
    method = FOLDED if "forward" in vars(module) else "forward"
    try:
        twin = _twin(module)
        x = _input(twin)
        if x is None:
            return None
        planning = Planning(twin)
        step = kind.planner(twin, planning)
        if step is None:
            return None
        with torch.no_grad(), backend("eager"):
            own = getattr(type(twin), method)(twin, x)
            return not torch.allclose(own, step(x), rtol=1e-6, atol=1e-9)
    except Exception:  # other code may fail in any way
        return None


def _copied_whole(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return forward is None or (getattr(forward, "__self__", None) is module and forward.__name__ == FOLDED)


def _twin(module: nn.Module) -> nn.Module:
    """A copy without hooks, whose statistics are not the ones that hide an omitted norm."""
    twin = copy.deepcopy(module).cpu().double().eval()
    generator = torch.Generator().manual_seed(0)
    for each in twin.modules():
        for name in _HOOKS:
            getattr(each, name).clear()
        if isinstance(each, nn.BatchNorm2d) and each.running_var is not None:
            each.running_var.uniform_(0.5, 1.5, generator=generator)
    return twin


def _input(module: Any) -> Any:
    """Random maps for `module`; None where their channels are not known."""
    indices = steps.cb_fuse_indices(module)
    generator = torch.Generator().manual_seed(0)

    def map_of(channels: int, size: int = _SIZE) -> Tensor:
        return torch.randn(1, channels, size, size, generator=generator, dtype=torch.float64)

    if indices is not None:
        return [*([map_of(3, _SIZE // 2) for _ in range(index + 1)] for index in indices), map_of(3)]
    channels = _in_channels(module)
    return None if channels is None else map_of(channels)


def _in_channels(module: Any) -> int | None:
    if isinstance(module, nn.Conv2d):
        return module.in_channels
    first = steps.a_conv_unit(module) if steps.child(module, 1) is None else steps.child(module, 1)
    if first is None or (channels := _in_channels(first)) is None:
        return None
    return 2 * channels if type(module).__name__ == "ADown" else channels
