"""Moving average of weights and BatchNorm statistics: e ← d·e + (1 − d)·w, d = 0.9999·(1 − exp(−n / 2000))."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from yolov9_fast.models import DetectionModel


class ModelEMA:
    """The moving average of a model.

    Args:
        source: the trained model; it is copied.
        decay: the final decay.
        time_constant: number of updates after which the decay has reached 63 % of `decay`.

    Attributes:
        model: the average, in evaluation mode and without gradients.
    """

    def __init__(self, source: DetectionModel, decay: float = 0.9999, time_constant: float = 2000.0) -> None:
        self.model = copy.deepcopy(source).eval().requires_grad_(False)
        self.decay = decay
        self.time_constant = time_constant
        self.updates = 0

    def current_decay(self) -> float:
        """d of the update that was last begun."""
        return self.decay * (1 - math.exp(-self.updates / self.time_constant))

    @torch.no_grad()
    def update(self, source: DetectionModel) -> None:
        """Average in the weights of `source` after an optimiser step; its integer buffers are copied."""
        self.updates += 1
        averaged: list[Tensor] = []
        current: list[Tensor] = []
        copies: list[Tensor] = []
        counts: list[Tensor] = []
        own = self.model.state_dict(keep_vars=True)
        for key, value in source.state_dict(keep_vars=True).items():
            floating = value.is_floating_point()
            (averaged if floating else copies).append(own[key])
            (current if floating else counts).append(value)
        torch._foreach_lerp_(averaged, current, 1 - self.current_decay())
        if counts:
            torch._foreach_copy_(copies, counts)
