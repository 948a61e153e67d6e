"""The average is a copy of the model; its weight follows its formula."""

from __future__ import annotations

import math

import torch

from yolov9_fast.engine.ema import ModelEMA
from yolov9_fast.models import create_model


def test_the_weight_follows_the_formula() -> None:
    ema = ModelEMA(create_model("gelan-t", 1))
    for updates in (0, 1, 2, 1000, 10**6):
        ema.updates.fill_(updates)
        assert math.isclose(float(ema.weight()), 1 - 0.9999 * (1 - math.exp(-updates / 2000)), rel_tol=1e-12)


def test_the_average_shares_no_memory_with_the_model_and_needs_no_gradient() -> None:
    model = create_model("gelan-t", 1)
    ema = ModelEMA(model)
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert not ema.model.training
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert float(next(ema.model.parameters()).abs().sum()) > 0
