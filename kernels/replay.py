"""A launcher's Python runs once for arguments of one form; later calls of that form repeat what it did.

A launcher looks at shapes, strides, dtypes and addresses, allocates, and launches kernels: for arguments that agree in
all of that it does the same again. Its first call is noted as a list of allocations, calls of PyTorch's operators and
launches of compiled kernels, which later calls repeat with their own tensors. The form of a tensor is its dtype, shape,
strides, device, and address modulo 16; that of a float, which a launcher only passes on, its type; that of all other
arguments their value.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

_Launcher = TypeVar("_Launcher", bound=Callable[..., Any])
Values = list[Any]
Step = Callable[[Values, Values, int], None]
"""Repeats one operation: takes the tensors of a call, their addresses (other values as they are), and the stream."""
_PLAIN = (Tensor, nn.Parameter)
_ALLOCATIONS = tuple(
    getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)
MOST = 4096
"""Forms that a launcher remembers: some for each layer of a network and each size of images."""


class _Noting(threading.local):
    tape: "Tape | None" = None
    """Of the launcher that this thread runs for the first time on arguments of this form."""


_NEW: Any = object()
noting = _Noting()
_remembered: list[dict[Any, "Tape | None"]] = []
_paused = 0


@contextmanager
def paused() -> Iterator[None]:
    """Within the block launchers run as they are."""
    global _paused
    _paused += 1
    try:
        yield
    finally:
        _paused -= 1


def forget() -> None:
    """Note all calls anew: for whoever changes what launchers read besides their arguments."""
    for tapes in _remembered:
        tapes.clear()


def replayed(depends: Callable[[], Any] | None = None) -> Callable[[_Launcher], _Launcher]:
    """Decorator of a launcher: only its first call on arguments of one form runs it.

    `depends`: what it reads besides its arguments. Calls with keywords, on subclasses of Tensor, and inside another
    launcher run it as it is.
    """

    def decorate(launcher: _Launcher) -> _Launcher:
        tapes: dict[Any, Tape | None] = {}
        _remembered.append(tapes)

        @functools.wraps(launcher)
        def call(*arguments: Any, **others: Any) -> Any:
            given: Values = []
            addresses: Values = []
            key = [] if depends is None else [depends()]
            if others or _paused or noting.tape is not None or not _form(arguments, key, given, addresses):
                return launcher(*arguments, **others)
            form = tuple(key)
            tape = tapes.get(form, _NEW)
            if tape is _NEW:
                if len(tapes) >= MOST:
                    tapes.clear()
                result, tapes[form] = _noted(launcher, arguments)
                return result
            if tape is None or (tape.device >= 0 and _hooked()):
                return launcher(*arguments)
            return tape.repeat(given, addresses)

        return cast(_Launcher, call)

    return decorate


def _form(arguments: Sequence[Any], key: Values, given: Values, addresses: Values) -> bool:
    """Adds the form of `arguments` to `key`, and what a call repeats with; False where it cannot be repeated."""
    for argument in arguments:
        kind = type(argument)
        if kind in _PLAIN:
            address = argument.data_ptr()
            key += (argument.dtype, argument.shape, argument.stride(), argument.get_device(), address & 15)
            given.append(argument)
            addresses.append(address)
        elif kind is float:
            key.append(float)
            given.append(argument)
            addresses.append(argument)
        elif kind is list or kind is tuple:
            key.append(len(argument))
            if not _form(argument, key, given, addresses):
                return False
        elif isinstance(argument, Tensor):
            return False
        else:
            key.append(argument)
    return True


def _noted(launcher: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, "Tape | None"]:
    """The launcher's result, and its tape; None where its calls cannot be repeated."""
    own = _distinct(arguments)
    given: Values = []
    _form(own, [], given, [])
    tape = Tape(given)
    noting.tape = tape
    try:
        with _Noted(tape):
            result = launcher(*own)
    finally:
        noting.tape = None
    try:
        return result, tape.finish(result)
    except LookupError:
        return result, None


def _distinct(arguments: Sequence[Any]) -> Values:
    """The same arguments as objects of their own, by which the tape knows them: a tensor may be passed twice."""
    own: Values = []
    for argument in arguments:
        if isinstance(argument, list | tuple):
            own.append(_distinct(argument))
        elif isinstance(argument, Tensor):
            own.append(argument.detach())
        else:
            own.append(argument + 0.0 if type(argument) is float else argument)
    return own


class _Noted(TorchDispatchMode):
    """Notes the calls of PyTorch's operators."""

    def __init__(self, tape: "Tape") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.tape.launching:
            self.tape.note_call(func, args, kwargs or {}, result)
        return result


