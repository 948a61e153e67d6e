"""Spatial pyramid pooling of SPP-ELAN: three stacked max pools 5×5, stride 1, in one pass (fields 5, 9, 13).

YOLOv9, arXiv 2402.13616, section 4.1 and appendix; the pools' results go where the aggregation reads them. The backward
finds the maxima again from the maps: no index tensors are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov9_fast._layout import check_map, in_layout_of, layout_of, memory_format_of
from yolov9_fast.ops import _library as library
from yolov9_fast.ops._backend import Implementation, Operator, not_on, register, select
from yolov9_fast.ops._concat import placed
from yolov9_fast.ops._interpreted import runs_triton, triton_launcher, triton_missing


def spp(x: Tensor, out: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The three pooled maps of `x` [B, C, H, W]: p1 = pool(x), p2 = pool(p1), p3 = pool(p2), each [B, C, H, W].

    `out`: three slots to write to (channel slices of one buffer, in the layout of `x`). Differentiable once, as torch's
    `max_pool2d`: the gradient goes to the first maximum of a window, NaN counts as larger than everything. Raises
    `TypeError`/`ValueError` that name the argument.
    """
    _check(x, out)
    first, second, third = select(OPERATOR, x, out)(x, out)[1:]
    return first, second, third


def spp_with_input(x: Tensor, out: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `spp`, and before the three maps `x` itself, for an aggregation of all four.

    The gradient that the aggregation has for `x` is then added in the same pass as those of the pools.
    """
    _check(x, out)
    kept, first, second, third = select(OPERATOR, x, out)(x, out)
    return kept, first, second, third


def spp_reference(x: Tensor, out: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition, in eager PyTorch: `x` and the three maps (copied to `out`)."""
    first = F.max_pool2d(x, 5, 1, 2)
    second = F.max_pool2d(first, 5, 1, 2)
    third = F.max_pool2d(second, 5, 1, 2)
    if out is not None:
        first, second, third = (placed(y, place) for y, place in zip((first, second, third), out, strict=True))
    return x, first, second, third


def _check(x: Tensor, out: Sequence[Tensor] | None) -> None:
    check_map("spp", "x", x)
    if out is None:
        return
    if len(out) != 3:
        raise ValueError(f"spp: out must hold three maps, got {len(out)}")
    for number, place in enumerate(out):
        check_map("spp", f"out[{number}]", place)
        if place.shape != x.shape or place.dtype != x.dtype or place.device != x.device:
            raise ValueError(
                f"spp: out[{number}] must be {list(x.shape)} {x.dtype} on {x.device}, "
                f"got {list(place.shape)} {place.dtype} on {place.device}"
            )
        if place.requires_grad:
            raise ValueError(f"spp: out[{number}] must not require a gradient, it is overwritten")


@dataclass(frozen=True)
class _Kernels:
    """One implementation's two raw operators, and its name in `_kernels`."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor, out: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        maps: tuple[Tensor, ...] = _Spp.apply(self.name, x, *(out or ()))
        return maps


class _Spp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, x: Tensor, *out: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        (source,) = in_layout_of(out[0] if out else x, [x])
        maps = out or tuple(_new_like(source) for _ in range(3))
        _kernels[name].forward(source, *maps)
        ctx.save_for_backward(source, *maps[:2])
        return x.view_as(x), *(y.view_as(y) if out else y for y in maps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second = ctx.saved_tensors
        readable = in_layout_of(x, list(gradients))
        return None, _kernels[ctx.name].backward(x, first, second, *readable), None, None, None


def forward_reference(x: Tensor, y1: Tensor, y2: Tensor, y3: Tensor) -> None:
    """The raw operator `spp_forward`, defined."""
    for place, pooled in zip((y1, y2, y3), spp_reference(x)[1:], strict=True):
        place.copy_(pooled)


def backward_reference(x: Tensor, y1: Tensor, y2: Tensor, d0: Tensor, d1: Tensor, d2: Tensor, d3: Tensor) -> Tensor:
    """The raw operator `spp_backward`, defined: `d0` is the gradient of `x` itself, `d1` to `d3` of the pooled maps."""
    gradient = d3
    for source, own in ((y2, d2), (y1, d1), (x, d0)):
        indices = F.max_pool2d_with_indices(source, [5, 5], [1, 1], [2, 2])[1]
        gradient = own + torch.ops.aten.max_pool2d_with_indices_backward(
            gradient, source, [5, 5], [1, 1], [2, 2], [1, 1], False, indices
        )
    return gradient.contiguous(memory_format=memory_format_of(x))


def _new_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


def _fake_forward(x: Tensor, y1: Tensor, y2: Tensor, y3: Tensor) -> None:
    return None


def _fake_backward(x: Tensor, y1: Tensor, y2: Tensor, d0: Tensor, d1: Tensor, d2: Tensor, d3: Tensor) -> Tensor:
    return _new_like(x)


_FORWARD = "(Tensor x, Tensor(a!) y1, Tensor(b!) y2, Tensor(c!) y3) -> ()"
_BACKWARD = "(Tensor x, Tensor y1, Tensor y2, Tensor d0, Tensor d1, Tensor d2, Tensor d3) -> Tensor"
_kernels = {
    "cpu": _Kernels(
        "cpu",
        library.define(f"spp_forward{_FORWARD}", fake=_fake_forward, reference=forward_reference),
        library.define(f"spp_backward{_BACKWARD}", fake=_fake_backward, reference=backward_reference),
    ),
    "triton": _Kernels(
        "triton",
        library.define(
            f"spp_forward_triton{_FORWARD}", fake=_fake_forward, reference=triton_launcher("spp", "spp_forward")
        ),
        library.define(
            f"spp_backward_triton{_BACKWARD}", fake=_fake_backward, reference=triton_launcher("spp", "spp_backward")
        ),
    ),
}


def _odd_slot(out: Sequence[Tensor] | None) -> str | None:
    layouts = {layout_of(place) for place in out or ()}
    return None if len(layouts) < 2 and None not in layouts else "all of out must lie channels_last or contiguous"


def _supports_cpu(x: Tensor, out: Sequence[Tensor] | None = None) -> str | None:
    return _odd_slot(out) or not_on("cpu", x)


def _supports_triton(x: Tensor, out: Sequence[Tensor] | None = None) -> str | None:
    return _odd_slot(out) or runs_triton("spp", x)


OPERATOR = register(
    Operator(
        "spp",
        "three stacked max pools in one pass",
        {
            "eager": Implementation(spp_reference),
            "cpu": Implementation(_kernels["cpu"], library.missing("spp_forward", "cpu"), _supports_cpu),
            "triton": Implementation(_kernels["triton"], triton_missing(), _supports_triton),
        },
        order=("cpu", "triton", "eager"),
    )
)
