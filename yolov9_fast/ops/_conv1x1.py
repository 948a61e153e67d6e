"""1×1 convolution of maps where they lie: out[:, o] = Σ_k weight[o, k] · x[:, k] + bias[o], k over all inputs.

A 1×1 convolution is a matrix product over pixels, so that neither a channel slice nor several maps side by side have to
be copied together first: rows of a slice are only further apart. CSP-ELAN's 1×1 convolutions (YOLOv9, arXiv 2402.13616,
section 4.1) all read slices or aggregations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov9_fast._layout import check_map, in_layout_of, layout_of, memory_format_of, row_stride
from yolov9_fast.ops import _library as library
from yolov9_fast.ops._backend import Implementation, Operator, get_backend, not_on, register, select
from yolov9_fast.ops._concat import placed
from yolov9_fast.ops._interpreted import runs_triton, triton_launcher, triton_missing


def conv1x1(
    inputs: Tensor | Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """1×1 convolution, stride 1, one group, of `inputs` side by side: [B, O, H, W].

    `inputs`: one map [B, C, H, W] or several whose channels add up, in order, to those of `weight` [O, ΣC, 1, 1];
    dense or channel slices, nothing is concatenated or copied. `bias` [O]. `out`: a slot to write to, [B, O, H, W] in
    the layout of the inputs, that does not require a gradient. Differentiable in inputs, weight and bias, once. Under
    autocast everything is cast as for `conv2d`. Raises `TypeError`/`ValueError` that name the argument.
    """
    maps = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    _check(maps, weight, bias, out)
    if torch.is_autocast_enabled(weight.device.type):
        maps, weight, bias = _autocast(maps, weight, bias)
    if out is not None and out.dtype != maps[0].dtype:
        raise ValueError(f"conv1x1: out must be {maps[0].dtype} as the inputs, got {out.dtype}")
    result: Tensor = select(OPERATOR, maps, weight, bias, out)(maps, weight, bias, out)
    return result


def conv1x1_pair(x: Tensor, weight1: Tensor, weight2: Tensor) -> tuple[Tensor, Tensor]:
    """Two 1×1 convolutions of one map, as cv1 and cv2 of RepCSP: (conv1x1(x, weight1), conv1x1(x, weight2)).

    `x` [B, C, H, W], dense or a channel slice; weights [O_i, C, 1, 1]. Where it pays, `x` is read once, and its
    gradient comes from both at once instead of two tensors and their sum. Differentiable once.
    """
    _check([x], weight1, None, None)
    _check([x], weight2, None, None)
    maps = [x]
    if torch.is_autocast_enabled(x.device.type):
        maps, weight1, weight2 = _autocast(maps, weight1, weight2)
    first, second = select(PAIR, maps[0], weight1, weight2)(maps[0], weight1, weight2)
    return first, second


def conv1x1_reference(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """The definition, in eager PyTorch: concatenate and convolve (and copy to `out`)."""
    x = inputs[0] if len(inputs) == 1 else torch.cat(list(inputs), 1)
    result = F.conv2d(x, weight, bias)
    return result if out is None else placed(result, out)


def conv1x1_pair_reference(x: Tensor, weight1: Tensor, weight2: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of `conv1x1_pair`: two convolutions."""
    return F.conv2d(x, weight1), F.conv2d(x, weight2)


