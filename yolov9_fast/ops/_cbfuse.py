"""Fusion of multi-level reversible information: out = Σ_i resize(x_i) + target, nearest neighbour.

CBFuse of the auxiliary reversible branch (YOLOv9, arXiv 2402.13616, section 3.1 and appendix). One pass instead of a
resized copy and a sum for each input; its gradient sums the target's gradient over the positions that read a source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov9_fast._layout import dense, empty_map, in_layout_of, memory_format_of
from yolov9_fast.ops._checks import check_map, maps_of
from yolov9_fast.ops._operator import AutogradFunction, Compiled, Kernel, Operator, Python, once_differentiable
from yolov9_fast.ops._supports import not_for_triton, not_on


def cbfuse(inputs: Sequence[Tensor], target: Tensor) -> Tensor:
    """Sum of `inputs` [B, C, H_i, W_i], each resized to `target` [B, C, H, W] by nearest neighbour, and of `target`.

    Added in the listed order, the target last; in float32 for bfloat16 and float16. Inputs may be channel slices. Any
    ratio of sizes, as `F.interpolate(mode="nearest")` takes them. Without inputs the result is `target`. Differentiable
    once; the result is dense, in the layout of `target`. Raises `TypeError`/`ValueError` that name the argument.
    """
    inputs = maps_of("inputs", inputs)
    _check(inputs, target)
    if not inputs:
        return target
    if torch.is_autocast_enabled(target.device.type):
        inputs, target = _promoted(inputs, target)
    result: Tensor = OPERATOR(inputs, target)
    return result


def cbfuse_reference(inputs: Sequence[Tensor], target: Tensor) -> Tensor:
    """The definition, in eager PyTorch."""
    total = F.interpolate(inputs[0], size=target.shape[2:], mode="nearest")
    for x in inputs[1:]:
        total = total + F.interpolate(x, size=target.shape[2:], mode="nearest")
    return total + target


def _check(inputs: Sequence[Tensor], target: Tensor) -> None:
    check_map("target", target)
    for number, x in enumerate(inputs):
        name = f"inputs[{number}]"
        check_map(name, x)
        if x.shape[:2] != target.shape[:2]:
            raise ValueError(f"{name}: expected batch and channels {list(target.shape[:2])}, got {list(x.shape)}")
        if x.device != target.device:
            raise ValueError(f"{name}: expected a tensor on {target.device}, got one on {x.device}")
        if x.dtype != target.dtype and not torch.is_autocast_enabled(target.device.type):
            raise TypeError(f"{name}: expected {target.dtype} as the target, got {x.dtype}")


def _promoted(inputs: Sequence[Tensor], target: Tensor) -> tuple[list[Tensor], Tensor]:
    """Under autocast maps may come in several dtypes; a sum promotes them to the widest."""
    dtype = target.dtype
    for x in inputs:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in inputs], target.to(dtype)


# ---- kernels


def forward_reference(inputs: list[Tensor], target: Tensor) -> Tensor:
    """Kernel `cbfuse_forward`."""
    return dense(cbfuse_reference(inputs, target), memory_format_of(target))


def backward_reference(dz: Tensor, heights: list[int], widths: list[int]) -> list[Tensor]:
    """Kernel `cbfuse_backward`: the gradient of each input [B, C, heights[i], widths[i]]."""
    batch, channels, height, width = dz.shape
    # Copied, not `contiguous`: of one pixel that would keep any strides.
    return [
        empty_map(dz, size=(h, w)).copy_(
            torch.ops.aten.upsample_nearest2d_backward(dz, [height, width], [batch, channels, h, w])
        )
        for h, w in zip(heights, widths, strict=True)
    ]


class _Kernels(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., Any]


KERNELS = _Kernels(
    Kernel(
        "cbfuse_forward(Tensor[] inputs, Tensor target) -> Tensor",
        forward_reference,
        lambda inputs, target: empty_map(target),
    ),
    Kernel(
        "cbfuse_backward(Tensor dz, int[] heights, int[] widths) -> Tensor[]",
        backward_reference,
        lambda dz, heights, widths: [empty_map(dz, size=size) for size in zip(heights, widths, strict=True)],
    ),
)


# ---- gradient


def _run(kernels: _Kernels, inputs: Sequence[Tensor], target: Tensor) -> Tensor:
    result: Tensor = _CBFuse.apply(kernels, target, *inputs)
    return result


class _CBFuse(AutogradFunction):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        kernels, target, *inputs = arguments
        ctx.kernels = kernels
        ctx.like = memory_format_of(target)
        ctx.sizes = [(x.shape[2], x.shape[3]) for x in inputs]
        maps = in_layout_of(target, [target, *inputs])
        result: Tensor = kernels.forward(maps[1:], maps[0])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        size = (dz.shape[2], dz.shape[3])
        # An input of the target's size is added as it is: its gradient is the target's.
        resized = [index for index, own in enumerate(ctx.sizes) if own != size and ctx.needs_input_grad[2 + index]]
        gradients: list[Tensor | None] = [dz if own == size else None for own in ctx.sizes]
        if resized:
            heights = [ctx.sizes[index][0] for index in resized]
            widths = [ctx.sizes[index][1] for index in resized]
            (readable,) = in_layout_of(dz, [dz], ctx.like)
            for index, gradient in zip(resized, ctx.kernels.backward(readable, heights, widths), strict=True):
                gradients[index] = gradient
        return None, dz, *gradients


# ---- backends


def _supports_cpu(inputs: Sequence[Tensor], target: Tensor) -> str | None:
    return not_on("cpu", target, *inputs)


def _supports_triton(inputs: Sequence[Tensor], target: Tensor) -> str | None:
    return not_for_triton("cbfuse", target, *inputs)


def _triton() -> _Kernels:
    from yolov9_fast.kernels.cbfuse import cbfuse_backward, cbfuse_forward

    return _Kernels(cbfuse_forward, cbfuse_backward)


OPERATOR = Operator(
    "cbfuse",
    "sum of maps nearest-resized to a target, in one pass",
    reference=cbfuse_reference,
    kernels=KERNELS,
    run=_run,
    backends={"cpu": Compiled(_supports_cpu), "triton": Python(_triton, _supports_triton)},
)
