"""Limits that hold while a network is built: a graph of a few lines can ask for more than any machine has."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from yolov9_fast.limits import above_limit, limit


@contextmanager
def build_limits(modules: int | None = None) -> Iterator[None]:
    """Within it, this thread cannot build more than `modules` modules and `limit("PARAMETERS")` parameters.

    A parameter is counted before numbers are drawn for it, so that its memory is not touched yet.

    Args:
        modules: None takes `limit("MODULES")`.

    Raises:
        ValueError: the next module or parameter would be above a limit.
    """
    most, parameters, thread = modules or limit("MODULES"), limit("PARAMETERS"), threading.get_ident()
    counts = [0, 0]

    def count_module(*_: object) -> None:
        if threading.get_ident() == thread:
            counts[0] += 1
            if counts[0] > most:
                said = above_limit("MODULES") if modules is None else f"expected at most {most:,} modules, got more"
                raise ValueError(said)

    def count_parameter(_: object, name: str, parameter: Any) -> None:
        if threading.get_ident() == thread and parameter is not None:
            counts[1] += parameter.numel()
            if counts[1] > parameters:
                raise ValueError(above_limit("PARAMETERS"))

    hooks = [
        register_module_module_registration_hook(count_module),
        register_module_parameter_registration_hook(count_parameter),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
