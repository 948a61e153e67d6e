"""Backends by name, and which one is set: for one operator, or for all.

A setting for one operator wins over the one for all. `YOLOV9_FAST_BACKEND` and `YOLOV9_FAST_BACKEND_<OP>`, read at
import, give the first settings; `set_backend` replaces them. Without a setting it is "auto".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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
"""Counts the changes of settings, backends and operators, so that callers can cache what they derived from them."""

settings: dict[str, str] = {}
"""The backend set for each operator, and under "" the one for all; empty while everything is "auto"."""
_ALL = ""


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
    generation += 1


def set_backend(name: str | None, op: str | None = None) -> None:
    """Use backend `name` ("auto", "eager", "cpu", "triton", "cuda", or a registered one) for operator `op`, or for all.

    None removes a setting. Raises `ValueError` for an unknown name. Whether the backend can run is decided at
    each call, by its arguments; the call raises `RuntimeError` with the reason if it cannot.
    """
    key = _key(op)
    if name is None or (name == AUTO and key == _ALL):
        settings.pop(key, None)
    else:
        settings[key] = _checked(name, "backend")
    changed()


def get_backend(op: str | None = None) -> str:
    """The backend that is set for operator `op`, or for all operators without their own setting; default "auto"."""
    return chosen(_key(op))


def chosen(key: str = _ALL) -> str:
    """`get_backend` without a check of the name."""
    return settings.get(key) or settings.get(_ALL) or AUTO


@contextmanager
def backend(name: str, op: str | None = None) -> Iterator[None]:
    """`set_backend` inside a `with` block; the previous setting is restored at its end, also after an error."""
    key = _key(op)
    before = settings.get(key)
    set_backend(name, op)
    try:
        yield
    finally:
        set_backend(before, op)


def add_operator_name(name: str) -> None:
    """Let settings name operator `name`, and read its `YOLOV9_FAST_BACKEND_<OP>`."""
    operator_names.add(name)
    _read_environment(name)
    changed()


def check_setting(op: str) -> None:
    """Raises `UnknownBackend` where a variable of the environment set a backend for `op` that does not exist."""
    key = op if op in settings else _ALL
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
