"""3×3 and 1×1 convolutions of one map of few channels: y_i = conv2d(x, weight_i), stride 1, zero padding k_i // 2.

Libraries convolve maps of 16 to 32 channels and some hundred pixels at a half of the processor's arithmetic: blocks
of channels hold zeros, weights are reordered in each call. RepConv (3×3 and 1×1 of one map) and the bottlenecks of
CSP-ELAN (YOLOv9, arXiv 2402.13616, section 4.1) are made of such convolutions. Here the map is read once for all
weights, and its gradient is written once from all of theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov9_fast._layout import row_stride
from yolov9_fast.ops import _library
from yolov9_fast.ops._backend import get_backend
from yolov9_fast.ops._checks import check_map, described
from yolov9_fast.ops._operator import AutogradFunction, Compiled, Kernel, Operator, once_differentiable
from yolov9_fast.ops._supports import not_on

_MULTIPLE = 8
"""Of channels, in the kernels."""


class _Most(NamedTuple):
    """Up to which channels, and numbers of the map times outputs, the kernels are faster than oneDNN's convolutions."""

    channels: int
    products: int


_MOST = {torch.float32: _Most(32, 4 << 20), torch.bfloat16: _Most(64, 14 << 20)}
"""`bench/convolutions.py` on two Zen 4 cores with AVX-512, batch 8. A RepBottleneck of 24 channels of 20×20 pixels (1.8
million numbers times outputs) is 1.32 times as fast as with oneDNN's convolutions in float32, 1.19 times in bfloat16;
of 32 of 10×10 (0.8) 1.24 and 1.34, of 16 of 40×40 (3.3) 1.00 and 1.19; in bfloat16 48 of 20×20 (7.4) 1.09, 64 of 10×10
(3.3) 1.12, 32 of 40×40 (13.1) 1.11, 16 of 80×80 (13.1) 1.04; all four 0.90 to 1.02 in float32."""