class Tape:
    """What one call of a launcher did, on values that are numbered: its arguments, then what was made."""

    def __init__(self, arguments: Values) -> None:
        self.launching = False
        self._values = arguments  # kept while noting: an object's id is its own only as long as it lives
        self._numbers = {id(value): number for number, value in enumerate(arguments)}
        self._aliases: Values = []
        self._constants: Values = []
        self._notes: list[Callable[[], Step]] = []
        self._foreign = False
        self.device = next((value.get_device() for value in arguments if isinstance(value, Tensor)), -1)

    # ---- noting

    def note_call(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """A call of one of PyTorch's operators."""
        if function is torch.ops.aten.detach.default:  # the same tensor, as whoever allocates in a mode gets it
            self._numbers[id(result)] = self._number(args[0])
            self._aliases.append(result)
            return
        if function.overloadpacket in _ALLOCATIONS:
            like = {"dtype": result.dtype, "device": result.device}
            allocate = functools.partial(torch.empty_strided, result.size(), result.stride(), **like)
            self._notes.append(lambda: _allocation(allocate))
            self._make(result)
            return
        made = result if isinstance(result, tuple | list) else (result,)
        if _has_tensors(kwargs) or any(_has_tensors(value) for value in args if not isinstance(value, Tensor)):
            flat, tree = tree_flatten((args, kwargs))
            call = functools.partial(_nested, function, tree)
        else:
            flat, call = args, functools.partial(function, **kwargs)
        numbers = [self._number(value) for value in flat]
        new = [place for place, value in enumerate(made) if id(value) not in self._numbers]
        for place in new:
            self._make(made[place])
        self._notes.append(lambda: _operator_call(call, self._getter(numbers), new))

    def note_launch(self, arguments: Sequence[Any], compiled: Any, grid: Sequence[int]) -> None:
        """A launch; `compiled`: of Triton, or in the interpreter a function of the arguments."""
        numbers = [self._number(value) for value in arguments]
        self._notes.append(lambda: _launch(compiled, grid, self._getter(numbers), self.device >= 0))

    def _make(self, value: Any) -> None:
        self._numbers[id(value)] = len(self._values)
        self._values.append(value)

    def _number(self, value: Any) -> int:
        """Of an argument or of what was made; below 0 of a constant."""
        number = self._numbers.get(id(value))
        if number is None:
            self._foreign = self._foreign or isinstance(value, Tensor)
            self._constants.append(value)
            number = self._numbers[id(value)] = -len(self._constants)
        return number

    def _getter(self, numbers: Sequence[int]) -> Callable[[Values], Sequence[Any]]:
        """Takes these values out of those of a call, in which the constants come first."""
        first = len(self._constants)
        places = [first + number if number >= 0 else -1 - number for number in numbers]
        if len(places) < 2:
            return lambda values: [values[place] for place in places]
        return itemgetter(*places)

    def finish(self, result: Any) -> "Tape":
        """Ready to repeat; raises `LookupError` where a tensor came from elsewhere."""
        flat, tree = tree_flatten(result)
        numbers = [self._number(value) for value in flat]
        if self._foreign:
            raise LookupError
        self.constants = tuple(self._constants)
        self.steps = [make() for make in self._notes]
        chosen = self._getter(numbers)
        self.result: Callable[[Values], Any] = lambda values: tree_unflatten(chosen(values), tree)
        if result is None:
            self.result = _nothing
        elif isinstance(result, Tensor):
            self.result = itemgetter(len(self.constants) + numbers[0])
        elif isinstance(result, tuple) and len(result) > 1 and all(isinstance(value, Tensor) for value in result):
            self.result = chosen
        del self._values, self._aliases, self._numbers, self._notes
        return self

    # ---- repeating

    def repeat(self, given: Values, addresses: Values) -> Any:
        values, numbers = [*self.constants, *given], [*self.constants, *addresses]
        if self.device < 0:
            for step in self.steps:
                step(values, numbers, 0)
        elif torch.cuda.current_device() == self.device:
            stream = _triton().stream(self.device)
            for step in self.steps:
                step(values, numbers, stream)
        else:
            with torch.cuda.device(self.device):
                return self.repeat(given, addresses)
        return self.result(values)


def _nothing(values: Values) -> None:
    return None


def _allocation(allocate: Callable[[], Tensor]) -> Step:
    def step(values: Values, addresses: Values, stream: int) -> None:
        made = allocate()
        values.append(made)
        addresses.append(made.data_ptr())

    return step


def _has_tensors(value: Any) -> bool:
    return any(isinstance(one, Tensor) for one in tree_flatten(value)[0])


def _nested(function: Any, tree: Any, *flat: Any) -> Any:
    args, kwargs = tree_unflatten(flat, tree)
    return function(*args, **kwargs)


def _operator_call(call: Any, given: Callable[[Values], Sequence[Any]], new: Sequence[int]) -> Step:
    def step(values: Values, addresses: Values, stream: int) -> None:
        result = call(*given(values))
        made = result if isinstance(result, tuple | list) else (result,)
        for place in new:
            values.append(made[place])
            addresses.append(made[place].data_ptr())

    return step


def _launch(compiled: Any, grid: Sequence[int], given: Callable[[Values], Sequence[Any]], on_gpu: bool) -> Step:
    if not on_gpu:
        return lambda values, addresses, stream: compiled(*given(values))
    x, y, z = (*grid, 1, 1)[:3]
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    return lambda values, addresses, stream: run(
        x, y, z, stream, function, metadata, None, None, None, *given(addresses)
    )


class _Triton(NamedTuple):
    stream: Callable[[int], int]
    """The current stream of a device."""
    runtime: Any
    """With the hooks around launches."""


@functools.cache
def _triton() -> _Triton:
    import triton
    from triton.runtime import driver

    return _Triton(driver.active.get_current_stream, triton.knobs.runtime)


def _hooked() -> bool:
    """Whether a profiler, such as Triton's own, wants to see each launch."""
    runtime = _triton().runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
