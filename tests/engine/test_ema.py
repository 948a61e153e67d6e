"""The average of weights follows its formula, BatchNorm statistics included."""

from __future__ import annotations

import math

import torch

from yolov9_fast.engine.ema import ModelEMA
from yolov9_fast.models import create_model


def test_two_updates_follow_the_formula() -> None:
    model = create_model("gelan-t", 1)
    ema = ModelEMA(model)
    key, buffer = "model.0.conv.weight", "model.0.bn.running_mean"
    expected = {k: model.state_dict()[k].clone() for k in (key, buffer)}
    for update in (1, 2):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(1)
        ema.update(model)
        decay = 0.9999 * (1 - math.exp(-update / 2000))
        for name in expected:
            expected[name] = decay * expected[name] + (1 - decay) * model.state_dict()[name]
    for name, value in expected.items():
        torch.testing.assert_close(ema.model.state_dict()[name], value)
    assert int(ema.model.state_dict()["model.0.bn.num_batches_tracked"]) == 2


def test_the_average_shares_no_memory_with_the_model_and_needs_no_gradient() -> None:
    model = create_model("gelan-t", 1)
    ema = ModelEMA(model)
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert not ema.model.training
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert float(next(ema.model.parameters()).abs().sum()) > 0
