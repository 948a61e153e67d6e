"""Targets of the operators on feature maps: all layouts, dtypes, sizes down to zero and values up to infinity."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from tests.fuzz.frame import Case, target
from tests.fuzz.operators import (
    DTYPES,
    LIMITS,
    RELATIVE,
    SPECIAL,
    Invocation,
    Made,
    check,
    finite,
    side,
    spoil,
    tensor,
)
from yolov9_fast import ops
from yolov9_fast.ops import Norm

_LARGE = 1e18
"""Squares of larger values leave the range of float32."""


def size(case: Case) -> tuple[int, int, int, int]:
    batch, channels = side(case, "batch", 3), side(case, "channels", 12)
    return batch, channels, side(case, "height", 7), side(case, "width", 7)


def dtype_of(case: Case) -> torch.dtype:
    return case.draw(st.sampled_from(DTYPES), "dtype")


def slot(case: Case, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Made | None:
    return tensor(case, name, shape, dtype, specials=()) if case.draw(st.integers(0, 3), f"has {name}") == 0 else None


def vector(case: Case, name: str, count: int, dtype: torch.dtype, **fixed: Any) -> Made | None:
    if case.draw(st.integers(0, 4), f"has {name}") == 0:
        return None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return tensor(case, name, (count,), wide, gradient=True, specials=(), **fixed)


@target("adown_pool", **LIMITS)
def adown_pool(case: Case) -> None:
    split = case.draw(st.booleans(), "split")
    x = tensor(case, "x", size(case), dtype_of(case), gradient=True)
    arguments = spoil(case, [x])

    def call(x: Any) -> Any:
        return ops.adown_pool(x, split)

    def magnitude(x: Tensor) -> Any:
        return call(x.double().abs())

    check(Invocation("adown_pool", call, arguments, magnitude=magnitude, gradients=finite(x)))


@target("spp", **LIMITS)
def spp(case: Case) -> None:
    shape, dtype = size(case), dtype_of(case)
    x = tensor(case, "x", shape, dtype, gradient=True)
    with_input = case.draw(st.booleans(), "with_input")
    out = [slot(case, f"out{n}", shape, dtype) for n in range(3)]
    slots = out if all(out) else None
    arguments = spoil(case, [x, slots])

    def call(x: Any, out: Any) -> Any:
        return (ops.spp_with_input if with_input else ops.spp)(x, out)

    check(Invocation("spp", call, arguments, gradients=finite(x)))


@target("cbfuse", **LIMITS)
def cbfuse(case: Case) -> None:
    batch, channels, height, width = size(case)
    dtype = dtype_of(case)
    count = case.draw(st.integers(0, 3), "inputs")
    sides = [(side(case, "h", 5), side(case, "w", 5)) for _ in range(count)]
    maps = [tensor(case, f"x{n}", (batch, channels, *hw), dtype, gradient=True) for n, hw in enumerate(sides)]
    goal = tensor(case, "target", (batch, channels, height, width), dtype, gradient=True)
    arguments = spoil(case, [maps, goal])

    def magnitude(maps: list[Tensor], goal: Tensor) -> Any:
        return ops.cbfuse([x.double().abs() for x in maps], goal.double().abs())

    check(Invocation("cbfuse", ops.cbfuse, arguments, magnitude=magnitude, gradients=finite(*maps, goal)))


def next_pixel(expected: Tensor, maps: list[Made], weight: Made, bias: Made | None = None) -> Tensor | None:
    """Not compared: with an odd number of channels, PyTorch's bfloat16 convolution on a CPU adds a channel of the next
    pixel times zero, which is NaN where that is not finite."""
    if expected.dtype != torch.bfloat16:
        return None
    x = torch.cat([each() for each in maps], 1)
    product = torch.nn.functional.conv2d(x.float(), weight().float(), bias().float() if bias else None)
    return product.to(expected.dtype).isfinite() & expected.isnan()


@target("conv1x1", **LIMITS)
def conv1x1(case: Case) -> None:
    batch, channels, height, width = size(case)
    dtype, outputs = dtype_of(case), side(case, "outputs", 12)
    counts = [channels, *(side(case, "more", 9) for _ in range(case.draw(st.integers(0, 3), "others")))]
    maps = [tensor(case, f"x{n}", (batch, c, height, width), dtype, gradient=True) for n, c in enumerate(counts)]
    weight = tensor(case, "weight", (outputs, sum(counts), 1, 1), dtype, gradient=True, specials=SPECIAL[:3])
    has_bias = case.draw(st.booleans(), "has bias")
    bias = tensor(case, "bias", (outputs,), dtype, gradient=True) if has_bias else None
    out = slot(case, "out", (batch, outputs, height, width), dtype)
    arguments = spoil(case, [maps, weight, bias, out])

    def magnitude(maps: list[Tensor], weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Any:
        x = torch.cat([x.double().abs().nan_to_num(0, 0, 0) for x in maps], 1)
        w = weight.double().abs().nan_to_num(0, 0, 0)[:, :, 0, 0]
        y = torch.einsum("bchw,oc->bohw", x, w)
        return y if bias is None else y + bias.double().abs()[:, None, None]

    check(
        Invocation(
            "conv1x1",
            ops.conv1x1,
            arguments,
            magnitude=magnitude,
            gradients=finite(*maps, weight),
            skip=lambda name, number, expected: next_pixel(expected, maps, weight, bias),
        )
    )


@target("conv1x1_pair", **LIMITS)
def conv1x1_pair(case: Case) -> None:
    shape, dtype = size(case), dtype_of(case)
    x = tensor(case, "x", shape, dtype, gradient=True)
    counts = side(case, "first", 9), side(case, "second", 9)
    weights = [
        tensor(case, f"weight{n}", (count, shape[1], 1, 1), dtype, gradient=True, specials=SPECIAL[:3])
        for n, count in enumerate(counts)
    ]
    arguments = spoil(case, [x, *weights])

    def magnitude(x: Tensor, *weights: Tensor) -> Any:
        wide = [each.double().abs().nan_to_num(0, 0, 0) for each in (x, *weights)]
        return [torch.einsum("bchw,oc->bohw", wide[0], w[:, :, 0, 0]) for w in wide[1:]]

    check(
        Invocation(
            "conv1x1_pair",
            ops.conv1x1_pair,
            arguments,
            magnitude=magnitude,
            gradients=finite(x, *weights),
            skip=lambda name, number, expected: next_pixel(expected, [x], weights[number]),
        )
    )


@target("convs", **LIMITS)
def convs(case: Case) -> None:
    """Of finite weights: the kernels multiply the border's zeros too (docs/architecture.md)."""
    batch, _, height, width = size(case)
    channels = case.draw(st.sampled_from([8, 16, 24, 1, 9]), "channels")
    dtype = dtype_of(case)
    x = tensor(case, "x", (batch, channels, height, width), dtype, gradient=True)
    weights = []
    for number in range(case.draw(st.integers(1, 3), "weights")):
        outputs, kernel = (
            case.draw(st.sampled_from([8, 16, 3]), "outputs"),
            case.draw(st.sampled_from([3, 1]), "kernel"),
        )
        shape = (outputs, channels, kernel, kernel)
        weights.append(tensor(case, f"weight{number}", shape, dtype, gradient=True, specials=[]))
    arguments = spoil(case, [x, weights])

    def magnitude(x: Tensor, weights: list[Tensor]) -> Any:
        wide = x.double().abs().nan_to_num(0, 0, 0)
        return [F.conv2d(wide, w.double().abs(), padding=w.shape[2] // 2) for w in weights]

    check(Invocation("convs", ops.convs, arguments, magnitude=magnitude, gradients=finite(x, *weights)))


@target("tap_backward", **LIMITS)
def tap_backward(case: Case) -> None:
    """`tap`, `split_view` and `concat`, whose gradients the operator assembles."""
    shape = size(case)
    x = tensor(case, "x", shape, dtype_of(case), gradient=True)
    start, count = side(case, "start", 12), case.draw(st.none() | st.integers(-1, 12), "count")
    sizes = case.draw(st.lists(st.integers(-1, 9), max_size=4), "sizes")
    if sum(sizes) < shape[1] and case.draw(st.booleans(), "complete"):
        sizes = [*sizes, shape[1] - sum(sizes)]
    what = case.draw(st.sampled_from(["tap", "split", "concat"]), "what")
    arguments = spoil(case, [x])

    def call(x: Any) -> Any:
        if what == "tap":
            return [y * 1 for y in ops.tap(x, start, count)]
        parts = ops.split_view(x, sizes)
        return ops.concat(parts) if what == "concat" else parts

    check(Invocation("tap_backward", call, arguments))


def norm(case: Case, name: str, channels: int, dtype: torch.dtype, training: bool) -> list[Made | None]:
    weight, bias = (vector(case, f"{name}.{each}", channels, dtype) for each in ("weight", "bias"))
    if training and case.draw(st.booleans(), f"{name}.no statistics"):
        return [weight, bias, None, None]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mean = tensor(case, f"{name}.mean", (channels,), wide, specials=SPECIAL[:3])
    var = tensor(case, f"{name}.var", (channels,), wide, kinds=["uniform"], specials=[0.0, 1e30], shift=0.01)
    return [weight, bias, mean, var]


def overflows(x: Tensor) -> Tensor:
    """[C] whether a channel's statistics leave float32, though its values do not: then only float64 sums are right."""
    values = x.double().abs().transpose(0, 1).flatten(1)
    return (values.amax(1) if values.shape[1] else values.new_zeros(len(values))) > _LARGE


def by_channel(name: str, number: int, expected: Tensor, channels: Tensor) -> Tensor | None:
    """Not compared: PyTorch's own layer sums squares in float32 in one loop and in float64 in another."""
    shape = (1, -1, 1, 1) if expected.ndim == 4 else (-1,)
    return channels.view(shape).expand_as(expected)


@target("bn_silu", **LIMITS)
def bn_silu(case: Case) -> None:
    shape, dtype = size(case), dtype_of(case)
    training = case.draw(st.booleans(), "training")
    x = tensor(case, "x", shape, dtype, gradient=True)
    residual = tensor(case, "residual", shape, dtype, gradient=True) if case.draw(st.booleans(), "residual") else None
    given = norm(case, "norm", shape[1], dtype, training)
    activation = case.draw(st.booleans(), "activation")
    out = slot(case, "out", shape, dtype)
    arguments = spoil(case, [x, *given, residual, out])

    def call(x: Any, weight: Any, bias: Any, mean: Any, var: Any, residual: Any, out: Any) -> Any:
        options: dict[str, Any] = {"training": training, "momentum": 0.1, "eps": 1e-3, "activation": activation}
        z = ops.bn_silu(x, weight, bias, mean, var, residual=residual, out=out, **options)
        return [z, mean, var] if training and mean is not None else z

    channels = overflows(x())
    check(
        Invocation(
            "bn_silu",
            call,
            arguments,
            relative=RELATIVE[dtype],
            gradients=finite(x, residual, *given),
            skip=lambda name, number, expected: by_channel(name, number, expected, channels),
        )
    )


@target("rep_bn_silu", **LIMITS)
def rep_bn_silu(case: Case) -> None:
    shape, dtype = size(case), dtype_of(case)
    training = case.draw(st.booleans(), "training")
    maps = [tensor(case, f"x{n}", shape, dtype, gradient=True) for n in (1, 2)]
    residual = tensor(case, "residual", shape, dtype, gradient=True) if case.draw(st.booleans(), "residual") else None
    norms = [norm(case, f"norm{n}", shape[1], dtype, training) for n in (1, 2)]
    activation = case.draw(st.booleans(), "activation")
    out = slot(case, "out", shape, dtype)
    arguments = spoil(case, [*maps, *norms[0], *norms[1], residual, out])

    def call(x1: Any, x2: Any, *others: Any) -> Any:
        first, second, residual, out = Norm(*others[:4]), Norm(*others[4:8]), others[8], others[9]
        options: dict[str, Any] = {"training": training, "momentum": 0.1, "eps": 1e-3, "activation": activation}
        z = ops.rep_bn_silu(x1, first, x2, second, residual=residual, out=out, **options)
        running = [each for each in (*first[2:], *second[2:]) if each is not None]
        return [z, *running] if training else z

    channels = overflows(maps[0]()) | overflows(maps[1]())
    check(
        Invocation(
            "rep_bn_silu",
            call,
            arguments,
            relative=RELATIVE[dtype],
            gradients=finite(*maps, residual, *norms[0], *norms[1]),
            skip=lambda name, number, expected: by_channel(name, number, expected, channels),
        )
    )
