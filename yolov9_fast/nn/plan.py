"""A block is planned once and run many times: what is fused, which modules' weights, which channels of which buffer.

`@planned(planner)` around the `forward` of a block makes its instances run a plan where the operators are fused, and
the decorated definition elsewhere. The planner inspects the block and its children once and returns a `Step`; a child
that has hooks, a forward of its own or an unknown type becomes a step that calls it. A plan records what the planner
read: types, children, hooks, replaced forwards, attributes. It is used as long as all of that is unchanged; weights,
modes and statistics are read at each run. It is kept on the block but is never copied, pickled or part of the state.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from yolov9_fast.nn.convolution import Upsampled, joined
from yolov9_fast.nn.host_time import is_captured, least_bytes
from yolov9_fast.nn.sync_batch_norm import counted_together, counting
from yolov9_fast.nn.weight_casts import cast_together, is_autocast_enabled
from yolov9_fast.ops import _backend, _bn_silu
from yolov9_fast.ops._recording import recorded

Slot = Callable[[Tensor], Tensor]
"""Gives the tensor to write a result into, of the shape, dtype and memory format of the tensor that it is given."""
PLAN = "_yolov9_fast_plan"
"""On a block: its plan."""


class Step(Protocol):
    """One operation of a plan: the result for x, plus `residual`; written into `slot(result)` where it can be.

    `width`: channels of a result that is written into its slot; None where it is not.
    """

    @property
    def width(self) -> int | None: ...

    def __call__(self, x: Any, residual: Tensor | None = None, slot: Slot | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Called:
    """A module that is called as it is."""

    module: nn.Module
    width: None = None

    def __call__(self, x: Any, residual: Tensor | None = None, slot: Slot | None = None) -> Tensor:
        y: Tensor = self.module(joined(x))
        return y if residual is None else y + residual


_GLOBAL_HOOKS = tuple(
    getattr(torch_module, f"_global_{name}_hooks") for name in ("forward", "forward_pre", "backward", "backward_pre")
)
_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FORWARD = attrgetter("forward")


def fused(x: Any) -> bool:
    """Whether blocks run fused on this input: where `bn_silu` runs anything but its eager form.

    The definitions run while something records or transforms the calls of PyTorch's own operators, for a subclass of
    Tensor and for a symbol, as of `torch.fx.symbolic_trace`.

    torch.compile fuses the eager form by itself, so there only a backend set by name counts. So it is without gradients
    on a CPU: the convolution adds the bias, SiLU works in place, copies are cheap, and the eager form was 1.0 to 1.3
    times as fast (gelan-t and -s, folded, batches of 1 and 8). On a GPU "auto" takes the definition of a block whose
    input is so small that its Python costs more than its bytes (`nn/host_time.py`). Global module hooks must see every
    module's call.
    """
    while not isinstance(x, Tensor):
        if isinstance(x, Upsampled):
            x = x.source
        elif isinstance(x, tuple | list) and x:
            x = x[-1]
        else:  # a symbol
            return False
    if torch.compiler.is_compiling():
        return not recorded() and _fused_like(x)
    if any(_GLOBAL_HOOKS) or type(x) not in _PLAIN:
        return False
    key = (_backend.generation, id(_backend.current()), x.device, torch.is_grad_enabled())
    least = _decisions.get(key)
    if least is None:
        _decisions.clear()
        least = _decisions[key] = _least_bytes(x)
    if x.nbytes < least and (least == math.inf or not is_captured(x)):
        return False
    return not recorded()


_PLAIN = (Tensor, nn.Parameter)
_decisions: dict[tuple[int, int, torch.device, bool], float] = {}
"""Bytes of an input from which on blocks run fused; infinite: never."""


def _least_bytes(x: Tensor) -> float:
    if not _fused_like(x):
        return math.inf
    automatic = x.is_cuda and _backend.get_backend("bn_silu") == _backend.AUTO
    return least_bytes(torch.is_grad_enabled()) if automatic else 0.0


def _fused_like(x: Tensor) -> bool:
    if x.device.type == "cpu" and not torch.is_grad_enabled() and _backend.get_backend("bn_silu") == "auto":
        return False
    return _bn_silu.OPERATOR.has_kernels(x.device)


def hooked(*modules: Any) -> bool:
    """Whether a module has hooks, which only a call of it would run; what is no module is ignored."""
    for m in modules:
        if isinstance(m, nn.Module) and (
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        ):
            return True
    return False


_TORCH_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward
    for kind in (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.SiLU, nn.Identity, nn.MaxPool2d, nn.AvgPool2d)
}


def own_forward(module: nn.Module) -> bool:
    """Whether a call of `module` runs the forward of its class; of a class of PyTorch, the one that it came with."""
    kind = type(module)
    return "forward" not in module.__dict__ and kind.forward is _TORCH_FORWARDS.get(kind, kind.forward)


class Planning:
    """One planning of `block`: gives the steps of its children, and records what was read."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.modules: dict[nn.Module, None] = {}
        self.readings: list[tuple[nn.Module, str]] = [(block, "_modules")]

    def step(self, module: nn.Module, planner: Planner | None = None) -> Step:
        """The step that stands for `module(x)`; `planner` is tried for a module whose forward has none."""
        found = planner_of(module) or planner
        self.modules[module] = None
        step = None if found is None or hooked(module) else found(module, self)
        return Called(module) if step is None else step

    def plain(self, *modules: Any) -> bool:
        """Whether modules of PyTorch need not be called: no hooks, PyTorch's forward; what is no module is ignored."""
        present = [module for module in modules if isinstance(module, nn.Module)]
        self.modules.update(dict.fromkeys(present))
        return not hooked(*present) and all(map(own_forward, present))

    def read(self, module: nn.Module, *names: str) -> None:
        """Record that the plan depends on these attributes of `module` (None where it has none)."""
        self.readings += [(module, name) for name in names]


