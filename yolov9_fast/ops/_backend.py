"""Backends by name, and which one is set: for one operator, or for all.

A setting for one operator wins over the one for all. `YOLOV9_FAST_BACKEND` and `YOLOV9_FAST_BACKEND_<OP>`, read at
import, give the first settings; `set_backend` replaces them. Without a setting it is "auto". These hold for the
process; a `with` block holds for the thread (or the asyncio task) that entered it.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from yolov9_fast.errors import UserError


class UnknownBackend(UserError, ValueError):
    """A backend or operator name that does not exist."""


class BackendUnavailable(UserError, RuntimeError):
    """A backend selected by name that cannot run here or not with these arguments."""


@dataclass(frozen=True)
class Backend:
    """A kind of implementation that operators may have.

    `devices`: types of the devices whose tensors it takes. `why_not()`: why it cannot run on this machine, None when it
    can; called when an implementation is registered, must not initialise a GPU.
    """

    name: str
    devices: tuple[str, ...]
    why_not: Callable[[], str | None]


AUTO = "auto"
backends: dict[str, Backend] = {}
"""In the order in which "auto" tries them: the fastest on its devices first, "eager" last."""
operator_names: set[str] = set()
generation = 0
"""Another number after each change of settings, backends and operators: with `id(current())` a key to cache by."""
_generations = itertools.count(1)


@dataclass(frozen=True)
class Scope:
    """What is in force: in the process, or in the `with` blocks around the caller."""

    settings: dict[str, str]
    """The backend set for each operator, and under "" the one for all; empty while everything is "auto"."""
    implementations: dict[tuple[str, str], Any]
    """By operator and backend: an `Implementation` of a `with` block, before that of the operator."""


process = Scope({}, {})
settings = process.settings
scope: ContextVar[Scope] = ContextVar("yolov9_fast_scope", default=process)


class _OfThread(threading.local):
    """The scope for torch.compile, which cannot trace a ContextVar, but checks at each call what this holds."""

    def __init__(self) -> None:
        self.scope = process


_of_thread = _OfThread()
compiling = torch.compiler.is_dynamo_compiling
_ALL = ""


def current() -> Scope:
    """The scope of the caller."""
    return _of_thread.scope if compiling() else scope.get()


@contextmanager
def entered(inner: Scope) -> Iterator[None]:
    """`inner` is the scope of the caller inside a `with` block."""
    if compiling():
        outer, _of_thread.scope = _of_thread.scope, inner
        try:
            yield
        finally:
            _of_thread.scope = outer
        return
    token = scope.set(inner)
    _of_thread.scope = inner
    changed()
    try:
        yield
    finally:
        scope.reset(token)
        _of_thread.scope = scope.get()
        changed()


def register_backend(
    name: str, *, devices: Sequence[str], before: str = "cpu", why_not: Callable[[], str | None] = lambda: None
) -> None:
    """Add a backend, to which operators get implementations by `register_implementation`.

    Args:
        name: as in `set_backend(name)`; lower case.
        devices: types of the devices whose tensors it takes, as ("cpu",) or ("cuda",).
        before: "auto" prefers the new backend to this one; default: to all.
        why_not: why the backend cannot run on this machine, None when it can. It must not initialise a GPU.

    Raises `ValueError` for a name that exists or an unknown `before`.
    """
    if not name or name != name.strip().lower() or name == AUTO or name in backends:
        raise ValueError(f"name: expected a new name in lower case, got {name!r}")
    if backends and before not in backends:
        raise UnknownBackend(f"before: expected one of {', '.join(backends)}, got {before!r}")
    names = list(backends)
    position = names.index(before) if names else 0
    backends[name] = Backend(name, tuple(devices), why_not)
    for later in names[position:]:
        backends[later] = backends.pop(later)
    changed()


def changed() -> None:
    """Count a change of settings, backends or operators."""
    global generation
    generation = next(_generations)


def set_backend(name: str | None, op: str | None = None) -> None:
    """Use backend `name` ("auto", "eager", "cpu", "triton", "cuda", or a registered one) for operator `op`, or for all.

    It holds in all threads of the process; inside a `with backend(...)` block it holds in the block, until its end.
    None removes a setting. Raises `ValueError` for an unknown name. Whether the backend can run is decided at
    each call, by its arguments; the call raises `RuntimeError` with the reason if it cannot.
    """
    _set(current().settings, name, _key(op))
    changed()


def _set(settings: dict[str, str], name: str | None, key: str) -> None:
    if name is None or (name == AUTO and key == _ALL):
        settings.pop(key, None)
    else:
        settings[key] = _checked(name, "backend")


def get_backend(op: str | None = None) -> str:
    """The backend that is set for operator `op`, or for all operators without their own setting; default "auto"."""
    return chosen(_key(op))


def chosen(key: str = _ALL) -> str:
    """`get_backend` without a check of the name."""
    settings = current().settings
    return settings.get(key) or settings.get(_ALL) or AUTO


def chosen_settings() -> tuple[tuple[str, str], ...]:
    """What is set for the caller, comparable: operators and their backends."""
    return tuple(sorted(current().settings.items()))


@contextmanager
def backend(name: str, op: str | None = None) -> Iterator[None]:
    """`set_backend` inside a `with` block, for the thread or asyncio task that enters it.

    The block starts with the settings that hold where it is entered; they hold again at its end, also after an error.
    Other threads keep theirs, and a thread that is started in the block has those of the process, as has
    `nn.DataParallel`; `contextvars.copy_context().run` carries the block's into a thread.
    """
    outer = current()
    settings = dict(outer.settings)
    _set(settings, name, _key(op))
    with entered(Scope(settings, outer.implementations)):
        yield


def add_operator_name(name: str) -> None:
    """Let settings name operator `name`, and read its `YOLOV9_FAST_BACKEND_<OP>`."""
    operator_names.add(name)
    _read_environment(name)
    changed()


def check_setting(op: str) -> None:
    """Raises `UnknownBackend` where a variable of the environment set a backend for `op` that does not exist."""
    key = op if op in current().settings else _ALL
    _checked(chosen(op), f"backend (set_backend or {_variable(key)})")


def _variable(key: str) -> str:
    return "YOLOV9_FAST_BACKEND" if key == _ALL else f"YOLOV9_FAST_BACKEND_{key.upper()}"


def _key(op: str | None) -> str:
    if op is None:
        return _ALL
    if op not in operator_names:
        raise UnknownBackend(f"op: expected one of {', '.join(sorted(operator_names))}, got {op!r}")
    return op


def _checked(name: str, what: str) -> str:
    if name != AUTO and name not in backends:
        raise UnknownBackend(f"{what}: expected one of {', '.join((AUTO, *backends))}, got {name!r}")
    return name


def _read_environment(key: str) -> None:
    name = os.environ.get(_variable(key), "").strip().lower()
    if name:  # its name is checked at the first call: the backend may be registered after this import
        settings.setdefault(key, name)


_read_environment(_ALL)
