"""The devices of this machine and the backends that run on each, as parameters of tests.

A test that takes `device`, by the fixture of that name or beside a backend's name from `backends`, runs on each device
with tensors made there. Its cases on a GPU carry the marker `gpu`: `pytest -m gpu` runs them alone.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from yolov9_fast.ops import _backend
from yolov9_fast.ops._operator import Operator

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def devices() -> list[Any]:
    """`DEVICES` as parameters; those of a GPU are marked."""
    return [pytest.param(device, marks=_marks(device)) for device in DEVICES]


def backends(operator: Operator[Any], *, eager: bool = True, interpreted: bool = True) -> list[Any]:
    """(backend, device) for every implementation of `operator`; what cannot run on this machine is skipped, with why.

    `eager`: with the definition. `interpreted`: with interpreted Triton on the CPU, where `TRITON_INTERPRET=1` is set.
    """
    parameters = []
    for device in DEVICES:
        for name in operator.implementations:
            runs = device in _backend.backends[name].devices
            if name == "triton" and device == "cpu":
                runs = interpreted and os.environ.get("TRITON_INTERPRET") == "1"
            if not runs or (name == "eager" and not eager):
                continue
            reason = operator.why_not(name)
            skip = pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}")
            parameters.append(pytest.param(name, device, marks=[skip, *_marks(device)]))
    return parameters


def _marks(device: str) -> list[Any]:
    return [pytest.mark.gpu] if device == "cuda" else []