def _check(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, out: Tensor | None) -> None:
    if not inputs:
        raise ValueError("conv1x1: inputs must hold at least one map, got none")
    check_map("conv1x1", "weight", weight)
    for number, x in enumerate(inputs):
        check_map("conv1x1", f"inputs[{number}]", x)
        if x.shape[0] != inputs[0].shape[0] or x.shape[2:] != inputs[0].shape[2:]:
            raise ValueError(
                f"conv1x1: inputs[{number}] must agree with inputs[0] {list(inputs[0].shape)} but for the channels, "
                f"got {list(x.shape)}"
            )
    if len({tensor.device for tensor in (*inputs, weight)}) > 1:
        raise ValueError(
            f"conv1x1: inputs and weight must be on one device, got {[str(x.device) for x in (*inputs, weight)]}"
        )
    channels = sum(x.shape[1] for x in inputs)
    if weight.shape[1:] != (channels, 1, 1):
        raise ValueError(f"conv1x1: weight must have shape [O, {channels}, 1, 1], got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"conv1x1: bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
    if not torch.is_autocast_enabled(weight.device.type):
        dtypes = {tensor.dtype for tensor in (*inputs, weight, *(() if bias is None else (bias,)))}
        if len(dtypes) > 1:
            raise TypeError(f"conv1x1: inputs, weight and bias must have one dtype, got {sorted(map(str, dtypes))}")
    if out is not None:
        _check_out(inputs[0], weight, out)


def _check_out(x: Tensor, weight: Tensor, out: Tensor) -> None:
    check_map("conv1x1", "out", out)
    shape = [x.shape[0], weight.shape[0], x.shape[2], x.shape[3]]
    if list(out.shape) != shape or out.device != x.device:
        raise ValueError(f"conv1x1: out must be {shape} on {x.device}, got {list(out.shape)} on {out.device}")
    if out.requires_grad:
        raise ValueError("conv1x1: out must not require a gradient, it is overwritten")


def _autocast(maps: list[Tensor], weight: Tensor, other: Tensor | None) -> tuple[list[Tensor], Tensor, Any]:
    dtype = torch.get_autocast_dtype(weight.device.type)

    def cast(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.dtype in (dtype, torch.float64) else x.to(dtype)

    return [cast(x) for x in maps], cast(weight), cast(other)  # type: ignore[misc, return-value]


@dataclass(frozen=True)
class _Kernels:
    """One implementation's three raw operators, and its name in `_kernels`: torch.compile passes names, not objects."""

    name: str
    forward: Callable[[list[Tensor], Tensor, Tensor | None, Tensor], None]
    input_grad: Callable[[Tensor, Tensor, list[int]], list[Tensor]]
    weight_grad: Callable[[Tensor, list[Tensor]], Tensor]

    def conv(self, inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        result: Tensor = _Conv1x1.apply(
            self.name, weight, bias, out, *in_layout_of(inputs[0] if out is None else out, inputs)
        )
        return result

    def pair(self, x: Tensor, weight1: Tensor, weight2: Tensor) -> tuple[Tensor, Tensor]:
        first, second = _Pair.apply(self.name, in_layout_of(x, [x])[0], weight1, weight2)
        return first, second


class _Conv1x1(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str, weight: Tensor, bias: Tensor | None, out: Tensor | None, *inputs: Tensor
    ) -> Tensor:
        ctx.name = name
        ctx.save_for_backward(weight, *inputs)
        result = _new_map(inputs[0], weight.shape[0]) if out is None else out
        _kernels[name].forward(list(inputs), weight, bias, result)
        return result if out is None else result.view_as(result)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        kernels = _kernels[ctx.name]
        (dy,) = in_layout_of(inputs[0], [dy])
        need = ctx.needs_input_grad
        dweight = kernels.weight_grad(dy, inputs) if need[1] else None
        dbias = dy.sum((0, 2, 3)) if need[2] else None
        gradients: list[Tensor | None] = [None] * len(inputs)
        if any(need[4:]):
            # Only the inputs that want a gradient get one: their columns of the weight lie apart.
            wanted = [index for index in range(len(inputs)) if need[4 + index]]
            columns = weight.split([x.shape[1] for x in inputs], 1)
            part = weight if len(wanted) == len(inputs) else torch.cat([columns[index] for index in wanted], 1)
            made = kernels.input_grad(dy, part, [inputs[index].shape[1] for index in wanted])
            for index, gradient in zip(wanted, made, strict=True):
                gradients[index] = gradient
        return None, dweight, dbias, None, *gradients


class _Pair(torch.autograd.Function):
    """Both products in one: outputs side by side are what `input_grad` makes of the transposed weights."""

    @staticmethod
    def forward(ctx: Any, name: str, x: Tensor, weight1: Tensor, weight2: Tensor) -> tuple[Tensor, Tensor]:
        ctx.name = name
        ctx.save_for_backward(x, weight1, weight2)
        stacked = torch.cat((weight1, weight2)).transpose(0, 1)
        first, second = _kernels[name].input_grad(x, stacked, [weight1.shape[0], weight2.shape[0]])
        return first, second

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy1: Tensor, dy2: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, weight2 = ctx.saved_tensors
        kernels = _kernels[ctx.name]
        dy1, dy2 = in_layout_of(x, [dy1, dy2])
        dx = None
        if ctx.needs_input_grad[1]:
            dx = _new_map(x, x.shape[1])
            kernels.forward([dy1, dy2], torch.cat((weight1, weight2)).transpose(0, 1), None, dx)
        dweight1 = kernels.weight_grad(dy1, [x]) if ctx.needs_input_grad[2] else None
        dweight2 = kernels.weight_grad(dy2, [x]) if ctx.needs_input_grad[3] else None
        return None, dx, dweight1, dweight2


def _new_map(like: Tensor, channels: int) -> Tensor:
    size = (like.shape[0], channels, like.shape[2], like.shape[3])
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format_of(like))


def _rows(x: Tensor) -> Tensor:
    """A channels_last map, dense or a slice, as a matrix [B·H·W, C]: a view."""
    stride = row_stride(x)
    assert stride is not None
    return x.as_strided((x.shape[0] * x.shape[2] * x.shape[3], x.shape[1]), (stride, 1))


def matrix_forward(inputs: list[Tensor], weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`conv1x1_forward` as library matrix products on views, one per input: the vendor's reads any row stride."""
    matrix, columns = weight.flatten(1), _rows(out)
    start = 0
    for number, x in enumerate(inputs):
        part = matrix.narrow(1, start, x.shape[1]).t()
        if number > 0:
            columns.addmm_(_rows(x), part)
        elif bias is not None:
            torch.addmm(bias, _rows(x), part, out=columns)
        else:
            torch.mm(_rows(x), part, out=columns)
        start += x.shape[1]


def matrix_input_grad(dy: Tensor, weight: Tensor, channels: list[int]) -> list[Tensor]:
    gradients = [_new_map(dy, count) for count in channels]
    for gradient, part in zip(gradients, weight.flatten(1).split(channels, 1), strict=True):
        torch.mm(_rows(dy), part, out=_rows(gradient))
    return gradients


def matrix_weight_grad(dy: Tensor, inputs: list[Tensor]) -> Tensor:
    gradient = dy.new_empty((dy.shape[1], sum(x.shape[1] for x in inputs)))
    rows = _rows(dy).t()
    for x, place in zip(inputs, gradient.split([x.shape[1] for x in inputs], 1), strict=True):
        torch.mm(rows, _rows(x), out=place)
    return gradient[:, :, None, None]


def forward_reference(inputs: list[Tensor], weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """The raw operator `conv1x1_forward`, defined."""
    out.copy_(F.conv2d(torch.cat(list(inputs), 1), weight, bias))


def input_grad_reference(dy: Tensor, weight: Tensor, channels: list[int]) -> list[Tensor]:
    """The raw operator `conv1x1_input_grad`, defined: one dense gradient per input, in the layout of `dy`."""
    whole = F.conv2d(dy, weight.transpose(0, 1))
    return [_new_map(dy, part.shape[1]).copy_(part) for part in whole.split(list(channels), 1)]


def weight_grad_reference(dy: Tensor, inputs: list[Tensor]) -> Tensor:
    """The raw operator `conv1x1_weight_grad`, defined."""
    return torch.einsum("bohw,bkhw->ok", dy, torch.cat(list(inputs), 1))[:, :, None, None].contiguous()


def _fake_forward(inputs: list[Tensor], weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    return None


def _fake_input_grad(dy: Tensor, weight: Tensor, channels: list[int]) -> list[Tensor]:
    return [_new_map(dy, count) for count in channels]


def _fake_weight_grad(dy: Tensor, inputs: list[Tensor]) -> Tensor:
    return dy.new_empty((dy.shape[1], sum(x.shape[1] for x in inputs), 1, 1))


_LARGEST_WEIGHT = 256 * 128
"""Measured on two Zen 5 cores with AVX-512, float32, channels_last slices, against the framework with its copies:
forward and backward 1.1 to 2.5 times as fast up to 256 → 128 channels (1.0); 512 → 256: 0.97 and 0.82."""

_FORWARD = "(Tensor[] inputs, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()"
_INPUT_GRAD = "(Tensor dy, Tensor weight, int[] channels) -> Tensor[]"
_WEIGHT_GRAD = "(Tensor dy, Tensor[] inputs) -> Tensor"
_kernels = {
    "cpu": _Kernels(
        "cpu",
        library.define(f"conv1x1_forward{_FORWARD}", fake=_fake_forward, reference=forward_reference),
        library.define(f"conv1x1_input_grad{_INPUT_GRAD}", fake=_fake_input_grad, reference=input_grad_reference),
        library.define(f"conv1x1_weight_grad{_WEIGHT_GRAD}", fake=_fake_weight_grad, reference=weight_grad_reference),
    ),
    "triton": _Kernels(
        "triton",
        library.define(
            f"conv1x1_forward_triton{_FORWARD}",
            fake=_fake_forward,
            reference=triton_launcher("conv1x1", "conv1x1_forward"),
        ),
        library.define(
            f"conv1x1_input_grad_triton{_INPUT_GRAD}",
            fake=_fake_input_grad,
            reference=triton_launcher("conv1x1", "conv1x1_input_grad"),
        ),
        library.define(
            f"conv1x1_weight_grad_triton{_WEIGHT_GRAD}",
            fake=_fake_weight_grad,
            reference=triton_launcher("conv1x1", "conv1x1_weight_grad"),
        ),
    ),
    "cuda": _Kernels("cuda", matrix_forward, matrix_input_grad, matrix_weight_grad),
}


def _unable_on_cpu(inputs: Sequence[Tensor], weight: Tensor, out: Tensor | None) -> str | None:
    if weight.dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64, got {weight.dtype}"
    if out is not None and layout_of(out) is None:
        return "out must lie channels_last or contiguous"
    return not_on("cpu", *inputs, weight)


def _too_large(numbers: int) -> str | None:
    if numbers > _LARGEST_WEIGHT:
        return f"weights of more than {_LARGEST_WEIGHT} numbers are faster in the framework's convolution"
    return None


def _supports_cpu(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> str | None:
    reason = _unable_on_cpu(inputs, weight, out)
    if reason is not None or get_backend("conv1x1") != "auto":
        return reason
    if len(inputs) == 1 and layout_of(inputs[0]) == "channels_last" and row_stride(inputs[0]) == weight.shape[1]:
        return "the framework's convolution is as fast on one dense channels_last map"
    return _too_large(weight.shape[0] * weight.shape[1])


def _supports_cuda(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> str | None:
    for x in inputs if out is None else (*inputs, out):
        if row_stride(x) is None:
            return "its matrix products read channels_last maps"
    return not_on("cuda", *inputs, weight)


def _supports_triton(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> str | None:
    if len(inputs) == 1 and get_backend("conv1x1") == "auto":
        return "one map is a matrix product of the vendor's library"
    return runs_triton("conv1x1", *inputs, weight)


def _supports_cpu_pair(x: Tensor, weight1: Tensor, weight2: Tensor) -> str | None:
    reason = _unable_on_cpu([x], weight1, None)
    if reason is None and get_backend("conv1x1_pair") == "auto":
        # Reading a map once pays on dense maps too: 1.05 to 1.4 times as fast, forward and backward; slices 1.1 to 2.4.
        reason = _too_large(x.shape[1] * max(weight1.shape[0], weight2.shape[0]))
    return reason


def _supports_cuda_pair(x: Tensor, weight1: Tensor, weight2: Tensor) -> str | None:
    return _supports_cuda([x], weight1)


def _supports_triton_pair(x: Tensor, weight1: Tensor, weight2: Tensor) -> str | None:
    return runs_triton("conv1x1_pair", x, weight1, weight2)


OPERATOR = register(
    Operator(
        "conv1x1",
        "1x1 convolution of channel slices and of several maps side by side, without a copy",
        {
            "eager": Implementation(conv1x1_reference),
            "cpu": Implementation(_kernels["cpu"].conv, library.missing("conv1x1_forward", "cpu"), _supports_cpu),
            "triton": Implementation(_kernels["triton"].conv, triton_missing(), _supports_triton),
            "cuda": Implementation(_kernels["cuda"].conv, None, _supports_cuda),
        },
        order=("triton", "cuda", "cpu", "eager"),
    )
)
PAIR = register(
    Operator(
        "conv1x1_pair",
        "two 1x1 convolutions of one map, read once",
        {
            "eager": Implementation(conv1x1_pair_reference),
            "cpu": Implementation(
                _kernels["cpu"].pair, library.missing("conv1x1_input_grad", "cpu"), _supports_cpu_pair
            ),
            "triton": Implementation(_kernels["triton"].pair, triton_missing(), _supports_triton_pair),
            "cuda": Implementation(_kernels["cuda"].pair, None, _supports_cuda_pair),
        },
        order=("triton", "cuda", "cpu", "eager"),
    )
)
