"""From how large a map on a block is worth its Python on a GPU: what "auto" asks where no CUDA graph is captured.

A fused block moves fewer bytes, but its Python costs the host more time than that of PyTorch's own layers. Where the
loop is not captured, a block whose saved bytes are worth less than that time would make it slower, so its definition
runs. While a CUDA graph is captured Python's time is free, and every block runs fused; so it does under a backend that
is set by name. The numbers are predicted, not measured on a GPU: bytes from the passes that `ops/_bn_silu.py` counts,
the host's time with a driver that launches nothing (`python -m tests.fake_cuda.host_time --units`).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from yolov9_fast._capture import as_recorded
from yolov9_fast._numbers import finite_number
from yolov9_fast.errors import UserError

BYTES_PER_SECOND = 3.35e12
"""Of the memory of an H100. A GPU with less saves more time by the same bytes."""
TRAINING, INFERENCE = (60.0, 5), (30.0, 2)
"""For one unit, forward and backward or folded: microseconds of the host that it costs more than PyTorch's layers, and
passes over its map that it saves."""
VARIABLE = "YOLOV9_FAST_HOST_MICROSECONDS"
"""The microseconds of a unit, instead of these; 0: every block is worth it."""


def least_bytes(gradients: bool) -> float:
    """Bytes of a map from which on a block is worth its Python, with or without gradients.

    Raises `UserError` for a variable that is no number of at least 0.
    """
    microseconds, passes = TRAINING if gradients else INFERENCE
    text = os.environ.get(VARIABLE, "").strip()
    if text:
        given = finite_number(text)
        if given is None or given < 0:
            raise UserError(f"{VARIABLE}: expected microseconds, 0 or more, got {text!r}")
        microseconds = given
    return microseconds * 1e-6 * BYTES_PER_SECOND / passes


def is_captured(x: Tensor) -> bool:
    """Whether what runs on the GPU of `x` is recorded as a CUDA graph, or warms up what will be (`_capture.py`)."""
    return x.is_cuda and (as_recorded.get() or torch.cuda.is_current_stream_capturing())
