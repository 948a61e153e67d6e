"""`accelerate(model, capture=True)`: a network's forward and backward as CUDA graphs, for each shape of its input.

The network gets a class derived from its own, as accelerated blocks do, whose `forward` replays. Warm-ups are the
calls of the loop itself, so that statistics see no batch twice; what a recording relies on is checked at each call.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from yolov9_fast._accelerate.classes import GRAPHS, Origin, derived, known_class, origin_of
from yolov9_fast._capture import (
    WARM_UP,
    Capture,
    CudaGraphs,
    Recorder,
    Unchanged,
    as_recorded,
    chosen_as_recorded,
    reason_of,
)
from yolov9_fast.nn.plan import _GLOBAL_HOOKS, hooked
from yolov9_fast.ops._backend import chosen_settings
from yolov9_fast.ops._operator import AutogradFunction, once_differentiable
from yolov9_fast.ops._recording import recorded

log = logging.getLogger(__name__)
SHAPES = 8
"""Shapes (with dtype, mode and autocast) that are recorded at a time."""


def recorder_for(device: torch.device) -> Recorder | None:
    """What records on this device; None where nothing can."""
    return CudaGraphs(device) if device.type == "cuda" else None


def set_captured(model: nn.Module) -> str | None:
    """Have `model` replay its forward and backward; why nothing will be, with its parameters where they are now.

    Raises `ValueError` for DistributedDataParallel, around the model or inside it, and for other wrappers of torch.
    """
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "capture: expected a network without DistributedDataParallel, which communicates during the backward; "
                "capture a network that one process trains"
            )
    if isinstance(model, nn.DataParallel):
        raise ValueError("capture: expected a network without DataParallel, which copies it in each call")
    if "forward" in vars(model):
        return "its forward has been replaced on the instance"
    if not is_captured_class(model):
        model.__class__ = _class_of(type(model))
    parameter = next(model.parameters(), None)
    if parameter is None:
        return "it has no parameters"
    kind = parameter.device.type
    return None if recorder_for(parameter.device) else f"a {kind.upper()} has no CUDA graphs; it runs as without"


def is_captured_class(model: nn.Module) -> bool:
    """Whether `set_captured` changed this instance."""
    origin = origin_of(model)
    return origin is not None and origin.kind is None


def _class_of(base: type[nn.Module]) -> type[nn.Module]:
    origin = Origin(base, None, "forward", None)
    known = known_class(origin)
    if known is not None:
        return known

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *inputs: Any, **named: Any) -> Any:
        def own(*given: Any) -> Any:
            return base.forward(self, *given, **named)

        if named or len(inputs) != 1 or not _plain_tensor(inputs[0]) or vars(self).get("_is_replica"):
            return own(*inputs)
        x: Tensor = inputs[0]
        graphs = vars(self).get(GRAPHS)
        if graphs is None or graphs.owner() is not self or graphs.device != x.device:
            recorder = recorder_for(x.device)
            if recorder is None:
                return own(x)
            graphs = vars(self)[GRAPHS] = _Graphs(self, x.device)
        return graphs(x, own)

    return derived(origin, forward)


def _plain_tensor(x: Any) -> bool:
    if torch.compiler.is_compiling():
        return False
    return type(x) in (Tensor, nn.Parameter) and not x.requires_grad and not recorded() and not any(_GLOBAL_HOOKS)


@dataclasses.dataclass(eq=False)
class _Pending:
    """A forward that was replayed: its backward may still come, with what the forward left in memory."""

    done: bool = False


@dataclasses.dataclass(eq=False)
class _Pair:
    """Forward and backward of one key."""

    x: Tensor
    unchanged: Unchanged
    parameters: list[Tensor]
    forward: Callable[[], object]
    outputs: list[Tensor]
    structure: Any
    backward: Callable[[], object]
    incoming: list[Tensor | None]
    gradients: list[Tensor | None]


class _Graphs:
    """The recordings of one network; belongs to it alone, and is neither copied nor pickled."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.owner = weakref.ref(model)
        self.device = device
        self.name = type(model).__name__
        # Of evaluation; a memory pool of its own, so that it may run between a forward and its backward.
        self.capture = Capture(f"evaluation of {self.name}", device, most=SHAPES, record=recorder_for(device))
        self.reason: str | None = None
        self._evaluates = True
        self._evaluated: dict[Hashable, tuple[Tensor, Unchanged]] = {}
        self._record = recorder_for(device)
        self._pairs: dict[Hashable, _Pair] = {}
        self._calls: dict[Hashable, int] = {}
        self._pending: weakref.ref[_Pending] | None = None

    def __reduce__(self) -> Any:
        return _nothing, ()

    def __call__(self, x: Tensor, own: Callable[[Tensor], Any]) -> Any:
        model = self.owner()
        assert model is not None
        kind = self.device.type
        key = (
            tuple(x.shape),
            x.stride(),
            x.dtype,
            model.training,
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
            chosen_settings(),
        )
        if as_recorded.get() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return own(x)  # part of a larger recording
        if hooked(*model.children()):
            return own(x)
        if not torch.is_grad_enabled():
            return self._evaluate(model, key, x, own)
        return self._train(model, key, x, own)

    def _evaluate(self, model: nn.Module, key: Hashable, x: Tensor, own: Callable[[Tensor], Any]) -> Any:
        if not self._evaluates:
            return own(x)
        known = self._evaluated.get(key)
        if known is not None and not known[1].holds():
            self.capture.forget(key)
            del self._evaluated[key]
        if not self.capture.fixed(key):
            return self.capture.run(key, lambda: own(x))
        if key not in self._evaluated:
            if _any_hooks(model):
                return own(x)
            self._evaluated[key] = torch.empty_like(x), Unchanged(model)
        fixed = self._evaluated[key][0].copy_(x)
        result = self.capture.run(key, lambda: own(fixed))
        if key not in self.capture.recorded:
            return result
        try:
            structure, tensors = _taken_apart(result)
        except TypeError as error:
            log.warning("%s: not captured as a CUDA graph: %s", self.capture.name, error)
            self._evaluates = False
            self.capture.reset()
            return own(x)
        return _put_together(structure, iter([tensor.clone() for tensor in tensors]))

    def _train(self, model: nn.Module, key: Hashable, x: Tensor, own: Callable[[Tensor], Any]) -> Any:
        pair = self._pairs.get(key)
        if pair is not None and not pair.unchanged.holds():
            del self._pairs[key]
            pair, self._calls[key] = None, 0
        pending = None if self._pending is None else self._pending()
        if (pending is not None and not pending.done) or any(p._backward_hooks for p in model.parameters()):
            return own(x)  # a replay would overwrite what the backward of the last one needs
        if pair is None:
            if self.reason is not None or len(self._pairs) >= SHAPES or _any_hooks(model):
                return own(x)
            calls = self._calls[key] = self._calls.get(key, 0) + 1
            if calls <= WARM_UP:
                with chosen_as_recorded(self.device.type):
                    return own(x)
            try:
                pair = self._recorded(model, x, own)
            except Exception as error:  # whatever the network, torch or the driver raises
                self.reason = reason_of(error)
                log.warning("%s: not captured as CUDA graphs: %s; it goes on without", self.name, self.reason)
                return own(x)
            self._pairs[key] = pair
        token = _Pending()
        self._pending = weakref.ref(token)
        outputs = _Replay.apply(pair, token, x, *pair.parameters)
        return _put_together(pair.structure, iter(outputs))

    def _recorded(self, model: nn.Module, x: Tensor, own: Callable[[Tensor], Any]) -> _Pair:
        assert self._record is not None
        parameters: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError("no parameter requires gradients")
        unchanged, fixed = Unchanged(model), torch.empty_like(x).copy_(x)
        with chosen_as_recorded(self.device.type):
            forward, result = self._record(lambda: own(fixed))
            structure, outputs = _taken_apart(result)
            incoming = [torch.zeros_like(one) if one.requires_grad else None for one in outputs]
            backward, gradients = self._record(
                lambda: torch.autograd.grad(
                    [one for one in outputs if one.requires_grad],
                    parameters,
                    [one for one in incoming if one is not None],
                    allow_unused=True,
                )
            )
        kept = [one.detach() for one in outputs]
        return _Pair(fixed, unchanged, parameters, forward, kept, structure, backward, incoming, list(gradients))


