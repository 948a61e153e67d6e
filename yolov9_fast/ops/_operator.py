"""How an operator is declared, registered with PyTorch, and dispatched to a backend.

Every operator module has the same five parts, in this order:

1. the public function: contract and checks, then `OPERATOR(...)`;
2. the reference: the definition in eager PyTorch, backend "eager";
3. its kernels: each with a schema, a reference and a fake, registered as `torch.ops.yolov9_fast.NAME`;
4. `run`: the operator on one backend's kernels, with an `autograd.Function` where it has a gradient;
5. `OPERATOR = Operator(...)`: all of this, and for each backend which arguments it supports.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch.autograd.function import once_differentiable as _once_differentiable

from yolov9_fast.ops import _backend, _library, _probe
from yolov9_fast.ops._backend import BackendUnavailable, UnknownBackend, add_operator_name, chosen, register_backend
from yolov9_fast.ops._backend import compiling as _compiling
from yolov9_fast.ops._backend import scope as _scope
from yolov9_fast.ops._supports import supports_anything

Function = Callable[..., Any]
Kernels = TypeVar("Kernels", bound=tuple[Any, ...])
"""A NamedTuple with one callable for each kernel of an operator."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of an operator.

    Its schema, as `box_iou(Tensor a, Tensor b) -> Tensor`; its definition in eager PyTorch; `fake`, which returns
    empty tensors of the right shape, stride, dtype and device; and for products `flops`, which takes the shapes of the
    arguments, for `torch.utils.flop_counter`. As there, sums and element by element operations count as 0.

    Calling it runs the definition.
    """

    schema: str
    reference: Function
    fake: Function
    flops: Callable[..., int] | None = None

    def __call__(self, *args: Any) -> Any:
        return self.reference(*args)

    @property
    def name(self) -> str:
        return self.schema.split("(", 1)[0]

    def registered(self, suffix: str = "", function: Function | None = None) -> Function:
        """`torch.ops.yolov9_fast.NAMEsuffix`, run by `function`; by default by compiled code or the reference."""
        schema = self.schema.replace(self.name, self.name + suffix, 1)
        return _library.define(schema, fake=self.fake, reference=function or self.reference, flops=self.flops)


@dataclass(frozen=True)
class Compiled:
    """Kernels in `_C_cpu.so` or `_C_cuda.so`. `supports`: why they cannot take the operator's arguments, or None."""

    supports: Callable[..., str | None] = supports_anything


@dataclass(frozen=True)
class Python(Generic[Kernels]):
    """Kernels that Python functions launch. `load` imports and returns them; it is called once, when they first run.

    `traced`: the functions are made of PyTorch's own operators, so that torch.compile traces them and they run wherever
    PyTorch does; otherwise they are registered operators with the kernels' fakes.
    """

    load: Callable[[], Kernels]
    supports: Callable[..., str | None] = supports_anything
    traced: bool = False


@dataclass(frozen=True)
class Implementation:
    """One backend of an operator.

    `call` takes the operator's arguments. `unavailable`: why it cannot run on this machine, None when it can.
    `supports(*args)`: why it cannot take these arguments, None when it can; plain Python that torch.compile can trace.
    `probed`: the backend whose kernels must run on a GPU for this one to run there (`ops/_probe.py`); "" for none.
    """

    call: Function
    unavailable: str | None = None
    supports: Callable[..., str | None] = supports_anything
    probed: str = ""

    def why_not_on(self, device: torch.device) -> str | None:
        """Why it cannot run on this GPU; None when it can, and for other devices."""
        return _probe.why_not(self.probed, device) if self.probed and device.type == "cuda" else None


operators: dict[str, Operator[Any]] = {}


