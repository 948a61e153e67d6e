"""1×1 convolution of several maps and of channel slices without a copy.

out[:, o] = Σ_k weight[o, k] · x[:, k] + bias[o], k over the channels of all inputs.

A 1×1 convolution is a matrix product over pixels. A channel slice needs no copy: its rows only have a larger stride.
Several maps need no concatenation: the products are summed. CSP-ELAN's 1×1 convolutions (YOLOv9, arXiv 2402.13616,
section 4.1) all read slices or aggregations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov9_fast._layout import empty_map, in_layout_of, layout_of, row_stride, telling
from yolov9_fast.ops._backend import get_backend
from yolov9_fast.ops._checks import check_floating, check_like, check_map, check_writable, maps_of
from yolov9_fast.ops._concat import placed, returned
from yolov9_fast.ops._operator import AutogradFunction, Compiled, Kernel, Operator, Python, once_differentiable
from yolov9_fast.ops._supports import not_for_triton, not_on


def conv1x1(
    inputs: Tensor | Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """1×1 convolution, stride 1, one group, of the concatenation of `inputs`: [B, O, H, W].

    `inputs`: one map [B, C, H, W] or several whose channels add up, in order, to those of `weight` [O, ΣC, 1, 1];
    dense or channel slices, nothing is concatenated or copied. `bias` [O]. `out`: a slot to write to, [B, O, H, W] in
    the layout of the inputs, that does not require a gradient. Differentiable in inputs, weight and bias, once. Under
    autocast everything is cast as for `conv2d`. Raises `TypeError`/`ValueError` that name the argument.
    """
    maps = maps_of("inputs", inputs, single=True)
    _check(maps, weight, bias, out)
    if torch.is_autocast_enabled(weight.device.type):
        maps, weight, bias = _autocast(maps, weight, bias)
    if out is not None and out.dtype != maps[0].dtype:
        raise ValueError(f"out: expected {maps[0].dtype} as the inputs, got {out.dtype}")
    result: Tensor = OPERATOR(maps, weight, bias, out)
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
    first, second = PAIR(maps[0], weight1, weight2)
    return first, second


def conv1x1_reference(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """The definition, in eager PyTorch: concatenate and convolve (and copy to `out`)."""
    x = inputs[0] if len(inputs) == 1 else torch.cat(list(inputs), 1)
    result = F.conv2d(x, weight, bias)
    return placed(result, out)


def conv1x1_pair_reference(x: Tensor, weight1: Tensor, weight2: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of `conv1x1_pair`: two convolutions. A slice is copied once, not for each and its gradient."""
    form = torch.channels_last if layout_of(x) == "channels_last" else torch.contiguous_format
    x = x.contiguous(memory_format=form)
    return F.conv2d(x, weight1), F.conv2d(x, weight2)


