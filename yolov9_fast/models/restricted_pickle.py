"""Reading of PyTorch pickles that executes nothing from the file.

A pickle is a program for a stack machine; its REDUCE instruction calls any function the file names. Here the machine
is interpreted instruction by instruction: what it names stays a name, and a call becomes a record of that call
(`Stub`), save for the few rebuilders of tensors and plain containers in `pickle_calls`, which are our own functions.
Every instruction, and every element that one copies, is a step; there is a limit of steps, so small files that
multiply what they hold take neither much memory nor much time.

`torch.load(weights_only=True)` with stub classes for `get_unsafe_globals_in_checkpoint` was tried (torch 2.13): it
runs nothing either, but it never returns on a tuple that contains itself as a dictionary key, inflates a compressed
archive of 1.9 MB to 2 GB, accepts a tensor of 2^60 elements with stride 0, and does not open modules that were saved
whole in the legacy format.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

from yolov9_fast._untrusted import reason
from yolov9_fast.limits import above_limit, limit
from yolov9_fast.models.pickle_calls import GlobalName, PickleError, Stub, call, checked_key, class_path


class ByteStream(Protocol):
    """What a pickle is read from. `read` must return less, not allocate more, where the end comes first."""

    def read(self, count: int, /) -> bytes: ...

    def readline(self) -> bytes: ...


def restricted_unpickle(stream: ByteStream, load_persistent: Callable[[Any], Any] | None = None) -> Any:
    """Read one pickle from `stream`, leaving the stream behind its STOP; nothing named in it is imported or called.

    Args:
        stream: binary, at the start of a pickle.
        load_persistent: turns a persistent id (PyTorch's storages) into an object; without it, ids are an error.

    Returns:
        Numbers, strings, containers, tensors, and `Stub` or `GlobalName` for everything else.

    Raises:
        PickleError: not a pickle, truncated, ill-formed, or of more than `limit("PICKLE_STEPS")` steps.
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
        self.steps = limit("PICKLE_STEPS")

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise PickleError(f"the pickle: {above_limit('PICKLE_STEPS')}")

    def run(self) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(cast(Any, self.stream)):
                if opcode.name == "STOP":
                    return self.pop()
                self.spend(1 + _size(argument))
                self.step(opcode.name, argument)
        except PickleError:
            raise
        except (ValueError, TypeError, IndexError, KeyError, OverflowError, AttributeError, RuntimeError) as error:
            raise PickleError(f"not a readable pickle: {reason(error)}") from error
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
        self.stack.append(frozenset(map(checked_key, self.pop_to_mark())))

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
            target.update(map(checked_key, values))
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
        self.stack.append(call(function, self.arguments(arguments, function)))

    do_newobj = do_reduce

    def do_newobj_ex(self, _: Any) -> None:
        keywords, arguments, cls = self.pop(), self.pop(), self.pop()
        self.stack.append(Stub(class_path(cls), (*self.arguments(arguments, cls), keywords)))

    def arguments(self, arguments: Any, function: Any) -> tuple[Any, ...]:
        """The tuple that a function is called with; copies of it and of its elements are paid for."""
        if not isinstance(arguments, tuple):
            raise PickleError(f"the pickle calls {class_path(function)} with a {type(arguments).__name__}, not a tuple")
        self.spend(len(arguments))
        self.spend(sum(map(_size, arguments)))
        return arguments

    def do_inst(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(Stub(str(GlobalName(module, name)), tuple(self.pop_to_mark())))

    def do_obj(self, _: Any) -> None:
        cls, *arguments = self.pop_to_mark()
        self.stack.append(Stub(class_path(cls), tuple(arguments)))

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
    return zip(map(checked_key, values[::2]), values[1::2], strict=True)


def _size(value: Any) -> int:
    """How many steps a copy of `value` is worth: elements, or groups of 64 characters."""
    if isinstance(value, str | bytes | bytearray):
        return len(value) // 64
    return len(value) if isinstance(value, tuple | list | dict | set | frozenset) else 0