class Operator(Generic[Kernels]):
    """An operator: what it computes in one line, its reference, its kernels, and its implementations by backend.

    Args:
        name: as in `set_backend(..., op=name)`.
        summary: what it computes, for `yolov9-fast info`.
        reference: the definition; backend "eager". Takes the arguments that all implementations take.
        kernels: a NamedTuple of `Kernel`.
        run: `run(kernels, *args)`, the operator by `kernels`, a NamedTuple of callables. Default: the first kernel.
        backends: `Compiled` or `Python` by the backend's name.

    Calling it runs the backend that is set for it; under "auto" the first that supports the arguments. Raises
    `BackendUnavailable` with the reason if a backend set by name cannot run.
    """

    def __init__(
        self,
        name: str,
        summary: str,
        *,
        reference: Function,
        kernels: Kernels | tuple[()] = (),
        run: Function | None = None,
        backends: Mapping[str, Compiled | Python[Kernels]] | None = None,
    ) -> None:
        if name in operators:
            raise ValueError(f"name: expected a new operator, got {name!r}")
        self.name, self.summary = name, summary
        self._declared: tuple[Any, ...] = kernels
        self._run = run
        self._compiled = _named(kernels, [kernel.registered() for kernel in kernels])
        self.references = _named(kernels, [kernel.reference for kernel in kernels])
        self.implementations: dict[str, Implementation] = {"eager": Implementation(reference)}
        self._automatic: tuple[Implementation, ...] = ()
        for backend, declared in (backends or {}).items():
            self.add(backend, self._implementation(backend, declared))
        operators[name] = self
        add_operator_name(name)

    def __call__(self, *args: Any) -> Any:
        # As `select`, without its calls: an operator runs hundreds of times in a training step.
        scope = _backend.current() if _compiling() else _scope.get()
        if not scope.settings and not scope.implementations:
            for implementation in self._automatic:
                if implementation.supports(*args) is None:
                    return implementation.call(*args)
            return self.implementations["eager"].call(*args)
        return self.select(*args)(*args)

    def select(self, *args: Any) -> Function:
        """The callable that runs these arguments."""
        scope = _backend.current()
        name = scope.settings.get(self.name) or scope.settings.get("") or "auto"
        if name == "auto":
            for implementation in self._ordered(scope) if scope.implementations else self._automatic:
                if implementation.supports(*args) is None:
                    return implementation.call
            return self.eager.call
        found = self.found(name)
        if found is not None and found.unavailable is None and found.supports(*args) is None:
            return found.call
        _backend.check_setting(self.name)
        raise BackendUnavailable(f"{self.name}: backend {name!r} is set and cannot run: {self.why_not(name, *args)}")

    def found(self, backend: str) -> Implementation | None:
        """The implementation in force for `backend`: one of a `with` block, or the operator's own."""
        inner: Implementation | None = _backend.current().implementations.get((self.name, backend))
        return inner or self.implementations.get(backend)

    @property
    def eager(self) -> Implementation:
        """The definition."""
        return self.found("eager") or self.implementations["eager"]

    def why_not(self, backend: str, *args: Any) -> str | None:
        """Why `backend` cannot run (with these arguments, if there are any); None when it can."""
        if backend not in _backend.backends:
            raise UnknownBackend(f"backend: expected one of {', '.join(_backend.backends)}, got {backend!r}")
        implementation = self.found(backend)
        if implementation is None:
            return f"the operator has no such implementation, only {', '.join(self.implementations)}"
        if implementation.unavailable is not None:
            return implementation.unavailable
        return implementation.supports(*args) if args else None

    def first(self, device: torch.device) -> str:
        """The backend that "auto" tries first on tensors of this device."""
        for name, backend in _backend.backends.items():
            implementation = self.found(name)
            if (
                implementation is not None
                and implementation.unavailable is None
                and device.type in backend.devices
                and implementation.why_not_on(device) is None
            ):
                return name
        return "eager"

    def has_kernels(self, device: torch.device) -> bool:
        """Whether the backend in force is another than "eager" on tensors of this device.

        Under "auto" torch.compile gets the eager form, which it fuses itself.
        """
        name = chosen(self.name)
        if name != "auto":
            return name != "eager"
        return not torch.compiler.is_compiling() and self.first(device) != "eager"

    def add(self, backend: str, implementation: Implementation) -> None:
        """Add an implementation, or replace the backend's own."""
        if backend not in _backend.backends:
            raise UnknownBackend(f"backend: expected one of {', '.join(_backend.backends)}, got {backend!r}")
        self.implementations[backend] = implementation
        self._order()

    def remove(self, backend: str) -> None:
        """Remove the implementation of `backend`."""
        del self.implementations[backend]
        self._order()

    def from_kernels(self, backend: str, declared: Python[Kernels], suffix: str) -> Implementation:
        """The implementation that runs Python kernels, with the operator's own gradient.

        `suffix`: of the names under which the kernels are registered; operators share kernels of one name.
        """
        load = functools.cache(declared.load)
        kernels = [
            _launch(load, index) if declared.traced else kernel.registered(suffix, _launch(load, index))
            for index, kernel in enumerate(self._declared)
        ]
        unavailable = _library.not_nvidia() if declared.traced else _backend.backends[backend].why_not()
        probed = "" if declared.traced or backend not in _probe.LAUNCHES else backend
        return Implementation(self._bound(_named(self._declared, kernels)), unavailable, declared.supports, probed)

    def _implementation(self, backend: str, declared: Compiled | Python[Kernels]) -> Implementation:
        if isinstance(declared, Python):
            return self.from_kernels(backend, declared, f"_{backend}")
        unavailable = _library.why_not_compiled(self._declared[0].name, backend)
        probed = backend if backend in _probe.LAUNCHES else ""
        return Implementation(self._bound(self._compiled), unavailable, declared.supports, probed)

    def _bound(self, kernels: tuple[Any, ...]) -> Function:
        return kernels[0] if self._run is None else functools.partial(self._run, kernels)

    def _order(self) -> None:
        self._automatic = self._ordered(_backend.process)
        _backend.changed()

    def _ordered(self, scope: _backend.Scope) -> tuple[Implementation, ...]:
        """What "auto" tries, without the eager form."""
        found = [
            scope.implementations.get((self.name, name)) or self.implementations.get(name)
            for name in _backend.backends
            if name != "eager"
        ]
        return tuple(one for one in found if one is not None and one.unavailable is None)


