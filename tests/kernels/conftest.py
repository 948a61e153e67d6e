"""Tests of kernels change what launchers read besides their arguments: each starts and ends without notes of calls."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_notes_of_calls() -> Iterator[None]:
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from yolov9_fast.kernels import replay

    replay.forget()
    yield
    replay.forget()
