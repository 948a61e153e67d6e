"""What a traced call would take on a GPU at least: its kernels, their bytes and products, against a device's ceilings.

A kernel takes the longest of three times: its bytes over the bandwidth, its products over the arithmetic ceiling of
their dtype, and what any kernel takes. A tensor is read or written once by each kernel that has it as an argument.
"""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .counting import works

LEAST_SECONDS = 2.5e-6
"""From the begin of an empty kernel to that of the next one in its stream; CUDA graphs come near 1.5 µs."""


@dataclass(frozen=True)
class Device:
    """Ceilings of a GPU.

    `bandwidth`: bytes per second of its memory. `operations`: per second, by "float64", "float32", "tf32", "bfloat16"
    and "float16", dense, a multiplication and an addition being two; what is missing counts as float32. `least`: the
    seconds of the shortest kernel.
    """

    name: str
    bandwidth: float
    operations: Mapping[str, float]
    least: float = LEAST_SECONDS

    def seconds(self, kernel: Kernel) -> float:
        return max(self.least, *self._parts(kernel))

    def bound(self, kernel: Kernel) -> str:
        """What sets the time: "launch", "memory" or "arithmetic"."""
        memory, arithmetic = self._parts(kernel)
        if max(memory, arithmetic) <= self.least:
            return "launch"
        return "memory" if memory >= arithmetic else "arithmetic"

    def _parts(self, kernel: Kernel) -> tuple[float, float]:
        speed = self.operations.get(kernel.computed_in) or self.operations["float32"]
        return kernel.moved / self.bandwidth, kernel.operations / speed


# Data sheets, dense (without sparsity): NVIDIA H100 SXM5 80 GB and H200 SXM (H100 and H200 Tensor Core GPU data
# sheets), A100 SXM4 80 GB (A100 data sheet), L4 (L4 data sheet; its tensor figures are given with sparsity, halved
# here; float64 is 1/64 of float32), GeForce RTX 4090 (Ada GPU architecture white paper, appendix A; sums in float32).
_HOPPER = {"float64": 67e12, "float32": 67e12, "tf32": 494.7e12, "bfloat16": 989.4e12, "float16": 989.4e12}
_AMPERE = {"float64": 19.5e12, "float32": 19.5e12, "tf32": 156e12, "bfloat16": 312e12, "float16": 312e12}
_L4 = {"float64": 0.47e12, "float32": 30.3e12, "tf32": 60e12, "bfloat16": 121e12, "float16": 121e12}
_RTX_4090 = {"float64": 1.29e12, "float32": 82.6e12, "tf32": 82.6e12, "bfloat16": 165.2e12, "float16": 165.2e12}
devices: dict[str, Device] = {
    device.name: device
    for device in (
        Device("H100", 3.35e12, _HOPPER),
        Device("H200", 4.8e12, _HOPPER),
        Device("A100", 2.039e12, _AMPERE),
        Device("L4", 300e9, _L4),
        Device("RTX4090", 1008e9, _RTX_4090),
    )
}
"""By name; `register_device` adds one."""


def register_device(device: Device) -> None:
    """Add a GPU for `yolov9-fast bench predict --device NAME`, or replace the one of its name.

    Raises `ValueError` for ceilings that are not positive, or without a figure for float32.
    """
    figures = {"bandwidth": device.bandwidth, "least": device.least, **device.operations}
    for name, value in figures.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}: expected a positive number, got {value}")
    if "float32" not in device.operations:
        raise ValueError(f"operations: expected a figure for float32, got {', '.join(device.operations) or 'none'}")
    devices[device.name] = device


# Calls and their kernels ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """A kernel of `operator`: bytes read and written, operations of its products and what they are computed in."""

    operator: str
    moved: float
    operations: float = 0.0
    computed_in: str = "float32"


@dataclass(frozen=True)
class Shape:
    """A tensor without its values: dtype by name, shape, strides and offset in elements."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * int(getattr(torch, self.dtype).itemsize)

    def on_meta(self) -> Tensor:
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True) if size)
        storage = torch.empty(self.offset + last + 1, dtype=getattr(torch, self.dtype), device="meta")
        return storage.as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True)
class Call:
    """A traced call that works on the device: nested tuples, tensors as shapes, and how many kernels it launches."""

    operator: str
    arguments: tuple[Any, ...]
    results: tuple[Any, ...]
    launches: int = 1

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Call:
        return cls(data["operator"], _nested(data["arguments"]), _nested(data["results"]), data["launches"])

    @property
    def name(self) -> str:
        """Without its namespace."""
        return self.operator.split("::")[-1]


def _nested(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_nested, value))
    if isinstance(value, dict):
        return Shape(value["dtype"], tuple(value["shape"]), tuple(value["stride"]), value["offset"])
    return value


def shapes(value: Any) -> Iterator[Shape]:
    """All tensors in nested tuples."""
    if isinstance(value, Shape):
        yield value
    elif isinstance(value, tuple):
        for entry in value:
            yield from shapes(entry)


def _bytes(*values: Any) -> int:
    return sum(shape.bytes for shape in shapes(values))


def kernels_of(call: Call) -> list[Kernel]:
    """The kernels of a call, in order. Where nothing better is known each takes an equal part of the call's bytes."""
    if call.operator.startswith("yolov9_fast::") and call.name.endswith("_triton"):
        return _of_triton(call)
    rule = _RULES.get(call.name)
    if rule is not None:
        return [Kernel(call.operator, *numbers) for numbers in rule(call)]
    number = max(call.launches, 1)
    part = Kernel(
        call.operator,
        _bytes(call.arguments, call.results) / number,
        _operations(call) / number,
        _dtype(call),
    )
    return [part] * call.launches


_Numbers = tuple[float, float, str]