def _named(declared: tuple[Any, ...], functions: list[Function]) -> Any:
    """`functions` in the NamedTuple type of the declared kernels."""
    make: Callable[[list[Function]], Any] = getattr(declared, "_make", tuple)
    return make(functions)


def _launch(load: Callable[[], tuple[Function, ...]], index: int) -> Function:
    def launch(*args: Any) -> Any:
        return load()[index](*args)

    return launch


# ---- what `autograd.Function`s share


if TYPE_CHECKING:

    class AutogradFunction(torch.autograd.Function):
        """`torch.autograd.Function`, whose `apply` has no annotations.

        A `forward` of any number of tensors has to be `forward(ctx, *arguments)`: without gradients torch.compile
        (2.13) leaves out `ctx` where the arguments are one fewer than the parameters, `*tensors` counted as one.
        """

        @classmethod
        def apply(cls, *args: Any) -> Any: ...

else:
    AutogradFunction = torch.autograd.Function


def once_differentiable(backward: Function) -> Function:
    """As torch's decorator of that name, without its overhead where no graph of the backward is recorded."""
    checked = _once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *gradients: Any) -> Any:
        return checked(ctx, *gradients) if torch.is_grad_enabled() else backward(ctx, *gradients)

    return wrapper


# ---- from outside the package

_registrations = itertools.count(1)
_replaced: dict[tuple[str, str], Implementation | None] = {}
"""By operator and backend of each registered implementation: what was there before."""
_added_operators: set[str] = set()


def register_implementation(
    op: str,
    backend: str,
    function: Function | None = None,
    *,
    kernels: Mapping[str, Function] | None = None,
    supports: Callable[..., str | None] = supports_anything,
    why_not: Callable[[], str | None] | None = None,
) -> None:
    """Give operator `op` an implementation for `backend`, which `register_backend` added or which is built in.

    Args:
        op: an operator's name.
        backend: a backend's name; an implementation that it has already is replaced.
        function: takes the arguments of the operator's reference and returns what it returns, with its own gradient.
        kernels: instead of `function`, one function for each of the operator's kernels, by the kernel's field name
            ("forward", "backward", ...), or for some of them; the rest run their references. The operator's gradient
            and fakes are used.
        supports: called with the same arguments as `function`; why it cannot take them, or None.
        why_not: why it cannot run on this machine, or None; default: what the backend says.

    Raises `ValueError` for an unknown operator or backend, or kernels that are not the operator's.
    """
    made = _made(op, backend, function, kernels=kernels, supports=supports, why_not=why_not)
    operator = _operator(op)
    _replaced.setdefault((op, backend), operator.implementations.get(backend))
    operator.add(backend, made)


