"""Moving average of weights and BatchNorm statistics: e ← d·e + (1 − d)·w, d = 0.9999·(1 − exp(−n / 2000))."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from yolov9_fast.models import DetectionModel


class ModelEMA:
    """The moving average of a model; `FlatStorage.update` averages in its weights after a step.

    Args:
        source: the trained model; it is copied.
        decay: the final decay.
        time_constant: number of updates after which the decay has reached 63 % of `decay`.

    Attributes:
        model: the average, in evaluation mode and without gradients.
        updates: n, float64, 0-dimensional, on the model's device.
    """

    def __init__(self, source: DetectionModel, decay: float = 0.9999, time_constant: float = 2000.0) -> None:
        self.model = copy.deepcopy(source).eval().requires_grad_(False)
        self.decay = decay
        self.time_constant = time_constant
        self.updates = torch.zeros((), dtype=torch.float64, device=next(source.parameters()).device)

    def weight(self) -> Tensor:
        """1 − d of the present number of updates, float64, 0-dimensional."""
        return 1 - self.decay * (1 - torch.exp(-self.updates / self.time_constant))
