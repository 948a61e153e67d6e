"""Spatial pyramid pooling of SPP-ELAN: three stacked max pools 5×5, stride 1, in one pass (fields 5, 9, 13).

YOLOv9, arXiv 2402.13616, section 4.1 and appendix; the pools write into the slots of a concatenation. The backward
finds the maxima again from the maps: no index tensors are saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov9_fast._layout import dense, empty_map, in_layout_of, layout_of, memory_format_of, telling
from yolov9_fast.ops._checks import check_map, check_out, maps_of
from yolov9_fast.ops._concat import placed, returned
from yolov9_fast.ops._operator import AutogradFunction, Compiled, Kernel, Operator, Python, once_differentiable
from yolov9_fast.ops._supports import not_for_triton, not_on


def spp(x: Tensor, out: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The three pooled maps of `x` [B, C, H, W]: p1 = pool(x), p2 = pool(p1), p3 = pool(p2), each [B, C, H, W].

    `out`: three slots to write to (channel slices of one buffer, in the layout of `x`). Differentiable once, as torch's
    `max_pool2d`: the gradient goes to the first maximum of a window, NaN counts as larger than everything. Raises
    `TypeError`/`ValueError` that name the argument.
    """
    _check(x, out)
    first, second, third = OPERATOR(x, out)[1:]
    return first, second, third


def spp_with_input(x: Tensor, out: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`x` itself and the three maps of `spp`, for a concatenation of all four.

    The gradient of `x` from the concatenation is then added in the same pass as those of the pools.
    """
    _check(x, out)
    kept, first, second, third = OPERATOR(x, out)
    return kept, first, second, third


def spp_reference(x: Tensor, out: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition, in eager PyTorch: `x` and the three maps (copied to `out`)."""
    first = F.max_pool2d(x, 5, 1, 2)
    second = F.max_pool2d(first, 5, 1, 2)
    third = F.max_pool2d(second, 5, 1, 2)
    if out is not None:
        first, second, third = (placed(y, slot) for y, slot in zip((first, second, third), out, strict=True))
    return x, first, second, third


def _check(x: Tensor, out: Sequence[Tensor] | None) -> None:
    check_map("x", x)
    if out is None:
        return
    slots = maps_of("out", out)
    if len(slots) != 3:
        raise ValueError(f"out: expected three maps, got {len(slots)}")
    for number, slot in enumerate(slots):
        check_out(f"out[{number}]", slot, x.shape, x)


# ---- kernels


def forward_reference(x: Tensor, y1: Tensor, y2: Tensor, y3: Tensor) -> None:
    """Kernel `spp_forward`."""
    for y, pooled in zip((y1, y2, y3), spp_reference(x)[1:], strict=True):
        y.copy_(pooled)


def backward_reference(x: Tensor, y1: Tensor, y2: Tensor, d0: Tensor, d1: Tensor, d2: Tensor, d3: Tensor) -> Tensor:
    """Kernel `spp_backward`: `d0` is the gradient of `x` itself, `d1` to `d3` of the pooled maps."""
    gradient = d3
    for source, own in ((y2, d2), (y1, d1), (x, d0)):
        indices = F.max_pool2d_with_indices(source, [5, 5], [1, 1], [2, 2])[1]
        gradient = own + torch.ops.aten.max_pool2d_with_indices_backward(
            gradient, source, [5, 5], [1, 1], [2, 2], [1, 1], False, indices
        )
    return dense(gradient, memory_format_of(x))


class _Kernels(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., Any]


KERNELS = _Kernels(
    Kernel(
        "spp_forward(Tensor x, Tensor(a!) y1, Tensor(b!) y2, Tensor(c!) y3) -> ()",
        forward_reference,
        lambda x, y1, y2, y3: None,
    ),
    Kernel(
        "spp_backward(Tensor x, Tensor y1, Tensor y2, Tensor d0, Tensor d1, Tensor d2, Tensor d3) -> Tensor",
        backward_reference,
        lambda x, *others: empty_map(x),
    ),
)


# ---- gradient


def _run(kernels: _Kernels, x: Tensor, out: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    maps: tuple[Tensor, ...] = _Spp.apply(kernels, x, *(out or ()))
    return maps


class _Spp(AutogradFunction):
    @staticmethod
    def forward(ctx: Any, kernels: _Kernels, *maps: Tensor) -> tuple[Tensor, ...]:
        x, *out = maps
        ctx.kernels = kernels
        (source,) = in_layout_of(telling(out) if out else x, [x])
        pooled = out or [empty_map(source) for _ in range(3)]
        kernels.forward(source, *pooled)
        ctx.save_for_backward(source, *pooled[:2])
        return x.expand_as(x), *(returned(y) if out else y for y in pooled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second = ctx.saved_tensors
        readable = in_layout_of(telling(ctx.saved_tensors), list(gradients))
        return None, ctx.kernels.backward(x, first, second, *readable), None, None, None


# ---- backends


def _unreadable(out: Sequence[Tensor] | None) -> str | None:
    layouts = {layout_of(slot) for slot in out or ()}
    return None if len(layouts) < 2 and None not in layouts else "all of out must be channels_last, or all contiguous"


def _supports_cpu(x: Tensor, out: Sequence[Tensor] | None) -> str | None:
    return _unreadable(out) or not_on("cpu", x)


def _supports_triton(x: Tensor, out: Sequence[Tensor] | None) -> str | None:
    return _unreadable(out) or not_for_triton("spp", x)


def _triton() -> _Kernels:
    from yolov9_fast.kernels.spp import spp_backward, spp_forward

    return _Kernels(spp_forward, spp_backward)


OPERATOR = Operator(
    "spp",
    "three stacked max pools in one pass",
    reference=spp_reference,
    kernels=KERNELS,
    run=_run,
    backends={"cpu": Compiled(_supports_cpu), "triton": Python(_triton, _supports_triton)},
)
