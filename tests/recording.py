"""A recorder without a GPU: what a CUDA graph does, by noting the operations of a program and repeating them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_T = TypeVar("_T")
_NOT_REPEATED = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::set_")
"""Memory and where a tensor lies in it: a graph has them once."""

_WRITTEN_UNSAID = ("running_mean", "running_var")
"""Arguments of `native_batch_norm`, whose schema does not say that it writes them."""


def record(program: Callable[[], _T]) -> tuple[Callable[[], None], _T]:
    """For `Capture(record=...)`, on any device."""
    recording = Recording()
    with recording:
        results = program()
    return recording.replay, results


class Recording(TorchDispatchMode):
    """Notes the operations inside a `with` block with their tensors; `replay` repeats them into the same memory.

    As while a CUDA graph is captured nothing has happened after the block: tensors from before have their values
    again, and what was made inside holds no result before the first replay. Numbers of Python are those of the block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Any, Any]] = {}

    def __enter__(self) -> Any:
        self._state = torch.get_rng_state()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_rng_state(self._state)
        self.undo()
        for *_, made in self.calls:
            for tensor in made:
                tensor.untyped_storage().fill_(255)  # NaN, -1

    def undo(self) -> None:
        """Give the storages that were written to their values of before the block."""
        for storage, before in self._before.values():
            storage.copy_(before)
        self._before.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _written(func._schema, args, kwargs):
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            if storage.nbytes() and place not in self._made and place not in self._before:
                with _disable_current_modes():  # what traces outside this block needs none of it
                    self._before[place] = storage, storage.clone()
        result = func(*args, **kwargs)
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
        made = [tensor for tensor in tensors(result) if tensor.untyped_storage().data_ptr() not in given]
        if made or func._schema.is_mutable:
            self.calls.append((func, args, kwargs, made))
            self._made |= {tensor.untyped_storage().data_ptr() for tensor in made}
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, made in self.calls:
                if func.name().split(".")[0] in _NOT_REPEATED:
                    continue
                given = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
                again = [x for x in tensors(func(*args, **kwargs)) if x.untyped_storage().data_ptr() not in given]
                for old, new in zip(made, again, strict=True):
                    old.copy_(new)

    def reset(self) -> None:
        self.calls.clear()


def _written(schema: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    if schema.name == "aten::native_batch_norm":  # its schema does not say so
        yield from tensors(args[3:5])
    for position, argument in enumerate(schema.arguments):
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written or argument.name in _WRITTEN_UNSAID:
            yield from tensors(args[position] if position < len(args) else kwargs.get(argument.name))


def tensors(value: Any) -> Iterator[Tensor]:
    """Those in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from tensors(entry)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