def _made(
    op: str,
    backend: str,
    function: Function | None = None,
    *,
    kernels: Mapping[str, Function] | None = None,
    supports: Callable[..., str | None] = supports_anything,
    why_not: Callable[[], str | None] | None = None,
) -> Implementation:
    operator = _operator(op)
    if backend not in _backend.backends:
        raise UnknownBackend(f"backend: expected one of {', '.join(_backend.backends)}, got {backend!r}")
    unavailable = (why_not or _backend.backends[backend].why_not)()
    if (function is None) == (kernels is None):
        raise ValueError("function: expected either a function or kernels, got both or neither")
    if function is not None:
        return Implementation(function, unavailable, supports)
    assert kernels is not None
    fields = getattr(operator.references, "_fields", ())
    if not kernels or not set(kernels) <= set(fields):
        raise ValueError(f"kernels: expected some of {', '.join(fields) or 'none'}, got {', '.join(kernels) or 'none'}")
    launchers = operator.references._replace(**kernels)
    made = operator.from_kernels(backend, Python(lambda: launchers), f"_{backend}_{next(_registrations)}")
    return Implementation(made.call, unavailable, supports)


def unregister_implementation(op: str, backend: str) -> None:
    """Remove the implementation that `register_implementation` added; one that it replaced is used again.

    Raises `ValueError` if none was added.
    """
    operator = _operator(op)
    if (op, backend) not in _replaced:
        raise ValueError(f"backend: expected one registered for {op}, got {backend!r}")
    before = _replaced.pop((op, backend))
    if before is None:
        operator.remove(backend)
    else:
        operator.add(backend, before)


@contextmanager
def implementation(op: str, backend: str, function: Function | None = None, **options: Any) -> Iterator[None]:
    """`register_implementation` inside a `with` block, for the thread or asyncio task that enters it, as `backend`."""
    made = _made(op, backend, function, **options)
    outer = _backend.current()
    with _backend.entered(_backend.Scope(outer.settings, {**outer.implementations, (op, backend): made})):
        yield


def register_operator(name: str, summary: str, reference: Function) -> Operator[Any]:
    """Add an operator, defined by `reference`, to which backends get implementations by `register_implementation`.

    Returns the operator: calling it runs the backend that is set, or the fastest that supports the arguments.
    """
    operator: Operator[Any] = Operator(name, summary, reference=reference)
    _added_operators.add(name)
    return operator


def unregister_operator(name: str) -> None:
    """Remove the operator that `register_operator` added, its implementations and its setting.

    Raises `ValueError` if none was added.
    """
    if name not in _added_operators:
        raise ValueError(f"name: expected a registered operator, got {name!r}")
    _added_operators.remove(name)
    for backend in operators.pop(name).implementations:
        _replaced.pop((name, backend), None)
    _backend.operator_names.discard(name)
    for settings in (_backend.settings, _backend.current().settings):
        settings.pop(name, None)
    _backend.changed()


def unregister_backend(name: str) -> None:
    """Remove the backend that `register_backend` added, its implementations and the settings that name it.

    Raises `ValueError` for an unknown or a built-in backend.
    """
    if name not in _backend.backends or name in _BUILT_IN:
        raise ValueError(f"name: expected a registered backend, got {name!r}")
    for op, operator in operators.items():
        if name in operator.implementations:
            unregister_implementation(op, name)
    for settings in (_backend.settings, _backend.current().settings):
        for op in [op for op, chosen_name in settings.items() if chosen_name == name]:
            del settings[op]
    del _backend.backends[name]
    _backend.changed()


def list_backends() -> list[str]:
    """The names of all backends, in the order in which "auto" tries them."""
    return list(_backend.backends)


def list_operators() -> list[str]:
    """The names of all operators."""
    return sorted(operators)


def reference(op: str) -> Function:
    """The definition of operator `op` in eager PyTorch; it takes the arguments that all implementations take."""
    return _operator(op).eager.call


def _operator(op: str) -> Operator[Any]:
    if op not in operators:
        raise UnknownBackend(f"op: expected one of {', '.join(sorted(operators))}, got {op!r}")
    return operators[op]


# ---- the built-in backends, slowest first: each is put before the last


def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return _library.not_nvidia()


register_backend("eager", devices=("cpu", "cuda"))
register_backend("cuda", devices=("cuda",), before="eager", why_not=lambda: _library.loaded["cuda"])
register_backend("triton", devices=("cuda",), before="cuda", why_not=_no_triton)
register_backend("cpu", devices=("cpu",), before="triton", why_not=lambda: _library.loaded["cpu"])
_BUILT_IN = frozenset(_backend.backends)