Planner = Callable[[Any, Planning], Step | None]
"""Makes the step of a block; None where its definition has to run."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The step of one block (None: its definition runs), and what the planner read, by which it is validated."""

    step: Step | None
    own: list[tuple[str, Any]]
    """Name and value of what was read of the block itself: holding the block would make a reference cycle."""
    modules: tuple[nn.Module, ...]
    """Descendants that the step calls or replaces."""
    convolutions: tuple[nn.Conv2d, ...]
    """Of `modules`."""
    types: list[type]
    classes: tuple[type[nn.Module], ...]
    """Every class among them and the block's own, and what each derives from."""
    forwards: list[Any]
    """Of `classes`."""
    hooks: list[tuple[dict[int, Any], ...]]
    dicts: list[dict[str, Any]]
    """`__dict__` of the descendants, one for each name and value that was read."""
    names: list[str]
    values: list[Any]

    @classmethod
    def of(cls, block: nn.Module, planner: Planner) -> Plan:
        planning = Planning(block)
        step = planner(block, planning)
        modules = tuple(planning.modules)
        own = [(name, _copy(vars(block).get(name))) for owner, name in planning.readings if owner is block]
        read = [(vars(owner), name) for owner, name in planning.readings if owner is not block]
        read += [(vars(module), name) for module in modules for name in ("forward", "_modules")]
        types = {type(module) for module in (block, *modules)}
        bases = {base for kind in types for base in kind.__mro__[:2]}
        classes = tuple(base for base in bases if issubclass(base, nn.Module))
        return cls(
            step,
            own,
            modules,
            tuple(module for module in modules if type(module) is nn.Conv2d),
            [*map(type, modules)],
            classes,
            [*map(_FORWARD, classes)],
            [tuple(map(dict, _HOOKS(vars(module)))) for module in modules],
            [owner for owner, _ in read],
            [name for _, name in read],
            [_copy(owner.get(name)) for owner, name in read],
        )

    def holds(self, block: nn.Module) -> bool:
        """Whether the planner would read the same again. Compared by C code, some 20 ns for each value."""
        own = block.__dict__
        for name, value in self.own:
            if own.get(name) != value:
                return False
        return (
            [*map(type, self.modules)] == self.types
            and [*map(_FORWARD, self.classes)] == self.forwards
            and [*map(_HOOKS, map(vars, self.modules))] == self.hooks
            and [*map(dict.get, self.dicts, self.names)] == self.values
        )

    def __reduce__(self) -> Any:
        """A copy of a block, or a pickled one, has no plan: it makes its own."""
        return _no_plan, ()


def _no_plan() -> None:
    return None


def _copy(value: Any) -> Any:
    """What a later value is compared with; children are compared one by one."""
    return dict(value) if isinstance(value, dict) else value


def run(block: nn.Module, planner: Planner, definition: Callable[..., Any], x: Any) -> Any:
    """`block` on x: its plan, made anew where it no longer holds; the definition where nothing is fused."""
    if not fused(x):
        return definition(block, x)
    if torch.compiler.is_compiling():
        step = planner(block, Planning(block))  # traced once; the compiler guards what it read
    else:
        plan = block.__dict__.get(PLAN)
        if plan is None or not plan.holds(block):
            plan = block.__dict__[PLAN] = Plan.of(block, planner)
        step = plan.step
        if step is not None:
            if len(plan.convolutions) > 1 and torch.is_grad_enabled() and is_autocast_enabled():
                with cast_together(plan.convolutions), counted_together():
                    return step(x)
            if block.training and counting.pending is None:
                with counted_together():
                    return step(x)
    return definition(block, x) if step is None else step(x)


_F = TypeVar("_F", bound=Callable[..., Any])


def planned(planner: Planner) -> Callable[[_F], _F]:
    """Decorator of a block's `forward(self, x)`, which stays the definition; instances run plans by `planner`."""

    def decorate(definition: _F) -> _F:
        @functools.wraps(definition)
        def forward(self: nn.Module, x: Any) -> Any:
            return run(self, planner, definition, x)

        forward.planner = planner  # type: ignore[attr-defined]
        return cast(_F, forward)

    return decorate


KNOWN_FORWARDS: dict[Any, Planner] = {}
"""Planners of forwards from elsewhere: by function, or by name where an instance has its own method as forward."""


def planner_of(module: nn.Module) -> Planner | None:
    """The planner by which a call of `module` would run; None where it has none or its forward was replaced."""
    forward = module.__dict__.get("forward")
    if forward is None:
        forward = type(module).forward
        return getattr(forward, "planner", None) or KNOWN_FORWARDS.get(forward)
    if getattr(forward, "__self__", None) is not module:  # of another instance, as after copy.copy
        return None
    return KNOWN_FORWARDS.get(forward.__name__)
