"""A plugin of pytest: a GPU is there, so Triton is not interpreted; its tensors are the test's own matter."""

from __future__ import annotations

import os

import torch

os.environ.pop("TRITON_INTERPRET", None)
torch.cuda.is_available = lambda: True