def _check(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, out: Tensor | None) -> None:
    if not inputs:
        raise ValueError("inputs: expected at least one map, got none")
    for number, x in enumerate(inputs):
        check_map(f"inputs[{number}]", x)
        if x.shape[0] != inputs[0].shape[0] or x.shape[2:] != inputs[0].shape[2:]:
            raise ValueError(
                f"inputs[{number}]: expected the shape of inputs[0] {list(inputs[0].shape)} except for the channels, "
                f"got {list(x.shape)}"
            )
    check_map("weight", weight)
    if len({tensor.device for tensor in (*inputs, weight)}) > 1:
        raise ValueError(
            f"inputs, weight: expected tensors on one device, got {[str(x.device) for x in (*inputs, weight)]}"
        )
    channels = sum(x.shape[1] for x in inputs)
    if weight.shape[1:] != (channels, 1, 1):
        raise ValueError(f"weight: expected [O, {channels}, 1, 1], got {list(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(f"weight: expected at least one output channel, got {list(weight.shape)}")
    if bias is not None:
        check_floating("bias", bias)
        check_like("bias", bias, weight.shape[:1], weight.device)
    if not torch.is_autocast_enabled(weight.device.type):
        dtypes = {tensor.dtype for tensor in (*inputs, weight, *(() if bias is None else (bias,)))}
        if len(dtypes) > 1:
            raise TypeError(f"inputs, weight, bias: expected one dtype, got {sorted(map(str, dtypes))}")
    if out is not None:
        check_map("out", out)
        check_like("out", out, (inputs[0].shape[0], weight.shape[0], *inputs[0].shape[2:]), inputs[0].device)
        check_writable("out", out)


def _autocast(maps: list[Tensor], weight: Tensor, other: Tensor | None) -> tuple[list[Tensor], Tensor, Any]:
    dtype = torch.get_autocast_dtype(weight.device.type)

    def cast(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.dtype in (dtype, torch.float64) else x.to(dtype)

    return [cast(x) for x in maps], cast(weight), cast(other)  # type: ignore[misc, return-value]


# ---- kernels


def _rows(x: Tensor, *, written: bool = False) -> Tensor:
    """A map as a matrix [B·H·W, C]: a view where it is channels_last, dense or a slice, else a copy.

    Only next to maps of one channel or pixel, which have both layouts, can one be contiguous. `written`: the copy is
    uninitialised.
    """
    stride, shape = row_stride(x), (x.shape[0] * x.shape[2] * x.shape[3], x.shape[1])
    if stride is not None:
        return x.as_strided(shape, (stride, 1))
    return x.new_empty(shape) if written else x.permute(0, 2, 3, 1).reshape(shape)


def _written(rows: Tensor, out: Tensor) -> Tensor:
    """`out`, after the rows of `_rows(out, written=True)` have been written."""
    if row_stride(out) is None:
        batch, channels, height, width = out.shape
        out.copy_(rows.view(batch, height, width, channels).permute(0, 3, 1, 2))
    return out


def matrix_forward(inputs: list[Tensor], weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`conv1x1_forward` by one library matrix product per input, on views: cuBLAS reads any row stride."""
    matrix, columns = weight.flatten(1), _rows(out, written=True)
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
    _written(columns, out)


def matrix_input_grad(dy: Tensor, weight: Tensor, channels: list[int]) -> list[Tensor]:
    gradients = [empty_map(dy, count) for count in channels]
    source = _rows(dy)
    for gradient, part in zip(gradients, weight.flatten(1).split_with_sizes(channels, 1), strict=True):
        rows = _rows(gradient, written=True)
        torch.mm(source, part, out=rows)
        _written(rows, gradient)
    return gradients


def matrix_weight_grad(dy: Tensor, inputs: list[Tensor]) -> Tensor:
    gradient = dy.new_empty((dy.shape[1], sum(x.shape[1] for x in inputs)))
    rows = _rows(dy).t()
    for x, place in zip(inputs, gradient.split_with_sizes([x.shape[1] for x in inputs], 1), strict=True):
        torch.mm(rows, _rows(x), out=place)
    return gradient[:, :, None, None]


def forward_reference(inputs: list[Tensor], weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Kernel `conv1x1_forward`."""
    out.copy_(F.conv2d(torch.cat(list(inputs), 1), weight, bias))


def input_grad_reference(dy: Tensor, weight: Tensor, channels: list[int]) -> list[Tensor]:
    """Kernel `conv1x1_input_grad`: one dense gradient per input, in the layout of `dy`."""
    whole = F.conv2d(dy, weight.transpose(0, 1))
    return [empty_map(dy, part.shape[1]).copy_(part) for part in whole.split_with_sizes(list(channels), 1)]


def weight_grad_reference(dy: Tensor, inputs: list[Tensor]) -> Tensor:
    """Kernel `conv1x1_weight_grad`."""
    return torch.einsum("bohw,bkhw->ok", dy, torch.cat(list(inputs), 1))[:, :, None, None].contiguous()


def _flops_of_maps(inputs: Sequence[Sequence[int]], weight: Sequence[int], *rest: Any, **named: Any) -> int:
    """A multiplication and an addition for each number of the weight and each pixel."""
    batch, _, height, width = inputs[0]
    return 2 * batch * height * width * weight[0] * weight[1]


def _flops_of_input_grad(dy: Sequence[int], weight: Sequence[int], *rest: Any, **named: Any) -> int:
    return _flops_of_maps([dy], weight)


def _flops_of_weight_grad(dy: Sequence[int], inputs: Sequence[Sequence[int]], *rest: Any, **named: Any) -> int:
    return _flops_of_maps([dy], (dy[1], sum(shape[1] for shape in inputs)))


class _Kernels(NamedTuple):
    forward: Callable[..., Any]
    input_grad: Callable[..., Any]
    weight_grad: Callable[..., Any]


KERNELS = _Kernels(
    forward=Kernel(
        "conv1x1_forward(Tensor[] inputs, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()",
        forward_reference,
        lambda inputs, weight, bias, out: None,
        _flops_of_maps,
    ),
    input_grad=Kernel(
        "conv1x1_input_grad(Tensor dy, Tensor weight, int[] channels) -> Tensor[]",
        input_grad_reference,
        lambda dy, weight, channels: [empty_map(dy, count) for count in channels],
        _flops_of_input_grad,
    ),
    weight_grad=Kernel(
        "conv1x1_weight_grad(Tensor dy, Tensor[] inputs) -> Tensor",
        weight_grad_reference,
        lambda dy, inputs: dy.new_empty((dy.shape[1], sum(x.shape[1] for x in inputs), 1, 1)),
        _flops_of_weight_grad,
    ),
)


# ---- gradient


def _run(
    kernels: _Kernels, inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, out: Tensor | None
) -> Tensor:
    maps = in_layout_of(telling(inputs if out is None else [out, *inputs]), inputs)
    bias = None if bias is None else bias.contiguous()
    result: Tensor = _Conv1x1.apply(kernels, weight, bias, out, *maps)
    return result


def _run_pair(kernels: _Kernels, x: Tensor, weight1: Tensor, weight2: Tensor) -> tuple[Tensor, Tensor]:
    first, second = _Pair.apply(kernels, in_layout_of(x, [x])[0], weight1, weight2)
    return first, second


class _Conv1x1(AutogradFunction):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        out: Tensor | None
        kernels, weight, bias, out, *inputs = arguments
        ctx.kernels = kernels
        ctx.save_for_backward(weight, *inputs)
        result = empty_map(telling(inputs), weight.shape[0]) if out is None else out
        kernels.forward(list(inputs), weight, bias, result)
        return result if out is None else returned(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        kernels = ctx.kernels
        (dy,) = in_layout_of(telling(inputs), [dy])
        need = ctx.needs_input_grad
        dweight = kernels.weight_grad(dy, inputs) if need[1] else None
        dbias = dy.sum((0, 2, 3)) if need[2] else None
        gradients: list[Tensor | None] = [None] * len(inputs)
        if any(need[4:]):
            # Only the inputs that want a gradient get one: their columns of the weight are not adjacent.
            wanted = [index for index in range(len(inputs)) if need[4 + index]]
            columns = weight.split_with_sizes([x.shape[1] for x in inputs], 1)
            part = weight if len(wanted) == len(inputs) else torch.cat([columns[index] for index in wanted], 1)
            made = kernels.input_grad(dy, part, [inputs[index].shape[1] for index in wanted])
            for index, gradient in zip(wanted, made, strict=True):
                gradients[index] = gradient
        return None, dweight, dbias, None, *gradients


class _Pair(AutogradFunction):
    """Both products in one: `input_grad` of the stacked, transposed weights gives both outputs."""

    @staticmethod
    def forward(ctx: Any, kernels: _Kernels, x: Tensor, weight1: Tensor, weight2: Tensor) -> tuple[Tensor, Tensor]:
        ctx.kernels = kernels
        ctx.save_for_backward(x, weight1, weight2)
        stacked = torch.cat((weight1, weight2)).transpose(0, 1)
        first, second = kernels.input_grad(x, stacked, [weight1.shape[0], weight2.shape[0]])
        return first, second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy1: Tensor, dy2: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, weight2 = ctx.saved_tensors
        kernels = ctx.kernels
        dy1, dy2 = in_layout_of(x, [dy1, dy2])
        dx = None
        if ctx.needs_input_grad[1]:
            dx = empty_map(x, x.shape[1])
            kernels.forward([dy1, dy2], torch.cat((weight1, weight2)).transpose(0, 1), None, dx)
        dweight1 = kernels.weight_grad(dy1, [x]) if ctx.needs_input_grad[2] else None
        dweight2 = kernels.weight_grad(dy2, [x]) if ctx.needs_input_grad[3] else None
        return None, dx, dweight1, dweight2


# ---- backends


_LARGEST_WEIGHT = 256 * 128
"""Measured on two Zen 5 cores with AVX-512, float32, channels_last slices, against the framework with its copies:
forward and backward 1.1 to 2.5 times as fast up to 256 → 128 channels (1.0); 512 → 256: 0.97 and 0.82."""


def _unable_on_cpu(inputs: Sequence[Tensor], weight: Tensor, out: Tensor | None) -> str | None:
    if weight.dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64, got {weight.dtype}"
    if out is not None and layout_of(out) is None:
        return "out must be channels_last or contiguous"
    return not_on("cpu", *inputs, weight)


def _too_large(numbers: int) -> str | None:
    if numbers > _LARGEST_WEIGHT:
        return f"weights of more than {_LARGEST_WEIGHT} numbers are faster in the framework's convolution"
    return None


def _supports_cpu(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, out: Tensor | None) -> str | None:
    reason = _unable_on_cpu(inputs, weight, out)
    if reason is not None or get_backend("conv1x1") != "auto":
        return reason
    if len(inputs) == 1 and layout_of(inputs[0]) == "channels_last" and row_stride(inputs[0]) == weight.shape[1]:
        return "the framework's convolution is as fast on one dense channels_last map"
    return _too_large(weight.shape[0] * weight.shape[1])


def _products_round_otherwise(weight: Tensor) -> bool:
    """Whether torch is set to use TF32 in one of its convolutions and matrix products of float32, not in both.

    The operator stands for a convolution, so it rounds as convolutions are set to. The compiler cannot read settings.
    """
    if weight.dtype != torch.float32 or torch.compiler.is_compiling():
        return weight.dtype == torch.float32
    settings: Any = torch.backends
    return bool((settings.cudnn.conv.fp32_precision == "tf32") != (settings.cuda.matmul.fp32_precision == "tf32"))


def _supports_cuda(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, out: Tensor | None) -> str | None:
    for x in inputs if out is None else (*inputs, out):
        if row_stride(x) is None:
            return "its matrix products read channels_last maps"
    if weight.is_cuda and _products_round_otherwise(weight):
        return "matrix products of float32 are set (torch.backends) to another fp32_precision than convolutions"
    return not_on("cuda", *inputs, weight)


def _supports_triton(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, out: Tensor | None) -> str | None:
    if len(inputs) == 1 and get_backend("conv1x1") == "auto":
        dense = row_stride(inputs[0]) in (None, weight.shape[1])
        if dense or not (weight.is_cuda and _products_round_otherwise(weight)):
            return "one map is a matrix product of cuBLAS, or torch's convolution"
    if out is not None and layout_of(out) is None:
        return "out must be channels_last or contiguous"
    return not_for_triton("conv1x1", *inputs, weight)


def _supports_cpu_pair(x: Tensor, weight1: Tensor, weight2: Tensor) -> str | None:
    reason = _unable_on_cpu([x], weight1, None)
    if reason is None and get_backend("conv1x1_pair") == "auto":
        # Reading a map once pays on dense maps too: 1.05 to 1.4 times as fast, forward and backward; slices 1.1 to 2.4.
        reason = _too_large(x.shape[1] * max(weight1.shape[0], weight2.shape[0]))
    return reason


def _supports_cuda_pair(x: Tensor, weight1: Tensor, weight2: Tensor) -> str | None:
    return _supports_cuda([x], weight1, None, None)


def _supports_triton_pair(x: Tensor, weight1: Tensor, weight2: Tensor) -> str | None:
    return not_for_triton("conv1x1_pair", x, weight1, weight2)


def _triton() -> _Kernels:
    from yolov9_fast.kernels.conv1x1 import conv1x1_forward, conv1x1_input_grad, conv1x1_weight_grad

    return _Kernels(conv1x1_forward, conv1x1_input_grad, conv1x1_weight_grad)


def _cublas() -> _Kernels:
    return _Kernels(matrix_forward, matrix_input_grad, matrix_weight_grad)


OPERATOR = Operator(
    "conv1x1",
    "1x1 convolution of channel slices and of several maps, without a copy",
    reference=conv1x1_reference,
    kernels=KERNELS,
    run=_run,
    backends={
        "cpu": Compiled(_supports_cpu),
        "triton": Python(_triton, _supports_triton),
        "cuda": Python(_cublas, _supports_cuda, traced=True),
    },
)
PAIR = Operator(
    "conv1x1_pair",
    "two 1x1 convolutions of one map, read once",
    reference=conv1x1_pair_reference,
    kernels=KERNELS,
    run=_run_pair,
    backends={
        "cpu": Compiled(_supports_cpu_pair),
        "triton": Python(_triton, _supports_triton_pair),
        "cuda": Python(_cublas, _supports_cuda_pair, traced=True),
    },
)
