"""`capture_step`: a step of somebody else's training loop as one CUDA graph, where it does what a graph can repeat."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from yolov9_fast._accelerate.inspection import Inspection, numbers
from yolov9_fast._capture import WARM_UP, Capture, Recorder
from yolov9_fast._text import printable

log = logging.getLogger(__name__)
CHANGES = 8
"""How often numbers of an optimiser may change before the step is called plainly."""
_T = TypeVar("_T")


def capture_step(
    step: Callable[[Any], _T],
    example_batch: Any,
    *,
    mode: str = "auto",
    warmup: int = WARM_UP,
    record: Recorder | None = None,
) -> CapturedStep[_T]:
    """A function that does what `step(batch)` does, on a GPU as one CUDA graph.

    The first calls are plain calls of the step with the batch in memory that stays. They are looked at: a graph repeats
    operations on the device, with the numbers and the memory of its recording. A step that reads a value on the host,
    copies between host and device, has shapes that depend on values, other operations or numbers from call to call (a
    learning rate, a count), or tensors that lie elsewhere each time, is not captured; `reason` and a line in the log
    say why. What Python does besides (printing, counting) is done in plain calls only. Optimisers need
    `capturable=True` where they have it; a number of an optimiser that changes between calls is recorded anew, 8 times
    at most.

    Args:
        step: forward, loss, backward, optimiser and what else belongs to a step, of one batch.
        example_batch: tensors in nested tuples, lists and dicts, on the step's device. Only shapes, dtypes and the
            device matter. Later batches may be on the host: they are copied.
        mode: "auto", or "off" for plain calls alone.
        warmup: plain calls before the recording, at least 3. Those from the second on are looked at, on a CPU as well.
        record: makes the recording; by default a CUDA graph. On a CPU the step is simply called.

    Returns:
        `CapturedStep`. Tensors that it gives are the same each time, valid until its next call.

    Raises:
        ValueError: a batch without tensors or with something else, on several devices, or fewer than 3 calls.
        UserError: another mode.
    """
    return CapturedStep(step, example_batch, mode=mode, warmup=warmup, record=record)


class CapturedStep(Generic[_T]):
    """What `capture_step` gives: call it with a batch."""

    def __init__(
        self, step: Callable[[Any], _T], example_batch: Any, *, mode: str, warmup: int, record: Recorder | None
    ) -> None:
        if warmup < 3:
            raise ValueError(f"warmup: expected at least 3, got {warmup}")
        tensors, self._structure = _flattened(example_batch)
        devices = {tensor.device for tensor in tensors}
        if len(devices) != 1:
            raise ValueError(f"example_batch: expected tensors of one device, got {', '.join(map(str, devices))}")
        self._step = step
        (self._device,) = devices
        self._fixed = [torch.empty_like(tensor, requires_grad=False) for tensor in tensors]
        self._batch = _rebuilt(example_batch, iter(self._fixed))
        name = printable(getattr(step, "__qualname__", type(step).__qualname__), 100)
        self._capture = Capture(name, self._device, mode=mode, most=1, warmup=warmup, record=record)
        self._warmup, self._off = warmup, mode == "off"
        self._fault: str | None = None
        self._changes = 0
        self._warned = False
        self._restart()

    @property
    def fault(self) -> str | None:
        """What was found in the step that a graph cannot repeat; None without, or before the calls of the warm-up."""
        return self._fault

    @property
    def reason(self) -> str | None:
        """Why the step is not captured and will not be; None while it is or may be."""
        return self._fault or self._capture.reason

    @property
    def captured(self) -> bool:
        """Whether the next call is a replay."""
        return self._capture.recorded != () and self._fault is None

    def reset(self) -> None:
        """Forget the recording and what was found: the next calls are a warm-up again."""
        self._fault, self._changes = None, 0
        self._restart()

    def __call__(self, batch: Any) -> _T:
        """The step with this batch.

        Raises `ValueError` for a batch of another structure. One of other shapes or dtypes is a plain call.
        """
        tensors, structure = _flattened(batch)
        if structure != self._structure:
            raise ValueError(f"batch: expected the structure {self._structure}, got {printable(structure, 300)}")
        if not all(map(_alike, tensors, self._fixed)):
            if not self._warned:
                self._warned = True
                log.info("%s: a batch of other shapes or dtypes than the example's is not captured", self._capture.name)
            return self._step(_rebuilt(batch, iter([one.to(self._device) for one in tensors])))
        with torch.no_grad():
            for fixed, given in zip(self._fixed, tensors, strict=True):
                fixed.copy_(given, non_blocking=True)
        if self._off or self._fault is not None:
            return self._step(self._batch)
        if self._calls > self._warmup and not self._holds():
            self._changes += 1
            self._restart()
            if self._changes > CHANGES:
                self._refuse("numbers of an optimiser or addresses of tensors keep changing; make the numbers tensors")
                return self._step(self._batch)
        self._calls += 1
        if self._calls > self._warmup:
            return self._capture.run("step", self._program)
        # The first call makes what later calls find: states of optimisers, tables.
        program = self._program if self._calls == 1 else self._inspected
        result = self._capture.run("step", program)
        if self._calls == self._warmup:
            self._judge()
        return result

    def _restart(self) -> None:
        self._capture.reset()
        self._calls = 0
        self._last: Inspection | None = None
        self._used: list[Tensor] = []
        self._addresses: list[int] = []
        self._optimizers: list[Any] = []
        self._numbers: list[Any] = []

    def _program(self) -> _T:
        return self._step(self._batch)

    def _inspected(self) -> _T:
        inspection = Inspection(self._device, self._last)
        result = inspection.call(self._program)
        self._last = inspection
        return result

    def _judge(self) -> None:
        """After the warm-up: refuse the step, or keep what has to hold for its recording."""
        last = self._last
        assert last is not None
        if last.fault is not None:
            self._refuse(last.fault)
            return
        self._used = [*last.persistent.values()]
        self._addresses = [*map(Tensor.data_ptr, self._used)]
        self._optimizers = [*last.optimizers.values()]
        self._numbers = [*map(numbers, self._optimizers)]
        self._last = None

    def _holds(self) -> bool:
        return [*map(Tensor.data_ptr, self._used)] == self._addresses and [
            *map(numbers, self._optimizers)
        ] == self._numbers

    def _refuse(self, fault: str) -> None:
        self._fault = printable(fault, 500)
        self._last, self._used = None, []
        level = logging.WARNING if self._capture.reason is None else logging.INFO
        log.log(level, "%s: not captured as a CUDA graph: %s", self._capture.name, self._fault)


def _alike(given: Tensor, fixed: Tensor) -> bool:
    return given.shape == fixed.shape and given.dtype == fixed.dtype


def _flattened(batch: Any) -> tuple[list[Tensor], str]:
    """Its tensors in order, and its structure as text, as `(T, {'boxes': T},)`."""
    tensors: list[Tensor] = []

    def structure(value: Any) -> str:
        if isinstance(value, Tensor):
            tensors.append(value)
            return "T"
        if isinstance(value, list):
            return f"[{', '.join(map(structure, value))}]"
        if type(value) is tuple:
            return f"({', '.join(map(structure, value))},)"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{name!r}: {structure(entry)}" for name, entry in value.items()) + "}"
        raise ValueError(f"batch: expected tensors in nested tuples, lists and dicts, got {type(value).__name__}")

    text = structure(batch)
    if not tensors:
        raise ValueError("batch: expected at least one tensor, got none")
    return tensors, text


def _rebuilt(batch: Any, tensors: Iterator[Tensor]) -> Any:
    """The structure of `batch` with these tensors."""
    if isinstance(batch, Tensor):
        return next(tensors)
    if isinstance(batch, dict):
        return {name: _rebuilt(entry, tensors) for name, entry in batch.items()}
    return type(batch)(_rebuilt(entry, tensors) for entry in batch)
