"""The classes of accelerated blocks: a subclass of the block's own class whose `forward` runs plans.

An instance changes its class and nothing else, so that copies and replicas of it compute with what they hold. The
subclass has the names of the class, `copy` keeps it, and pickling writes the class of the other code.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from yolov9_fast._accelerate.matching import FOLDED, Kind
from yolov9_fast.nn.plan import KNOWN_FORWARDS, PLAN, Planning, Step, run
from yolov9_fast.nn.steps import MEMORY_FORMAT

_ORIGIN = "_yolov9_fast_origin"
GRAPHS = "_yolov9_fast_graphs"
"""On a module whose forward is replayed: its recordings."""


class Origin(NamedTuple):
    """What an accelerated class was made of: the class of the other code, its kind, and the method that it calls.

    Of a class whose forward is replayed (`captured.py`) the kind is None.
    """

    base: type[nn.Module]
    kind: Kind | None
    method: str
    memory_format: torch.memory_format | None


def origin_of(module: nn.Module) -> Origin | None:
    """What the class of an accelerated instance was made of; None for any other module."""
    found: Origin | None = vars(type(module)).get(_ORIGIN)
    return found


def set_class(module: nn.Module, kind: Kind, memory_format: torch.memory_format | None) -> None:
    """Make `module` run plans of this kind. An instance whose `forward` is its own `forward_fuse` stays folded."""
    method = "forward" if module.__dict__.pop("forward", None) is None else FOLDED
    module.__class__ = _class_of(Origin(type(module), kind, method, memory_format))


def reset_class(module: nn.Module) -> bool:
    """Give `module` the class that it had before `set_class`; whether it had one."""
    origin = origin_of(module)
    if origin is None:
        return False
    module.__class__ = origin.base
    for name in (PLAN, GRAPHS):
        module.__dict__.pop(name, None)
    if origin.method != "forward":
        module.__dict__.setdefault("forward", getattr(module, origin.method))
    return True


def known_class(origin: Origin) -> type[nn.Module] | None:
    """The class that was derived for this origin before."""
    return next((known for known in origin.base.__subclasses__() if vars(known).get(_ORIGIN) == origin), None)


def _class_of(origin: Origin) -> type[nn.Module]:
    base = origin.base
    known = known_class(origin)
    if known is not None:
        return known
    definition = getattr(base, origin.method)
    kind = origin.kind
    assert kind is not None
    plan = kind.planner if origin.method == "forward" else KNOWN_FORWARDS[FOLDED]

    def planner(block: nn.Module, planning: Planning) -> Step | None:
        # The other code may have replaced its method, and children of the block, since.
        if getattr(base, origin.method) is not definition or kind.reason(block) is not None:
            return None
        return plan(block, planning)

    @functools.wraps(definition)
    def forward(self: nn.Module, *inputs: Any, **named: Any) -> Any:
        own: Callable[..., Any] = getattr(base, origin.method)
        if named or len(inputs) != 1:
            return own(self, *inputs, **named)
        return run(self, planner, own, inputs[0])

    forward.planner = planner  # type: ignore[attr-defined]
    return derived(origin, forward)


def derived(origin: Origin, forward: Callable[..., Any]) -> type[nn.Module]:
    """A subclass of `origin.base` with this forward, which nobody but `type` can tell from it."""
    base = origin.base
    members = {
        _ORIGIN: origin,
        MEMORY_FORMAT: origin.memory_format,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "forward": forward,
        "__copy__": _copy,
        "__deepcopy__": _deepcopy,
        "__reduce_ex__": _reduce,
    }
    made: type[nn.Module] = types.new_class(base.__name__, (base,), exec_body=lambda space: space.update(members))
    return made


def _plain(self: nn.Module, origin: Origin) -> nn.Module:
    """The same attributes in an instance of the other code's class."""
    plain: nn.Module = origin.base.__new__(origin.base)
    plain.__dict__.update({name: value for name, value in self.__dict__.items() if name not in (PLAN, GRAPHS)})
    return plain


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """For pickle: the module as the other code knows it, which loads where this library is not installed."""
    origin = _origin(self)
    plain = _plain(self, origin)
    if origin.method != "forward":
        plain.__dict__.setdefault("forward", types.MethodType(getattr(origin.base, origin.method), self))
    # Pickle refuses what later protocols give for an instance of another class.
    return plain.__reduce_ex__(0)


def _copy(self: nn.Module) -> nn.Module:
    own = getattr(_origin(self).base, "__copy__", None)
    return _made(self, lambda state: state) if own is None else _again(self, own(self))


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    own = getattr(_origin(self).base, "__deepcopy__", None)
    if own is not None:
        return _again(self, own(self, memo))
    return _made(self, lambda state: copy.deepcopy(state, memo), memo)


def _made(self: nn.Module, copied: Callable[[Any], Any], memo: dict[int, Any] | None = None) -> nn.Module:
    """What the module `copy` makes of an instance: a new one, registered in `memo`, with the `copied` state."""
    reduced: Any = _plain(self, _origin(self)).__reduce_ex__(0)
    make, arguments, state = reduced[:3]
    other: Any = make(*arguments)
    if memo is not None:
        memo[id(self)] = other
    other.__setstate__(copied(state))
    return _again(self, other)


def _again(self: nn.Module, other: nn.Module) -> nn.Module:
    if type(other) is _origin(self).base:
        other.__class__ = type(self)
    for name in (PLAN, GRAPHS):
        other.__dict__.pop(name, None)
    return other


def _origin(module: nn.Module) -> Origin:
    found = origin_of(module)
    assert found is not None
    return found
