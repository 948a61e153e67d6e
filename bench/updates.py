"""The cases of the operators that end a training step, on flat buffers as long as the weights of a network."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from yolov9_fast import ops
from yolov9_fast.ops._backend import backend
from yolov9_fast.ops._operator import operators

from .cases import Absent, Case, OpenCase, Runner, Settings, Traffic, named
from .networks import same_weights
from .operators import BACKENDS

_PASSES = {"sgd_update": 4, "adam_update": 5}
"""Buffers, each read and written once."""


def update_cases(settings: Settings) -> Iterator[Case]:
    """Both operators, for the weights of the smallest network, in a full run those of a large one too."""
    for network in ("yolov9-t", "yolov9-c") if settings.full else ("yolov9-t",):
        for name in _PASSES:
            opener = functools.partial(_open, name, network)
            full = f"{name}/{network}/float32/forward"
            yield Case(full, "ops", name, network, "forward", "float32", {"weights": network}, opener)


def _open(name: str, network: str, device: torch.device, settings: Settings) -> OpenCase:
    count = sum(parameter.numel() for parameter in same_weights(network, torch.device("cpu")).parameters())
    generator = torch.Generator().manual_seed(0)
    buffers = [torch.rand(count, generator=generator) for _ in range(_PASSES[name])]
    # Rates of zero: repeated calls leave the weights what they are.
    of_all, of_each = (
        ([1.0, 1e-4, 0.9], [0.0, 5e-4]) if name == "sgd_update" else ([1.0, 1e-4, 0.1, 0.999, 1e-3], [0.0, 1.0, 0.5])
    )
    numbers = torch.tensor(of_all + 3 * of_each).to(device)
    ends = [count // 100, count - count // 100, count]

    def fresh(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [buffer.to(device, dtype, copy=True) for buffer in buffers]

    def reference() -> dict[str, Tensor]:
        exact = fresh(torch.float64)
        options: tuple[Any, ...] = (True,) if name == "sgd_update" else (1e-8, True)
        operators[name].references.update(*exact, numbers.double(), ends, *options)
        return named("buffer", exact)

    def runner(one: str) -> Runner | Absent:
        reason = operators[name].why_not(one)
        if reason is None and one != "eager" and (one == "cpu") != (device.type == "cpu"):
            reason = f"it does not run on {device.type}"
        if reason is not None:
            return Absent(one, "flat", reason)
        own = fresh()

        def update(given: list[Tensor]) -> dict[str, Tensor]:
            with backend(one, op=name):
                getattr(ops, name)(*given, numbers, ends)
            return named("buffer", given)

        return Runner(one, "flat", lambda clock: update(own), lambda: update(fresh()))

    moved = 8.0 * count * len(buffers)
    return OpenCase(map(runner, ("eager", *BACKENDS)), reference, traffic=Traffic(moved, 12.0 * count, moved / 2))
