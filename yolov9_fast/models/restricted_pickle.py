"""Reading of PyTorch pickles that executes nothing from the file.

A pickle is a program for a stack machine; its REDUCE instruction calls any function the file names. Here the machine
is interpreted instruction by instruction: what it names stays a name, and a call becomes a record of that call
(`Stub`), save for the few rebuilders of tensors and plain containers in `_REBUILDERS`, which are our own functions.

`torch.load(weights_only=True)` with stub classes for `get_unsafe_globals_in_checkpoint` was tried (torch 2.13): it
runs nothing either, but it never returns on a tuple that contains itself as a dictionary key, inflates a compressed
archive of 1.9 MB to 2 GB, accepts a tensor of 2^60 elements with stride 0, and does not open modules that were saved
whole in the legacy format.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor

MAX_DIMENSIONS = 16


class ByteStream(Protocol):
    """What a pickle is read from. `read` must return less, not allocate more, where the end comes first."""

    def read(self, count: int, /) -> bytes: ...

    def readline(self) -> bytes: ...


class PickleError(ValueError):
    """A pickle that is damaged, truncated, or of a kind that is not read."""


@dataclass(frozen=True)
class GlobalName:
    """A class or function that the file names, not imported."""

    module: str
    name: str

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


@dataclass(frozen=True)
class Storage:
    """Flat numbers that tensors of the file are views of: data [n] of its own dtype."""

    data: Tensor


def restricted_unpickle(stream: ByteStream, load_persistent: Callable[[Any], Any] | None = None) -> Any:
    """Read one pickle from `stream`, leaving the stream behind its STOP; nothing named in it is imported or called.

    Args:
        stream: binary, at the start of a pickle.
        load_persistent: turns a persistent id (PyTorch's storages) into an object; without it, ids are an error.

    Returns:
        Numbers, strings, containers, tensors, and `Stub` or `GlobalName` for everything else.

    Raises:
        PickleError: not a pickle, truncated, or ill-formed.
    """
    return _Machine(stream, load_persistent).run()


_MARK = object()

_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}

_LITERALS = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
        "UNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINUNICODE8",
        "FLOAT",
        "BINFLOAT",
    ]
)


class _Machine:
    def __init__(self, stream: ByteStream, load_persistent: Callable[[Any], Any] | None) -> None:
        self.stream = stream
        self.load_persistent = load_persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(cast(Any, self.stream)):
                if opcode.name == "STOP":
                    return self.pop()
                self.step(opcode.name, argument)
        except PickleError:
            raise
        except (ValueError, TypeError, IndexError, KeyError, OverflowError, AttributeError, RuntimeError) as error:
            raise PickleError(f"not a readable pickle: {error}") from error
        raise PickleError("the pickle has no end")

    def step(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        else:
            instruction = getattr(self, f"do_{name.lower()}", None)
            if instruction is None:
                raise PickleError(f"the pickle instruction {name} is not read")
            instruction(argument)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleError("the pickle takes from an empty stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        for depth in range(len(self.stack) - 1, -1, -1):
            if self.stack[depth] is _MARK:
                values = self.stack[depth + 1 :]
                del self.stack[depth:]
                return values
        raise PickleError("the pickle has no mark")

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleError("the pickle takes from an empty stack")
        return self.stack[-1]

    # Stack, memo and framing.
    def do_proto(self, version: int) -> None:
        if version > 5:
            raise PickleError(f"pickle protocol {version} is newer than 5")

    def do_frame(self, _: Any) -> None: ...

    def do_mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def do_pop(self, _: Any) -> None:
        if not self.stack:
            raise PickleError("the pickle takes from an empty stack")
        self.stack.pop()

    def do_pop_mark(self, _: Any) -> None:
        self.pop_to_mark()

    def do_dup(self, _: Any) -> None:
        self.stack.append(self.top())

    def do_put(self, index: int) -> None:
        self.memo[index] = self.top()

    do_binput = do_long_binput = do_put

    def do_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.top()

    def do_get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    do_binget = do_long_binget = do_get

    # Containers.
    def do_empty_list(self, _: Any) -> None:
        self.stack.append([])

    def do_empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def do_empty_tuple(self, _: Any) -> None:
        self.stack.append(())

    def do_empty_set(self, _: Any) -> None:
        self.stack.append(set())

    def do_list(self, _: Any) -> None:
        self.stack.append(self.pop_to_mark())

    def do_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def do_tuple1(self, _: Any) -> None:
        self.stack.append((self.pop(),))

    def do_tuple2(self, _: Any) -> None:
        second, first = self.pop(), self.pop()
        self.stack.append((first, second))

    def do_tuple3(self, _: Any) -> None:
        third, second, first = self.pop(), self.pop(), self.pop()
        self.stack.append((first, second, third))

    def do_dict(self, _: Any) -> None:
        self.stack.append(dict(_pairs(self.pop_to_mark())))

    def do_frozenset(self, _: Any) -> None:
        self.stack.append(frozenset(map(_key, self.pop_to_mark())))

    def do_append(self, _: Any) -> None:
        value = self.pop()
        self.extend([value])

    def do_appends(self, _: Any) -> None:
        self.extend(self.pop_to_mark())

    def extend(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Stub):
            target.items.extend(values)
        elif isinstance(target, list):
            target.extend(values)
        else:
            raise PickleError(f"the pickle appends to a {type(target).__name__}")

    def do_setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.update([key, value])

    def do_setitems(self, _: Any) -> None:
        self.update(self.pop_to_mark())

    def update(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Stub):
            target.items.extend(_pairs(values))
        elif isinstance(target, dict):
            target.update(_pairs(values))
        else:
            raise PickleError(f"the pickle sets items of a {type(target).__name__}")

    def do_additems(self, _: Any) -> None:
        values = self.pop_to_mark()
        target = self.top()
        if isinstance(target, Stub):
            target.items.extend(values)
        elif isinstance(target, set):
            target.update(map(_key, values))
        else:
            raise PickleError(f"the pickle adds items to a {type(target).__name__}")

    # Names, calls and state: recorded, not done.
    def do_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(GlobalName(module, name))

    def do_stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("the pickle names a class by something that is not text")
        self.stack.append(GlobalName(module, name))

    def do_reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        self.stack.append(_call(function, arguments))

    def do_newobj(self, _: Any) -> None:
        arguments, cls = self.pop(), self.pop()
        self.stack.append(_call(cls, arguments))

    def do_newobj_ex(self, _: Any) -> None:
        keywords, arguments, cls = self.pop(), self.pop(), self.pop()
        self.stack.append(Stub(_path(cls), (*_arguments(arguments), keywords)))

    def do_inst(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(Stub(f"{module}.{name}", tuple(self.pop_to_mark())))

    def do_obj(self, _: Any) -> None:
        cls, *arguments = self.pop_to_mark()
        self.stack.append(Stub(_path(cls), tuple(arguments)))

    def do_build(self, _: Any) -> None:
        state = self.pop()
        target = self.top()
        if isinstance(target, Stub):
            target.state = state

    def do_persid(self, argument: str) -> None:
        self.stack.append(self.persistent(argument))

    def do_binpersid(self, _: Any) -> None:
        self.stack.append(self.persistent(self.pop()))

    def persistent(self, identifier: Any) -> Any:
        if self.load_persistent is None:
            raise PickleError("the pickle refers to data outside it")
        return self.load_persistent(identifier)


def _pairs(values: list[Any]) -> Iterator[tuple[Any, Any]]:
    if len(values) % 2:
        raise PickleError("the pickle has a key without a value")
    return zip(map(_key, values[::2]), values[1::2], strict=True)


def _key(value: Any) -> Any:
    """`value`, where hashing it is cheap: a tuple that holds itself twice over, sixty times, would hash for ever."""
    pending, budget = [value], 1000
    while pending:
        item = pending.pop()
        budget -= 1
        if budget < 0 or isinstance(item, list | dict | set | bytearray):
            raise PickleError("a dictionary or set in the pickle has a key that is no plain value")
        if isinstance(item, tuple | frozenset):
            if len(item) > budget:
                raise PickleError("a dictionary or set in the pickle has a key that is no plain value")
            pending.extend(item)
    return value


def _path(cls: Any) -> str:
    return str(cls) if isinstance(cls, GlobalName) else f"<{type(cls).__name__}>"


def _arguments(arguments: Any) -> tuple[Any, ...]:
    return arguments if isinstance(arguments, tuple) else (arguments,)


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(arguments, tuple):
        raise PickleError(f"the pickle calls {_path(function)} with a {type(arguments).__name__}, not a tuple")
    rebuild = _REBUILDERS.get(str(function)) if isinstance(function, GlobalName) else None
    return Stub(_path(function), arguments) if rebuild is None else rebuild(*arguments)


def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """The view [size] of a storage, with every bound checked before PyTorch sees it.

    Raises:
        PickleError: not a storage, negative or fractional numbers, or a view that leaves the storage or repeats it.
    """
    if not isinstance(storage, Storage):
        raise PickleError("a tensor without storage")
    size, stride = _whole(size), _whole(stride)
    (offset,) = _whole((offset,))
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
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
    if not isinstance(values, tuple | list):
        raise PickleError(f"expected sizes, found {type(values).__name__}")
    for value in values:
        if type(value) is not int or not 0 <= value < 2**62:
            raise PickleError(f"a size that is no whole number in [0, 2^62) (a {type(value).__name__})")
    return tuple(values)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuild_from_type(function: Any, _cls: Any, arguments: Any, _state: Any) -> Any:
    return _call(function, arguments)


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "utf-8"):
        raise PickleError("bytes in an unknown encoding")
    return text.encode(encoding)


def _sequence(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    def rebuild(values: Any = ()) -> Any:
        # Only real containers: iterating over anything else (a range, an object) is not needed, so not offered.
        if not isinstance(values, tuple | list | set | frozenset | dict):
            raise PickleError(f"a {getattr(kind, '__name__', 'container')} of a {type(values).__name__}")
        return kind([_key(v) for v in values] if kind in (set, frozenset) else values)

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
        result[_key(pair[0])] = pair[1]
    return result


def _default_dict(*_: Any) -> dict[Any, Any]:
    return {}


def _bytes(*values: Any) -> bytes:
    if values:
        raise PickleError("bytes made by a call")
    return b""


def _device(*arguments: Any) -> str:
    return ":".join(str(a) for a in arguments if isinstance(a, str | int))


_REBUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
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
