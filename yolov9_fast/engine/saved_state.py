"""Checks of a training state that was read from a file, before anything of it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_LARGEST = 2**53
_SMALLEST = {
    "epoch": -1,
    "iteration": 0,
    "last_step": -1,
    "warmup_iterations": 0,
    "best_epoch": -1,
    "skipped_steps": 0,
    "ema_updates": 0,
}
"""Whole numbers, each with the smallest that it can be."""


def check_plain_values(saved: Mapping[str, Any]) -> None:
    """Check counters, texts and tables.

    Raises:
        ValueError: one is missing or of another kind; names it.
    """
    for name, smallest in _SMALLEST.items():
        value = _entry(saved, name)
        if type(value) is not int or not smallest <= value < _LARGEST:
            raise ValueError(f"{name}: expected an integer of at least {smallest}, got {_kind(value)}")
    for name, kind in (("stopped", str), ("finished", bool), ("rows", str), ("data", str)):
        if not isinstance(_entry(saved, name), kind):
            raise ValueError(f"{name}: expected {kind.__name__}, got {_kind(saved[name])}")
    if not _is_number(_entry(saved, "best_fitness")):
        raise ValueError(f"best_fitness: expected a number, got {_kind(saved['best_fitness'])}")
    rows = _json(saved, "rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("rows: expected a list of mappings")
    for row in rows:
        for column, value in row.items():
            if not (value is None or _is_number(value)):
                raise ValueError(f"rows: {column[:100]}: expected a number, got {_kind(value)}")
    if not isinstance(_json(saved, "data"), dict):
        raise ValueError("data: expected a mapping")


def check_tensors(
    saved: Mapping[str, Any], own: Mapping[str, Any], parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Compare networks, optimiser, scaler and gradients with those that they are to replace.

    Args:
        saved: the state that was read.
        own: `TrainingState.capture()` of the run that it is for.
        parameters: of the network.
        optimizer: of the run.

    Raises:
        ValueError: they differ in names, shapes or kinds; names the first that does.
    """
    for name in ("model", "ema"):
        _check_same(_entry(saved, name), own[name], name)
    # Another device may have another form of mixed precision, and then other entries.
    scaler = _entry(saved, "scaler")
    if not isinstance(scaler, dict) or not all(isinstance(k, str) and _is_number(v) for k, v in scaler.items()):
        raise ValueError(f"scaler: expected a mapping of numbers, got {_kind(scaler)}")
    _check_optimizer(_entry(saved, "optimizer"), own["optimizer"], optimizer)
    gradients = _entry(saved, "gradients")
    if not isinstance(gradients, list) or len(gradients) != len(parameters):
        raise ValueError(f"gradients: expected a list of {len(parameters)}, got {_kind(gradients)}")
    for number, (gradient, parameter) in enumerate(zip(gradients, parameters, strict=True)):
        if gradient is not None:
            _check_same(gradient, parameter, f"gradients[{number}]")
    _check_same(_entry(saved, "torch_rng"), own["torch_rng"], "torch_rng")


def _check_optimizer(saved: Any, own: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        raise ValueError(f"optimizer: expected a mapping with a state, got {_kind(saved)}")
    _check_same(saved.get("param_groups"), own["param_groups"], "optimizer: param_groups")
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in saved["state"].items():
        if type(index) is not int or not 0 <= index < len(shapes) or not isinstance(values, dict):
            raise ValueError(f"optimizer: state: expected mappings for its {len(shapes)} parameters, got {index!r:.50}")
        for name, value in values.items():
            fits = isinstance(value, Tensor) and (value.numel() == 1 or value.shape == shapes[index])
            if not isinstance(name, str) or not (fits or value is None or _is_number(value)):
                expected = f"a tensor {list(shapes[index])}"
                raise ValueError(
                    f"optimizer: state: {index}: {str(name)[:50]}: expected {expected}, got {_kind(value)}"
                )


def _check_same(saved: Any, own: Any, place: str) -> None:
    """Same keys, lengths, shapes and kinds; true and false may also be None."""
    if isinstance(own, Tensor):
        if not isinstance(saved, Tensor) or saved.dtype != own.dtype:
            raise ValueError(f"{place}: expected a tensor of {own.dtype}, got {_kind(saved)}")
        if saved.shape != own.shape:
            raise ValueError(f"{place} has shape {list(saved.shape)}, expected {list(own.shape)}")
    elif isinstance(own, Mapping):
        if not isinstance(saved, Mapping):
            raise ValueError(f"{place}: expected a mapping, got {_kind(saved)}")
        for key in [*own, *saved]:
            if key not in saved or key not in own:
                raise ValueError(f"{place}: {str(key)[:100]} is {'missing' if key in own else 'unexpected'}")
        for key, value in own.items():
            _check_same(saved[key], value, f"{place}: {key}")
    elif isinstance(own, list | tuple):
        if not isinstance(saved, list | tuple) or len(saved) != len(own):
            raise ValueError(f"{place}: expected a list of {len(own)}, got {_kind(saved)}")
        for value, expected in zip(saved, own, strict=True):
            _check_same(value, expected, place)
    elif not any(kind(saved) and kind(own) for kind in (_is_number, _is_switch, _is_text)):
        raise ValueError(f"{place}: expected {_kind(own)}, got {_kind(saved)}")


def _entry(saved: Mapping[str, Any], name: str) -> Any:
    if name not in saved:
        raise ValueError(f"{name} is missing")
    return saved[name]


def _json(saved: Mapping[str, Any], name: str) -> Any:
    try:
        return json.loads(saved[name])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected JSON") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < _LARGEST)


def _is_switch(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    if isinstance(value, list | tuple | dict):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