def _convolution(call: Call) -> list[_Numbers]:
    x, weight, bias = call.arguments[:3]
    kernels: list[_Numbers] = [(_bytes(x, weight, call.results), _operations(call), _dtype(call))]
    if bias is not None:
        kernels.append((2 * _bytes(call.results), 0.0, "float32"))
    return kernels


def _convolution_backward(call: Call) -> list[_Numbers]:
    dy, x, weight = call.arguments[:3]
    dx, dweight, dbias = (*call.results, None, None, None)[:3]
    each = _products_of_gradient(dy, weight)
    found: list[tuple[Any, _Numbers]] = [
        (dx, (_bytes(dy, weight, dx), each, _dtype(call))),
        (dweight, (_bytes(dy, x, dweight), each, _dtype(call))),
        (dbias, (_bytes(dy, dbias), 0.0, "float32")),
    ]
    return [numbers for result, numbers in found if result is not None]


def _products_of_gradient(dy: Shape, weight: Shape) -> float:
    """Of either gradient: as many as of the convolution (transposed ones do not occur)."""
    n, _, h, w = dy.shape
    return 2.0 * n * h * w * math.prod(weight.shape)


def _batch_norm(call: Call) -> list[_Numbers]:
    x, y = call.arguments[0], call.results[0]
    return [(_bytes(x), 0.0, "float32"), (_bytes(x, y), 0.0, "float32")]


def _batch_norm_backward(call: Call) -> list[_Numbers]:
    dy, x = call.arguments[:2]
    return [(_bytes(dy, x), 0.0, "float32"), (_bytes(dy, x, call.results[0]), 0.0, "float32")]


_RULES: dict[str, Callable[[Call], list[_Numbers]]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "native_batch_norm": _batch_norm,
    "native_batch_norm_backward": _batch_norm_backward,
}


def _dtype(call: Call) -> str:
    """What products are computed in: cuDNN uses TF32 for float32 maps unless it is told not to, matrix products not."""
    first = next((shape.dtype for shape in shapes(call.arguments)), "float32")
    return "tf32" if first == "float32" and "conv" in call.name else first


def _operations(call: Call) -> float:
    """Of the products, by torch's own formulas and those that the operators register with them."""
    from torch.utils.flop_counter import flop_registry

    import yolov9_fast.ops  # noqa: F401  # registers its formulas

    space, name = call.operator.split("::")
    formula = flop_registry.get(getattr(getattr(torch.ops, space), name, None))
    if formula is None:
        return 0.0
    results = _on_meta(call.results)
    return float(formula(*_on_meta(call.arguments), out_val=results[0] if len(results) == 1 else results))


def _on_meta(value: Any) -> Any:
    if isinstance(value, Shape):
        return value.on_meta()
    return [_on_meta(entry) for entry in value] if isinstance(value, tuple) else value


# Triton kernels -------------------------------------------------------------------------------------------------------


class _Works(TorchDispatchMode):
    """Bytes of torch's own operators inside a launcher."""

    def __init__(self, operator: str, found: list[Kernel]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operator, self._found = operator, found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if works(func.name().split(".")[0]):
            tensors = [tensor for tensor in (*args, result) if isinstance(tensor, Tensor)]
            self._found.append(Kernel(self._operator, sum(tensor.nbytes for tensor in tensors)))
        return result


def _of_triton(call: Call) -> list[Kernel]:
    """The launcher is called on meta tensors and says what it would launch."""
    from yolov9_fast.kernels.launch import recording

    found: list[Kernel] = []
    launcher = _launchers()[call.name.removesuffix("_triton")]
    with recording(90) as seen, _Works(call.operator, found):
        launcher(*_on_meta(call.arguments))
    found += [Kernel(call.operator, launch.moved) for launch in seen]
    operations = _operations(call)
    if operations:  # of the kernel that reads the maps; the others add up what it leaves
        largest = max(range(len(found)), key=lambda index: found[index].moved)
        found[largest] = Kernel(call.operator, found[largest].moved, operations, _dtype(call))
    return found


@functools.cache
def _launchers() -> dict[str, Callable[..., Any]]:
    import yolov9_fast.kernels

    modules = [
        importlib.import_module(f"yolov9_fast.kernels.{info.name}")
        for info in pkgutil.iter_modules(yolov9_fast.kernels.__path__)
    ]
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__
    }


# Time lines -----------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """What all kernels of an operator take: seconds by what bounds them ("launch", "memory", "arithmetic")."""

    kernels: int = 0
    moved: float = 0.0
    bounds: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(self.bounds.values())


@dataclass
class Times:
    """Predicted seconds of a sequence of calls: of the device alone, of the host alone, of both, and captured."""

    device: float = 0.0
    host: float = 0.0
    both: float = 0.0
    captured: float = 0.0
    parts: dict[str, Part] = field(default_factory=dict)


def run(work: Sequence[tuple[Sequence[Kernel], float]], device: Device, replay: float) -> Times:
    """Host and device side by side: a kernel begins when the device is free and the host has launched it.

    Args:
        work: the kernels of each call and the seconds that the host takes for it.
        replay: seconds that the host takes to launch a captured graph.
    """
    times = Times()
    free = 0.0
    for kernels, host in work:
        for kernel in kernels:
            times.host += host / len(kernels)
            seconds = device.seconds(kernel)
            times.device += seconds
            free = max(free, times.host) + seconds
            part, bound = times.parts.setdefault(kernel.operator, Part()), device.bound(kernel)
            part.kernels += 1
            part.moved += kernel.moved
            part.bounds[bound] = part.bounds.get(bound, 0.0) + seconds
        if not kernels:
            times.host += host
    times.both = max(free, times.host)
    times.captured = replay + times.device
    return times