def _nothing() -> None:
    return None


class _Replay(AutogradFunction):
    """Of a pair; gives copies, since the loop may keep results and gradients while the graphs go on."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """Arguments: the pair, its token, the input, the parameters."""
        pair, ctx.token, x = arguments[:3]
        ctx.pair = pair
        pair.x.copy_(x)
        pair.forward()
        outputs = tuple(output.clone() for output in pair.outputs)
        ctx.mark_non_differentiable(*(one for one, into in zip(outputs, pair.incoming, strict=True) if into is None))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        pair, token = ctx.pair, ctx.token
        if token.done:
            raise RuntimeError("a captured network was differentiated twice after one forward (retain_graph=True)")
        token.done = True
        for into, gradient in zip(pair.incoming, gradients, strict=True):
            if into is not None:
                if gradient is None:
                    into.zero_()
                else:
                    into.copy_(gradient)
        pair.backward()
        # Autograd may keep what it gets as `.grad`; the next replay would change that.
        copies = iter(torch._foreach_mul([one for one in pair.gradients if one is not None], 1.0))
        return (None, None, None, *(None if one is None else next(copies) for one in pair.gradients))


def _any_hooks(model: nn.Module) -> bool:
    """Whether a module inside has hooks, which a replay would not run; those of the network itself run outside."""
    return hooked(*(module for module in model.modules() if module is not model))


def _taken_apart(value: Any) -> tuple[Any, list[Tensor]]:
    """The structure of a result, which tensors in nested tuples, lists, dicts and dataclasses are, and its tensors.

    Raises `TypeError` for anything else.
    """
    tensors: list[Tensor] = []

    def visit(entry: Any) -> Any:
        if isinstance(entry, Tensor):
            tensors.append(entry)
            return Tensor
        if entry is None:
            return None
        if isinstance(entry, dict):
            return dict, {name: visit(each) for name, each in entry.items()}
        if isinstance(entry, tuple) and hasattr(entry, "_fields"):
            return functools.partial(_made_of, type(entry)), [visit(each) for each in entry]
        if isinstance(entry, (list, tuple)):
            return type(entry), [visit(each) for each in entry]
        if dataclasses.is_dataclass(entry):
            fields = {field.name: visit(getattr(entry, field.name)) for field in dataclasses.fields(entry)}
            return functools.partial(_made, type(entry)), fields
        raise TypeError(f"the network gives {type(entry).__name__}, expected tensors in tuples, lists and dicts")

    return visit(value), tensors


def _made(kind: Any, fields: dict[str, Any]) -> Any:
    return kind(**fields)


def _made_of(kind: Any, entries: list[Any]) -> Any:
    return kind(*entries)


def _put_together(structure: Any, tensors: Iterator[Tensor]) -> Any:
    if structure is None:
        return None
    if structure is Tensor:
        return next(tensors)
    make, entries = structure
    if isinstance(entries, dict):
        return make({name: _put_together(entry, tensors) for name, entry in entries.items()})
    return make([_put_together(entry, tensors) for entry in entries])
