"""Which implementation of an operator runs: by name when asked for, else the fastest that supports the arguments.

A setting for one operator wins over the one for all. `YOLOV9_FAST_BACKEND` and `YOLOV9_FAST_BACKEND_<OP>` are where the
settings begin (read at import), `set_backend` replaces them; without any it is "auto".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from yolov9_fast.errors import UserError

BACKENDS = ("auto", "eager", "cpu", "triton", "cuda")
_AUTO_ORDER = ("cuda", "triton", "cpu", "eager")


class UnknownBackend(UserError, ValueError):
    """A backend or operator name that does not exist."""


class BackendUnavailable(UserError, RuntimeError):
    """A backend asked for by name that cannot run here or not with these arguments."""


def _anything(*args: Any, **kwargs: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator.

    `call` takes the operator's arguments. `unavailable`: why it cannot run on this machine at all, None when it can;
    fixed at import, without touching a GPU. `supports(*args)`: why it cannot take these arguments, None when it can;
    plain Python that torch.compile can trace.
    """

    call: Callable[..., Any]
    unavailable: str | None = None
    supports: Callable[..., str | None] = _anything


@dataclass
class Operator:
    """An operator's name, what it computes in one line, and its implementations by backend; "eager" is always there."""

    name: str
    summary: str
    implementations: dict[str, Implementation]
    order: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        unknown = set(self.implementations) - set(BACKENDS[1:])
        if unknown or "eager" not in self.implementations:
            raise ValueError(
                f"{self.name}: implementations must be among {BACKENDS[1:]} with eager, got {unknown or 'none'}"
            )
        self.order = tuple(name for name in self.order or _AUTO_ORDER if name in self.implementations)


operators: dict[str, Operator] = {}
_chosen: dict[str, str] = {}
_GLOBAL = ""
generation = 0
"""Counts the changes of settings and of registered operators, so that callers can keep what they derived from them."""


def set_backend(name: str | None, op: str | None = None) -> None:
    """Use backend `name` ("auto", "eager", "cpu", "triton", "cuda") for operator `op`, or for all without their own.

    None takes a setting back. Raises `ValueError` for an unknown name. Whether the backend can run is decided at
    each call, by its arguments; there it raises `RuntimeError` with the reason if it cannot.
    """
    global generation
    key = _key(op)
    if name is None:
        _chosen.pop(key, None)
    else:
        _chosen[key] = _checked(name, "backend")
    generation += 1


def get_backend(op: str | None = None) -> str:
    """The backend in force for operator `op`, or for all operators without an own setting; "auto" unless set."""
    key = _key(op)
    return _chosen.get(key) or _chosen.get(_GLOBAL) or "auto"


@contextmanager
def backend(name: str, op: str | None = None) -> Iterator[None]:
    """`set_backend` for the length of a `with` block; what was set before comes back, also after an error."""
    key = _key(op)
    before = _chosen.get(key)
    set_backend(name, op)
    try:
        yield
    finally:
        set_backend(before, op)


def register(operator: Operator) -> Operator:
    """Make `operator` known to `set_backend` and `info`, and read its `YOLOV9_FAST_BACKEND_<OP>`."""
    global generation
    operators[operator.name] = operator
    generation += 1
    _read_environment(f"YOLOV9_FAST_BACKEND_{operator.name.upper()}", operator.name)
    return operator


def select(operator: Operator, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """The callable that runs `operator` with these arguments; `RuntimeError` if the backend set by name cannot."""
    name = _chosen.get(operator.name) or _chosen.get(_GLOBAL) or "auto"
    if name == "auto":
        for candidate in operator.order:
            implementation = operator.implementations[candidate]
            if implementation.unavailable is None and implementation.supports(*args, **kwargs) is None:
                return implementation.call
        return operator.implementations["eager"].call
    reason = why_not(operator, name, *args, **kwargs)
    if reason is not None:
        raise BackendUnavailable(f"{operator.name}: backend {name!r} was asked for and cannot run: {reason}")
    return operator.implementations[name].call


_BACKENDS_OF_DEVICE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def fuses(op: str, x: torch.Tensor) -> bool:
    """Whether operator `op` runs anything but its eager form on tensors like `x`, so that callers may plan for it.

    Under "auto" torch.compile gets the eager form, which it fuses itself.
    """
    name = get_backend(op)
    if name != "auto":
        return name != "eager"
    if torch.compiler.is_compiling():
        return False
    implementations = operators[op].implementations
    return any(
        backend in implementations and implementations[backend].unavailable is None
        for backend in _BACKENDS_OF_DEVICE.get(x.device.type, ())
    )


def why_not(operator: Operator, name: str, *args: Any, **kwargs: Any) -> str | None:
    """Why backend `name` cannot run `operator` (with these arguments, when some are given); None when it can."""
    implementation = operator.implementations.get(name)
    if implementation is None:
        return f"there is no such implementation, only {', '.join(operator.implementations)}"
    if implementation.unavailable is not None:
        return implementation.unavailable
    return implementation.supports(*args, **kwargs) if args or kwargs else None


def not_on(device: str, *tensors: torch.Tensor) -> str | None:
    """For `supports`: the reason when a tensor is on another kind of device than `device` ("cpu", "cuda")."""
    for tensor in tensors:
        if tensor.device.type != device:
            return f"it needs tensors on {device}, got one on {tensor.device.type}"
    return None


def needs_gradient(*tensors: torch.Tensor) -> str | None:
    """For `supports` of an operator without a backward: the reason when autograd would record the call."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "it has no gradient, and an argument requires one"
    return None


def _key(op: str | None) -> str:
    if op is None:
        return _GLOBAL
    if op not in operators:
        raise UnknownBackend(f"unknown operator {op!r}; choose from {', '.join(sorted(operators))}")
    return op


def _checked(name: str, what: str) -> str:
    if name not in BACKENDS:
        raise UnknownBackend(f"unknown {what} {name!r}; choose from {', '.join(BACKENDS)}")
    return name


def _read_environment(variable: str, key: str) -> None:
    name = os.environ.get(variable, "").strip().lower()
    if name and key not in _chosen:
        _chosen[key] = _checked(name, f"backend in {variable}:")


_read_environment("YOLOV9_FAST_BACKEND", _GLOBAL)
