"""Whether a call of a step does what a CUDA graph can repeat: its operations are looked at, on a CPU as on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_T = TypeVar("_T")
_TORCH = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parents[1])
_READS = {getattr(Tensor, name): name for name in ("tolist", "numpy", "__array__")}
"""Read memory of the host without an operation, or with one that is a copy."""
_MASKED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
_SHOWN = 80


class Inspection:
    """What one call of a step did.

    Attributes:
        fault: the first thing that a graph cannot repeat, with its operation and place; None without one.
        persistent: tensors from before the call that it used, each once.
        optimizers: those that took a step.
    """

    def __init__(self, device: torch.device, before: Inspection | None = None) -> None:
        self.device, self.before = device, before
        self.fault: str | None = None
        self.persistent: dict[int, Tensor] = {}
        self.optimizers: dict[int, Optimizer] = {}
        self._operations: list[tuple[str, Any, list[int], str]] = []
        self._made: dict[int, StorageWeakRef] = {}
        self._reading = 0

    def call(self, step: Callable[[], _T]) -> _T:
        """What `step()` gives; once for each instance."""

        def stepped(optimizer: Optimizer, *_: Any) -> None:
            self.optimizers[id(optimizer)] = optimizer

        hook = register_optimizer_step_pre_hook(stepped)
        try:
            with _Functions(self), _Operations(self):
                result = step()
        finally:
            hook.remove()
        if self.before is not None:
            self._compare(self.before)
            self.before = None
        return result

    def note(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation and look at it."""
        name = func.name().split(".")[0]
        given = [*_tensors((args, kwargs))]
        fault = self._fault_of(func, name, args, kwargs, given)
        if fault is not None:
            self._found(fault)
        result = func(*args, **kwargs)
        if name.startswith("prim::"):
            return result
        addresses, known = [], set()
        for tensor in given:
            storage = tensor.untyped_storage()
            known.add(storage._cdata)
            if storage._cdata in self._made:
                continue
            addresses.append(tensor.data_ptr())
            self.persistent.setdefault(id(tensor), tensor)
            if self.before is not None and storage._cdata in self.before._made:
                self._found(
                    f"a tensor is made anew in each call and read in the next ({name}); write into one with copy_()"
                )
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in known and storage._cdata not in self._made:
                self._made[storage._cdata] = StorageWeakRef(storage)
        self._operations.append((name, _described((args, kwargs)), addresses, _place()))
        return result

    def read(self, name: str, call: Callable[[], _T]) -> _T:
        """A read of memory by Python, as `Tensor.tolist`."""
        self._found(f"a value is read on the host (Tensor.{name})")
        return call()

    def _fault_of(self, func: Any, name: str, args: Any, kwargs: Any, given: list[Tensor]) -> str | None:
        if name in ("aten::_local_scalar_dense", "aten::equal"):
            return f"a value is read on the host ({name}, as by .item(), float() or `if`)"
        operator = name.removeprefix("aten::")
        if operator in _MASKED:
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            if masks and not (operator.lstrip("_").startswith("index_put") and args[2].numel() == 1):
                return f"a shape depends on values ({name} with a mask; torch.where has no such shape)"
        elif torch.Tag.dynamic_output_shape in func.tags:
            return f"a shape depends on values ({name})"
        devices = {tensor.device.type for tensor in given if tensor.dim() or name in ("aten::copy_", "aten::_to_copy")}
        if kwargs.get("device") is not None and given:
            devices.add(torch.device(kwargs["device"]).type)
        if len(devices - {"meta"}) > 1:
            return f"something is copied between {' and '.join(sorted(devices))} ({name})"
        of_host = given and self.device.type != "cpu" and given[0].device.type == "cpu"
        if of_host and func._schema.is_mutable and given[0].untyped_storage()._cdata not in self._made:
            return f"a tensor of the host is changed ({name})"
        return None

    def _found(self, fault: str) -> None:
        if self.fault is None:
            self.fault = fault + _place()

    def _compare(self, before: Inspection) -> None:
        if self.fault is not None:
            return
        for own, other in zip(self._operations, before._operations, strict=False):
            (name, arguments, addresses, place), (old_name, old_arguments, old_addresses, _) = own, other
            if name != old_name:
                self.fault = f"the operations differ from call to call: {name} where {old_name} was{place}"
            elif arguments != old_arguments:
                new, old = _difference(arguments, old_arguments)
                self.fault = f"what {name} gets differs from call to call: {old}, then {new}{place}"
            elif addresses != old_addresses:
                self.fault = f"a tensor that {name} uses lies elsewhere than in the call before{place}"
            if self.fault is not None:
                return
        lengths = len(before._operations), len(self._operations)
        if lengths[0] != lengths[1]:
            self.fault = f"the number of operations differs from call to call: {lengths[0]}, then {lengths[1]}"


class _Operations(TorchDispatchMode):
    def __init__(self, inspection: Inspection) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inspection = inspection

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.inspection.note(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    def __init__(self, inspection: Inspection) -> None:
        super().__init__()
        self.inspection = inspection

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _READS.get(func)
        if name is None:
            return func(*args, **kwargs)
        return self.inspection.read(name, lambda: func(*args, **kwargs))


def numbers(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What the groups of an optimiser hold that is no tensor: a graph keeps it as it was."""
    return [
        {name: value for name, value in group.items() if not any(True for _ in _tensors(value))}
        for group in optimizer.param_groups
    ]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)


def _described(value: Any) -> Any:
    """Comparable: of tensors shape, strides, dtype and device, of other things themselves."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, str(value.device)
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    if isinstance(value, dict):
        return tuple((name, _described(entry)) for name, entry in value.items())
    return repr(value) if isinstance(value, float) else value if isinstance(value, _PLAIN) else type(value).__name__


_PLAIN = (bool, int, str, complex, torch.dtype, torch.device, torch.memory_format, torch.layout, type(None))


def _difference(new: Any, old: Any) -> tuple[str, str]:
    """The first parts that differ, as text."""
    if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
        for one, other in zip(new, old, strict=True):
            if one != other:
                return _difference(one, other)
    return str(new)[:_SHOWN], str(old)[:_SHOWN]


def _place() -> str:
    """ " at FILE:LINE" of the innermost caller that is neither torch nor this package; "" where there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH, _OWN, "<")) and "contextlib" not in name and "functools" not in name:
            return f", at {name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
