"""How many kernels the launcher of a Triton operator launches: it is called on meta tensors and launches nothing."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
import yolov9_fast.kernels
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bench.counting import works

CAPABILITY = 90


class _Works(TorchDispatchMode):
    """Counts operators of torch that do work."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += works(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


def number(operator: str, args: Any) -> int:
    """Kernels of one call of `operator`, such as "yolov9_fast::bn_silu_forward_triton", torch's own included."""
    return _number(operator, _described(args))


@functools.cache
def _number(operator: str, described: Any) -> int:
    from yolov9_fast.kernels.launch import recording

    launcher = _launchers()[operator.removeprefix("yolov9_fast::").removesuffix("_triton")]
    with _disable_current_modes():
        given = _on_meta(described)
        with recording(CAPABILITY) as seen, _Works() as others:
            launcher(*given)
    return len(seen) + others.number


@functools.cache
def _launchers() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}
    for info in pkgutil.iter_modules(yolov9_fast.kernels.__path__):
        module = importlib.import_module(f"yolov9_fast.kernels.{info.name}")
        own = vars(module).items()
        found.update({name: value for name, value in own if getattr(value, "__module__", "") == module.__name__})
    return found


def _described(value: Any) -> Any:
    """Hashable, tensors by what launchers look at."""
    if isinstance(value, Tensor):
        return _Tensor((tuple(value.shape), value.stride(), value.dtype, value.storage_offset()))
    return tuple(map(_described, value)) if isinstance(value, (list, tuple)) else value


class _Tensor(tuple[Any, ...]):
    """Shape, strides, dtype and offset."""


def _on_meta(value: Any) -> Any:
    if isinstance(value, _Tensor):
        shape, stride, dtype, offset = value
        last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        return torch.empty(offset + last + 1, dtype=dtype, device="meta").as_strided(shape, stride, offset)
    return [_on_meta(entry) for entry in value] if isinstance(value, tuple) else value