def convs(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """`[F.conv2d(x, weight, padding=k // 2) for weight in weights]`, each [B, O_i, H, W].

    `x` [B, C, H, W], dense or a channel slice; weights [O_i, C, k_i, k_i] with k_i 1 or 3, of the dtype and device of
    `x` (under autocast everything is cast as for `conv2d`). Differentiable in x and weights, once. Raises
    `TypeError`/`ValueError` that name the argument.
    """
    check_map("x", x)
    if not isinstance(weights, list | tuple) or not all(isinstance(weight, Tensor) for weight in weights):
        raise TypeError(f"weights: expected a list of tensors, got {described(weights)}")
    if not weights:
        raise ValueError("weights: expected at least one, got none")
    for number, weight in enumerate(weights):
        shape = weight.shape
        if len(shape) != 4 or shape[0] == 0 or shape[1] != x.shape[1] or shape[2:] not in ((1, 1), (3, 3)):
            raise ValueError(f"weights[{number}]: expected [O, {x.shape[1]}, k, k] of k = 1 or 3, got {list(shape)}")
        if weight.device != x.device:
            raise ValueError(f"weights[{number}]: expected a tensor on {x.device} as x, got {weight.device}")
    if torch.is_autocast_enabled(x.device.type):
        return convs_reference(x, weights)
    for number, weight in enumerate(weights):
        if weight.dtype != x.dtype:
            raise TypeError(f"weights[{number}]: expected {x.dtype} as x, got {weight.dtype}")
    results: list[Tensor] = OPERATOR(x, weights)
    return results


def convs_where_faster(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor] | None:
    """`convs(x, weights)`, arguments unchecked, where a backend has kernels for them (under "auto": faster ones).

    None elsewhere, while torch.compile traces, and under autocast unless all have its dtype.
    """
    if torch.compiler.is_compiling():
        return None
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype:
        return None
    name = get_backend("convs")
    if name != "auto" and OPERATOR.why_not(name, x, weights) is not None:
        return None
    call = OPERATOR.select(x, weights)
    if call is OPERATOR.eager.call:
        return None
    results: list[Tensor] = call(x, weights)
    return results


def convs_reference(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The definition: one convolution after the other."""
    return [F.conv2d(x, weight, None, 1, weight.shape[2] // 2) for weight in weights]


def _is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels are faster than the framework's 3×3 convolution of `x` [B, C, H, W] by `weight`."""
    most = _MOST.get(x.dtype)
    return (
        most is not None
        and x.numel() * weight.shape[0] <= most.products
        and max(weight.shape[:2]) <= most.channels
        and measured(x.dtype)
    )


@functools.cache
def measured(dtype: torch.dtype) -> bool:
    """Whether the compiled kernels have the vector units on which they were measured: bfloat16 without AMX."""
    built = _library.build_info()
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or built.get("portable", False):
        return False
    return dtype != torch.bfloat16 or (
        "avx512_bf16" in built.get("cpu_features", ())
        and torch.cpu._is_avx512_bf16_supported()
        and not torch.cpu._is_amx_tile_supported()
    )


# ---- kernels


def _empty(like: Tensor, channels: int) -> Tensor:
    batch, _, height, width = like.shape
    return torch.empty(
        (batch, channels, height, width), dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def forward_reference(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Kernel `convs_forward`."""
    return [_empty(x, y.shape[1]).copy_(y) for y in convs_reference(x, weights)]


def input_grad_reference(dys: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Kernel `convs_input_grad`: the gradient of the map from those of all results."""
    gradient = _empty(dys[0], weights[0].shape[1]).zero_()
    for dy, weight in zip(dys, weights, strict=True):
        gradient += F.conv_transpose2d(dy, weight, None, 1, weight.shape[2] // 2)
    return gradient


def weight_grad_reference(dys: list[Tensor], x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Kernel `convs_weight_grad`: the gradient of each weight, in its strides."""
    gradients = []
    for dy, weight in zip(dys, weights, strict=True):
        border = [weight.shape[2] // 2] * 2
        arguments = (None, [1, 1], border, [1, 1], False, [0, 0], 1, [False, True, False])
        made = torch.ops.aten.convolution_backward(dy, x, weight, *arguments)[1]
        gradients.append(torch.empty_like(weight).copy_(made))
    return gradients


def _flops(x: Sequence[int], weights: Sequence[Sequence[int]]) -> int:
    """A multiplication and an addition for each number of a weight and each pixel."""
    return sum(2 * x[0] * x[2] * x[3] * w[0] * w[1] * w[2] * w[3] for w in weights)


class _Kernels(NamedTuple):
    forward: Callable[..., Any]
    input_grad: Callable[..., Any]
    weight_grad: Callable[..., Any]


KERNELS = _Kernels(
    forward=Kernel(
        "convs_forward(Tensor x, Tensor[] weights) -> Tensor[]",
        forward_reference,
        lambda x, weights: [_empty(x, weight.shape[0]) for weight in weights],
        lambda x, weights, **named: _flops(x, weights),
    ),
    input_grad=Kernel(
        "convs_input_grad(Tensor[] dys, Tensor[] weights) -> Tensor",
        input_grad_reference,
        lambda dys, weights: _empty(dys[0], weights[0].shape[1]),
        lambda dys, weights, **named: _flops(dys[0], weights),
    ),
    weight_grad=Kernel(
        "convs_weight_grad(Tensor[] dys, Tensor x, Tensor[] weights) -> Tensor[]",
        weight_grad_reference,
        lambda dys, x, weights: [torch.empty_like(weight) for weight in weights],
        lambda dys, x, weights, **named: _flops(x, weights),
    ),
)


# ---- gradient


def _run(kernels: _Kernels, x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return [*_Convs.apply(kernels, x, *weights)]


class _Convs(AutogradFunction):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        kernels, x, *weights = arguments
        ctx.kernels = kernels
        ctx.save_for_backward(x, *weights)
        return tuple(kernels.forward(x, weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        kernels, need = ctx.kernels, ctx.needs_input_grad
        given = [dy if row_stride(dy) is not None else dy.contiguous(memory_format=torch.channels_last) for dy in dys]
        dx = kernels.input_grad(given, weights) if need[1] else None
        wanted = [number for number in range(len(weights)) if need[2 + number]]
        gradients: list[Tensor | None] = [None] * len(weights)
        if wanted:
            made = kernels.weight_grad([given[i] for i in wanted], x, [weights[i] for i in wanted])
            for number, gradient in zip(wanted, made, strict=True):
                gradients[number] = gradient
        return None, dx, *gradients


# ---- backends


def _supports_cpu(x: Tensor, weights: Sequence[Tensor]) -> str | None:
    if not x.is_cpu:
        return not_on("cpu", x)
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return f"it computes in float32, float64 and bfloat16, got {x.dtype}"
    if row_stride(x) is None:
        return "it reads channels_last maps"
    for weight in weights:
        if weight.dtype != x.dtype:
            return f"it computes in one dtype, got {x.dtype} and {weight.dtype}"
        if weight.shape[0] % _MULTIPLE or weight.shape[1] % _MULTIPLE:
            return f"it computes multiples of {_MULTIPLE} channels, got a weight {list(weight.shape)}"
    if get_backend("convs") == "auto" and not any(weight.shape[2] == 3 and _is_faster(x, weight) for weight in weights):
        return "the framework's convolutions are as fast on larger maps, of 1x1 kernels alone, and without AVX-512"
    return not_on("cpu", x, *weights)


OPERATOR = Operator(
    "convs",
    "3x3 and 1x1 convolutions of one map of few channels, read once",
    reference=convs_reference,
    kernels=KERNELS,
    run=_run,
    backends={"cpu": Compiled(_supports_cpu)},
)
