"""The operators' cases: inputs for a layer's shape, the public call, and the bytes and operations that it needs.

One table entry per operator. Bytes are those of the fused algorithm: BatchNorm reads its input twice, because
statistics precede their use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yolov9_fast import ops
from yolov9_fast.ops._backend import backend
from yolov9_fast.ops._operator import Operator, operators

from .cases import LAYOUTS, Absent, Case, Clock, OpenCase, Runner, Settings, Traffic, flatten, named, torch_dtype
from .compiled import compiled_runners
from .shapes import NETWORKS, SIZES, Dims, network_shapes

BACKENDS = ("cpu", "triton", "cuda")


@dataclass
class Problem:
    """`function(*tensors)` with what it needs; floating tensors that `learn` get gradients."""

    function: Callable[..., Any]
    tensors: list[Tensor]
    learn: list[bool]

    def cast(self, device: torch.device, dtype: torch.dtype, layout: str) -> list[Tensor]:
        """Own copies of the tensors: activations [B, C, H, W] in `dtype` and `layout`, the rest in float32 at least."""
        made = []
        for own, learn in zip(self.tensors, self.learn, strict=True):
            tensor = own.detach()
            if tensor.dim() == 4 and tensor.shape[2:] != (1, 1):
                copy = tensor.to(device, dtype).contiguous(memory_format=LAYOUTS[layout])
            elif tensor.dim() == 4:
                copy = tensor.to(device, dtype).clone()
            else:
                wide = torch.promote_types(dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
                copy = tensor.to(device, wide, copy=True)
            made.append(copy.requires_grad_(learn))
        return made


@dataclass(frozen=True)
class Entry:
    """`build(function, dims, batch, random)` makes a problem on the CPU in float32; `traffic(dims, batch, itemsize)`
    gives (forward, backward)."""

    name: str
    build: Callable[[Callable[..., Any], Dims, int, Callable[..., Tensor]], Problem]
    traffic: Callable[[Dims, int, int], tuple[Traffic, Traffic]]
    modes: tuple[str, ...] = ("forward", "both")


def random_tensors(seed: int = 0) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def make(*size: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        return torch.randn(size, generator=generator) * scale + offset

    return make


# Inputs and calls ---------------------------------------------------------------------------------------------------


def _norm(random: Callable[..., Tensor], channels: int) -> list[Tensor]:
    """weight, bias, running mean, running variance."""
    return [
        random(channels, scale=0.2, offset=1.0),
        random(channels, scale=0.2),
        torch.zeros(channels),
        torch.ones(channels),
    ]


def _plane(dims: Dims, batch: int) -> tuple[int, int, int, int]:
    return batch, dims["channels"], dims["height"], dims["width"]


def _build_bn_silu(function: Callable[..., Any], dims: Dims, batch: int, random: Callable[..., Tensor]) -> Problem:
    size = _plane(dims, batch)
    residual = [random(*size)] if dims.get("residual") else []

    def call(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *rest: Tensor) -> Any:
        more = {"residual": rest[0]} if rest else {}
        return function(x, weight, bias, mean, var, training=True, momentum=0.03, eps=1e-3, **more)

    tensors = [random(*size, offset=0.3), *_norm(random, size[1]), *residual]
    return Problem(call, tensors, [True, True, True, False, False, *([True] * len(residual))])


def _build_rep_bn_silu(function: Callable[..., Any], dims: Dims, batch: int, random: Callable[..., Tensor]) -> Problem:
    size = _plane(dims, batch)

    def call(*t: Tensor) -> Any:
        first, second = ops.Norm(*t[1:5]), ops.Norm(*t[6:10])
        return function(t[0], first, t[5], second, training=True, momentum=0.03, eps=1e-3)

    one = [random(*size, offset=0.3), *_norm(random, size[1])]
    other = [random(*size, scale=2.0), *_norm(random, size[1])]
    return Problem(call, [*one, *other], [True, True, True, False, False] * 2)


def _build_conv1x1(function: Callable[..., Any], dims: Dims, batch: int, random: Callable[..., Tensor]) -> Problem:
    channels, height, width = dims["inputs"], dims["height"], dims["width"]
    inputs = [random(batch, c, height, width) for c in channels]
    weight = random(dims["out"], sum(channels), 1, 1, scale=sum(channels) ** -0.5)
    return Problem(lambda *t: function(list(t[:-1]), t[-1]), [*inputs, weight], [True] * (len(inputs) + 1))


def _build_conv1x1_pair(function: Callable[..., Any], dims: Dims, batch: int, random: Callable[..., Tensor]) -> Problem:
    (channels,) = dims["inputs"]
    weights = [random(dims["out"], channels, 1, 1, scale=channels**-0.5) for _ in range(2)]
    return Problem(function, [random(batch, channels, dims["height"], dims["width"]), *weights], [True] * 3)


def _build_cbfuse(function: Callable[..., Any], dims: Dims, batch: int, random: Callable[..., Tensor]) -> Problem:
    inputs = [random(batch, dims["channels"], h, w) for h, w in dims["inputs"]]
    target = random(*_plane(dims, batch))
    return Problem(lambda *t: function(list(t[:-1]), t[-1]), [*inputs, target], [True] * (len(inputs) + 1))


def _build_spp(function: Callable[..., Any], dims: Dims, batch: int, random: Callable[..., Tensor]) -> Problem:
    return Problem(function, [random(*_plane(dims, batch))], [True])


def _build_adown_pool(function: Callable[..., Any], dims: Dims, batch: int, random: Callable[..., Tensor]) -> Problem:
    split = bool(dims["split"])
    return Problem(lambda x: function(x, split), [random(*_plane(dims, batch))], [True])


# Bytes and operations -------------------------------------------------------------------------------------------------


def _passes(forward: float, backward: float, tensors: float, work: float = 8) -> Any:
    """Traffic of a pointwise operator: passes over a plane, tensors held, operations per element and direction."""

    def traffic(dims: Dims, batch: int, itemsize: int) -> tuple[Traffic, Traffic]:
        elements = batch * dims["channels"] * dims["height"] * dims["width"]
        more = 1 if dims.get("residual") else 0
        plane = elements * itemsize
        return (
            Traffic((forward + more) * plane, work * elements, (tensors + more) * plane),
            Traffic(backward * plane, 2 * work * elements, (tensors + 1) * plane),
        )

    return traffic


def _conv1x1_traffic(dims: Dims, batch: int, itemsize: int) -> tuple[Traffic, Traffic]:
    pixels = batch * dims["height"] * dims["width"]
    inputs, out = sum(dims["inputs"]), dims["out"]
    x, y, w = pixels * inputs * itemsize, pixels * out * itemsize, inputs * out * itemsize
    work = 2.0 * pixels * inputs * out
    return (
        Traffic(x + y + w, work, x + y + w, True),
        Traffic(2 * y + 2 * x + 2 * w, 2 * work, 2 * x + y + 2 * w, True),
    )


def _conv1x1_pair_traffic(dims: Dims, batch: int, itemsize: int) -> tuple[Traffic, Traffic]:
    """As one convolution of twice the outputs."""
    return _conv1x1_traffic({**dims, "out": 2 * dims["out"]}, batch, itemsize)


def _cbfuse_traffic(dims: Dims, batch: int, itemsize: int) -> tuple[Traffic, Traffic]:
    channels = batch * dims["channels"] * itemsize
    parts = sum(h * w for h, w in dims["inputs"]) * channels
    plane = dims["height"] * dims["width"] * channels
    count = len(dims["inputs"])
    # The target's gradient is the incoming one itself.
    return (
        Traffic(parts + 2 * plane, count * plane / itemsize, parts + 2 * plane),
        Traffic(plane + parts, count * plane / itemsize, parts + plane),
    )


def _adown_traffic(dims: Dims, batch: int, itemsize: int) -> tuple[Traffic, Traffic]:
    plane = batch * dims["channels"] * dims["height"] * dims["width"] * itemsize
    out = plane * (0.5 + 0.125) if dims["split"] else plane
    again = plane / 2 if dims["split"] else 0  # the half that was max-pooled is looked at again
    return (
        Traffic(plane + out, 5 * plane / itemsize, plane + out),
        Traffic(out + again + plane, 5 * plane / itemsize, plane + out),
    )


ENTRIES = {
    entry.name: entry
    for entry in (
        Entry("bn_silu", _build_bn_silu, _passes(3, 5, 2)),
        Entry("rep_bn_silu", _build_rep_bn_silu, _passes(5, 8, 3, work=14)),
        Entry("conv1x1", _build_conv1x1, _conv1x1_traffic),
        Entry("conv1x1_pair", _build_conv1x1_pair, _conv1x1_pair_traffic),
        Entry("cbfuse", _build_cbfuse, _cbfuse_traffic),
        Entry("spp", _build_spp, _passes(4, 9, 4, work=12)),
        Entry("adown_pool", _build_adown_pool, _adown_traffic),
    )
}


# Cases ----------------------------------------------------------------------------------------------------------------


def operator_cases(settings: Settings, dtypes: Sequence[str]) -> Iterator[Case]:
    """Every operator on every shape of the networks, shapes that several networks share once."""
    seen: set[tuple[Any, ...]] = set()
    # The smallest network and the one most trained first: a budget may end before the others.
    leading = [(network, size) for size in SIZES for network in ("yolov9-t", "yolov9-c")]
    others = [(network, size) for size in SIZES for network in NETWORKS if (network, size) not in leading]
    for priority, (network, size) in enumerate([*leading, *others] if settings.full else leading[:1]):
        for shape in network_shapes(network, size):
            if (shape.operator, shape.dims) in seen or shape.operator not in ENTRIES:
                continue
            seen.add((shape.operator, shape.dims))
            entry = ENTRIES[shape.operator]
            for dtype in dtypes:
                for mode in entry.modes:
                    dims = {**shape.sizes, "batch": settings.batch}
                    yield Case(
                        f"{entry.name}/{shape.text()}/b{settings.batch}/{dtype}/{mode}",
                        "ops",
                        entry.name,
                        f"{network}@{size}",
                        mode,
                        dtype,
                        {**dims, "layer": shape.layer},
                        _opener(entry, dims, mode, dtype),
                        count=shape.count,
                        # The layers that occur most, of the first network, come first.
                        priority=priority * 100 + (0 if shape.count > 1 else 1),
                    )


def _opener(entry: Entry, dims: Dims, mode: str, dtype: str) -> Callable[[torch.device, Settings], OpenCase]:
    def open_case(device: torch.device, settings: Settings) -> OpenCase:
        problem = entry.build(getattr(ops, entry.name), dims, dims["batch"], random_tensors())
        forward, backward = entry.traffic(dims, dims["batch"], torch_dtype(dtype).itemsize)
        return open_problem(entry.name, problem, mode, dtype, device, settings, forward, backward)

    return open_case


def open_problem(
    name: str,
    problem: Problem,
    mode: str,
    dtype: str,
    device: torch.device,
    settings: Settings,
    forward: Traffic,
    backward: Traffic,
    *,
    rule: str = "twice",
    layouts: Sequence[str] = ("nchw", "channels_last"),
) -> OpenCase:
    """A problem of one operator on all its backends; the reference is the eager form in float64.

    `name`: the operator; "" for a function that uses several, which then runs as `auto` chooses.
    """

    def reference() -> dict[str, Tensor]:
        # Starting from the values as rounded to the case's precision.
        rounded = [t.to(torch_dtype(dtype)).float() if t.dim() == 4 else t for t in problem.tensors]
        exact = Problem(problem.function, rounded, problem.learn).cast(device, torch.float64, layouts[0])
        with backend("eager"):
            return _outcome(problem.function, exact, mode)

    def runners() -> Iterator[Runner | Absent]:
        for layout in layouts:
            tensors = problem.cast(device, torch_dtype(dtype), layout)

            def make(
                function: Callable[..., Any], provider: str, tensors: list[Tensor] = tensors, layout: str = layout
            ) -> Runner:
                return _runner(provider, layout, function, tensors, mode, lambda: backend("eager"))

            yield make(problem.function, "eager")
            yield from compiled_runners(settings, device, problem.function, make)
            if not name:
                yield _runner("auto", layout, problem.function, tensors, mode, lambda: backend("auto"))
                continue
            for one in BACKENDS:
                yield _own_runner(operators[name], one, layout, problem.function, tensors, mode, device)

    traffic = forward if mode == "forward" else forward + backward
    return OpenCase(runners(), None if rule == "exact" else reference, rule, traffic)


def _own_runner(
    operator: Operator[Any],
    one: str,
    layout: str,
    function: Callable[..., Any],
    tensors: list[Tensor],
    mode: str,
    device: torch.device,
) -> Runner | Absent:
    reason = operator.why_not(one)
    if reason is None and (one == "cpu") != (device.type == "cpu"):
        reason = f"it does not run on {device.type}"
    if reason is not None:
        return Absent(one, layout, reason)
    return _runner(one, layout, function, tensors, mode, lambda: backend(one, op=operator.name))


def _runner(
    provider: str, layout: str, function: Callable[..., Any], tensors: list[Tensor], mode: str, context: Any
) -> Runner:
    needs_grad = any(tensor.requires_grad for tensor in tensors)
    cotangents: list[Tensor] = []

    def call(clock: Clock) -> Any:
        with context():
            if mode == "forward":
                return function(*tensors)
            outputs = _differentiable(function(*tensors))
            if not cotangents:
                cotangents.extend(_cotangents(outputs))
            return torch.autograd.grad(outputs, [t for t in tensors if t.requires_grad], cotangents)

    def results() -> dict[str, Tensor]:
        with context():
            return _outcome(function, tensors, mode)

    assert needs_grad or mode == "forward"
    return Runner(provider, layout, call, results)


def _outcome(function: Callable[..., Any], tensors: list[Tensor], mode: str) -> dict[str, Tensor]:
    value = function(*tensors)
    found = named("output", [tensor.detach() for tensor in flatten(value)])
    if mode != "forward":
        outputs = _differentiable(value)
        learned = [tensor for tensor in tensors if tensor.requires_grad]
        found |= named("gradient", torch.autograd.grad(outputs, learned, _cotangents(outputs)))
    return found


def _differentiable(value: Any) -> list[Tensor]:
    return [tensor for tensor in flatten(value) if tensor.requires_grad]


def _cotangents(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Fixed random gradients, the same values for every provider, precision, layout and device."""
    random = random_tensors(seed=1)
    made = []
    for output in outputs:
        one = random(*output.shape).to(output.device, output.dtype)
        made.append(torch.empty_like(output).copy_(one))
    return made
