"""Fusion of multi-level reversible information: out = Σ_i resize(x_i) + target, nearest neighbour.

CBFuse of the auxiliary reversible branch (YOLOv9, arXiv 2402.13616, section 3.1 and appendix). One pass instead of a
resized copy and a sum for each input; its gradient sums the target's gradient over the positions that read a source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov9_fast._layout import check_map, in_layout_of, memory_format_of
from yolov9_fast.ops import _library as library
from yolov9_fast.ops._backend import Implementation, Operator, not_on, register, select
from yolov9_fast.ops._interpreted import runs_triton, triton_launcher, triton_missing


def cbfuse(inputs: Sequence[Tensor], target: Tensor) -> Tensor:
    """Sum of `inputs` [B, C, H_i, W_i], each resized to `target` [B, C, H, W] by nearest neighbour, and of `target`.

    Added in the listed order, the target last; in float32 for bfloat16 and float16. Inputs may be channel slices. Any
    ratio of sizes, as `F.interpolate(mode="nearest")` takes them. Without inputs the result is `target`. Differentiable
    once; the result is dense, in the layout of `target`. Raises `TypeError`/`ValueError` that name the argument.
    """
    _check(inputs, target)
    if not inputs:
        return target
    if torch.is_autocast_enabled(target.device.type):
        inputs, target = _promoted(inputs, target)
    result: Tensor = select(OPERATOR, inputs, target)(inputs, target)
    return result


def cbfuse_reference(inputs: Sequence[Tensor], target: Tensor) -> Tensor:
    """The definition, in eager PyTorch."""
    total = F.interpolate(inputs[0], size=target.shape[2:], mode="nearest")
    for x in inputs[1:]:
        total = total + F.interpolate(x, size=target.shape[2:], mode="nearest")
    return total + target


def _check(inputs: Sequence[Tensor], target: Tensor) -> None:
    check_map("cbfuse", "target", target)
    for number, x in enumerate(inputs):
        check_map("cbfuse", f"inputs[{number}]", x)
        if x.shape[:2] != target.shape[:2]:
            raise ValueError(
                f"cbfuse: inputs[{number}] must have batch and channels {list(target.shape[:2])} as the target, "
                f"got {list(x.shape)}"
            )
        if x.device != target.device:
            raise ValueError(f"cbfuse: inputs[{number}] must be on {target.device} as the target, got {x.device}")
        if x.dtype != target.dtype and not torch.is_autocast_enabled(target.device.type):
            raise TypeError(f"cbfuse: inputs[{number}] must be {target.dtype} as the target, got {x.dtype}")
        if 0 in x.shape[2:] and 0 not in target.shape:
            raise ValueError(f"cbfuse: inputs[{number}] must have pixels to resize, got {list(x.shape)}")


def _promoted(inputs: Sequence[Tensor], target: Tensor) -> tuple[list[Tensor], Tensor]:
    """Under autocast maps may come in several dtypes; a sum promotes them to the widest."""
    dtype = target.dtype
    for x in inputs:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in inputs], target.to(dtype)


@dataclass(frozen=True)
class _Kernels:
    """One implementation's two raw operators, and its name in `_kernels`."""

    name: str
    forward: Callable[[list[Tensor], Tensor], Tensor]
    backward: Callable[[Tensor, list[int], list[int]], list[Tensor]]

    def __call__(self, inputs: Sequence[Tensor], target: Tensor) -> Tensor:
        result: Tensor = _CBFuse.apply(self.name, target, *inputs)
        return result


class _CBFuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, target: Tensor, *inputs: Tensor) -> Tensor:
        ctx.name = name
        ctx.like = memory_format_of(target)
        ctx.sizes = [(x.shape[2], x.shape[3]) for x in inputs]
        maps = in_layout_of(target, [target, *inputs])
        return _kernels[name].forward(maps[1:], maps[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        size = (dz.shape[2], dz.shape[3])
        # An input of the target's size is added as it is: its gradient is the target's.
        resized = [index for index, own in enumerate(ctx.sizes) if own != size and ctx.needs_input_grad[2 + index]]
        gradients: list[Tensor | None] = [dz if own == size else None for own in ctx.sizes]
        if resized:
            heights = [ctx.sizes[index][0] for index in resized]
            widths = [ctx.sizes[index][1] for index in resized]
            (readable,) = in_layout_of(dz, [dz], ctx.like)
            for index, gradient in zip(resized, _kernels[ctx.name].backward(readable, heights, widths), strict=True):
                gradients[index] = gradient
        return None, dz, *gradients


def forward_reference(inputs: list[Tensor], target: Tensor) -> Tensor:
    """The raw operator `cbfuse_forward`, defined."""
    return cbfuse_reference(inputs, target).contiguous(memory_format=memory_format_of(target))


def backward_reference(dz: Tensor, heights: list[int], widths: list[int]) -> list[Tensor]:
    """The raw operator `cbfuse_backward`, defined: of an input [B, C, heights[i], widths[i]] each."""
    batch, channels, height, width = dz.shape
    return [
        torch.ops.aten.upsample_nearest2d_backward(dz, [height, width], [batch, channels, h, w]).contiguous(
            memory_format=memory_format_of(dz)
        )
        for h, w in zip(heights, widths, strict=True)
    ]


def _fake_forward(inputs: list[Tensor], target: Tensor) -> Tensor:
    return torch.empty(target.shape, dtype=target.dtype, device=target.device, memory_format=memory_format_of(target))


def _fake_backward(dz: Tensor, heights: list[int], widths: list[int]) -> list[Tensor]:
    return [
        torch.empty(
            (dz.shape[0], dz.shape[1], h, w), dtype=dz.dtype, device=dz.device, memory_format=memory_format_of(dz)
        )
        for h, w in zip(heights, widths, strict=True)
    ]


_FORWARD = "(Tensor[] inputs, Tensor target) -> Tensor"
_BACKWARD = "(Tensor dz, int[] heights, int[] widths) -> Tensor[]"
_kernels = {
    "cpu": _Kernels(
        "cpu",
        library.define(f"cbfuse_forward{_FORWARD}", fake=_fake_forward, reference=forward_reference),
        library.define(f"cbfuse_backward{_BACKWARD}", fake=_fake_backward, reference=backward_reference),
    ),
    "triton": _Kernels(
        "triton",
        library.define(
            f"cbfuse_forward_triton{_FORWARD}",
            fake=_fake_forward,
            reference=triton_launcher("cbfuse", "cbfuse_forward"),
        ),
        library.define(
            f"cbfuse_backward_triton{_BACKWARD}",
            fake=_fake_backward,
            reference=triton_launcher("cbfuse", "cbfuse_backward"),
        ),
    ),
}


def _supports_cpu(inputs: Sequence[Tensor], target: Tensor) -> str | None:
    return not_on("cpu", target, *inputs)


def _supports_triton(inputs: Sequence[Tensor], target: Tensor) -> str | None:
    return runs_triton("cbfuse", target, *inputs)


OPERATOR = register(
    Operator(
        "cbfuse",
        "sum of maps nearest-resized to a target, in one pass",
        {
            "eager": Implementation(cbfuse_reference),
            "cpu": Implementation(_kernels["cpu"], library.missing("cbfuse_forward", "cpu"), _supports_cpu),
            "triton": Implementation(_kernels["triton"], triton_missing(), _supports_triton),
        },
        order=("cpu", "triton", "eager"),
    )
)
