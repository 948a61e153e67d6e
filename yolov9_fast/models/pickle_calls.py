"""What a restricted pickle is made of: inert records of classes and calls, and the few calls that are carried out.

Those are rebuilders of tensors and plain containers, our own functions. What they make of their arguments is no larger
than these; the reader counts that against the limit of its steps.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MAX_DIMENSIONS = 16
MAX_NAME = 500
"""Characters of a class's or a module's name."""
_MAX_KEY_PARTS = 16


class PickleError(ValueError):
    """A pickle that is damaged, truncated, or of a kind that is not read."""


@dataclass(frozen=True)
class GlobalName:
    """A class or function that the file names, not imported."""

    module: str
    name: str

    def __post_init__(self) -> None:
        if len(self.module) + len(self.name) > MAX_NAME:
            raise PickleError(f"the name of a class of more than {MAX_NAME} characters")

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Stub:
    """An object of the file that was not built: what it would have been made by, from what, and its state.

    Attributes:
        path: the class or function, such as "models.yolo.DetectionModel".
        args: the arguments of its call.
        state: what `__setstate__` would have received, or None.
        items: list items and (key, value) pairs that the file adds.
    """

    path: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Stub({self.path})"


@dataclass(frozen=True, eq=False)
class Storage:
    """Flat numbers that tensors of the file are views of: data [n] of its own dtype."""

    data: Tensor


def class_path(cls: Any) -> str:
    return str(cls) if isinstance(cls, GlobalName) else f"<{type(cls).__name__}>"


def call(function: Any, arguments: tuple[Any, ...]) -> Any:
    """The result of a rebuilder, or a record of any other call."""
    rebuild = REBUILDERS.get(str(function)) if isinstance(function, GlobalName) else None
    return Stub(class_path(function), arguments) if rebuild is None else rebuild(*arguments)


def checked_key(value: Any) -> Any:
    """`value`, where it can be a key: hashing and comparing it is quick, and many cannot share one hash on purpose.

    Raises:
        PickleError: a container other than a short tuple, or an integer of more than 64 bits (in a tuple 16).
    """
    if isinstance(value, tuple) and len(value) <= _MAX_KEY_PARTS:
        plain = all(_is_key_part(part, 1 << 16) and not isinstance(part, float) for part in value)
    else:
        plain = _is_key_part(value, 1 << 64)
    if not plain:
        raise PickleError("a dictionary or set in the pickle has a key that is no plain value")
    return value


def _is_key_part(value: Any, largest: int) -> bool:
    if isinstance(value, int):
        return abs(value) < largest
    return value is None or isinstance(value, str | float | bytes | GlobalName | Stub)


def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """The view [size] of a storage, with every bound checked before PyTorch sees it.

    Raises:
        PickleError: not a storage, negative or fractional numbers, or a view that leaves the storage or repeats it.
    """
    if not isinstance(storage, Storage):
        raise PickleError("a tensor without storage")
    size, stride = _whole(size), _whole(stride)
    (offset,) = _whole((offset,))
    if len(size) != len(stride):
        raise PickleError(f"a tensor of size {size} with strides {stride}")
    count, last = 1, offset
    for n, step in zip(size, stride, strict=True):
        count *= n
        last += (n - 1) * step
    available = storage.data.numel()
    if count and (last >= available or count > available):
        raise PickleError(f"a tensor of size {size}, strides {stride}, offset {offset} in {available} stored numbers")
    return storage.data.as_strided(size, stride, offset) if count else storage.data.new_empty(size)


def _whole(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > MAX_DIMENSIONS:
        raise PickleError(f"expected at most {MAX_DIMENSIONS} sizes, found {type(values).__name__}")
    for value in values:
        if type(value) is not int or not 0 <= value < 2**62:
            raise PickleError(f"a size that is no whole number in [0, 2^62) (a {type(value).__name__})")
    return tuple(values)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuild_from_type(function: Any, _cls: Any, arguments: Any, _state: Any) -> Any:
    if not isinstance(arguments, tuple) or len(arguments) > MAX_DIMENSIONS:
        raise PickleError("a tensor of a class of its own, with arguments that no tensor has")
    rebuilds_tensor = isinstance(function, GlobalName) and str(function) in _TENSOR_REBUILDERS
    return call(function, arguments) if rebuilds_tensor else Stub(class_path(function), arguments)


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "utf-8"):
        raise PickleError("bytes in an unknown encoding")
    return text.encode(encoding)


def _sequence(kind: Callable[[Iterable[Any]], Any]) -> Callable[..., Any]:
    def rebuild(values: Any = ()) -> Any:
        # Only real containers: iterating over anything else (a range, an object) is not needed, so not offered.
        if not isinstance(values, tuple | list | set | frozenset | dict):
            raise PickleError(f"a {getattr(kind, '__name__', 'container')} of a {type(values).__name__}")
        return kind(map(checked_key, values) if kind in (set, frozenset) else values)

    return rebuild


def _ordered_dict(pairs: Any = ()) -> OrderedDict[Any, Any]:
    if not isinstance(pairs, tuple | list | dict):
        raise PickleError(f"an OrderedDict of a {type(pairs).__name__}")
    if isinstance(pairs, dict):
        return OrderedDict(pairs)
    result: OrderedDict[Any, Any] = OrderedDict()
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise PickleError("an OrderedDict of something that is no pair")
        result[checked_key(pair[0])] = pair[1]
    return result


def _default_dict(*_: Any) -> dict[Any, Any]:
    return {}


def _bytes(*values: Any) -> bytes:
    if values:
        raise PickleError("bytes made by a call")
    return b""


def _device(*arguments: Any) -> str:
    return ":".join(str(a)[:MAX_NAME] for a in arguments[:2] if isinstance(a, str) or (type(a) is int and a < 2**63))


_TENSOR_REBUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}
REBUILDERS: dict[str, Callable[..., Any]] = {
    **_TENSOR_REBUILDERS,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": _sequence(tuple),
    "torch.device": _device,
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": _default_dict,
    "builtins.set": _sequence(set),
    "builtins.frozenset": _sequence(frozenset),
    "builtins.list": _sequence(list),
    "builtins.tuple": _sequence(tuple),
    "builtins.bytes": _bytes,
    "__builtin__.bytes": _bytes,
    "__builtin__.set": _sequence(set),
    "__builtin__.frozenset": _sequence(frozenset),
    "_codecs.encode": _encode,
}

STORAGE_DTYPES: dict[str, torch.dtype] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
