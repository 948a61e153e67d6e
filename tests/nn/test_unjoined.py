"""A network that reads the parts of a Concat in place: any layer that was replaced runs as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import yolov9_fast as yf
from yolov9_fast.models import DetectionModel, create_model
from yolov9_fast.nn import Concat, Upsample
from yolov9_fast.ops._bn_silu import OPERATOR

pytestmark = pytest.mark.skipif(not OPERATOR.has_kernels(torch.device("cpu")), reason="no compiled bn_silu")


class Sine(Concat):
    def forward(self, inputs: list[Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(inputs).sin()


class Joining(nn.Module):
    """Takes one map, as a block of other code would."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x.sin())
        return y


def concat(model: DetectionModel) -> None:
    index = next(i for i in model._unjoined if isinstance(model.model[i], Concat))
    model.model[index] = Sine()


def upsample(model: DetectionModel) -> None:
    index = next(i for i in model._unjoined if isinstance(model.model[i], Upsample))
    model.model[index] = nn.Upsample(scale_factor=2, mode="bilinear")


def forward_of_an_instance(model: DetectionModel) -> None:
    index = next(i for i in model._unjoined if isinstance(model.model[i], Upsample))
    own = model.model[index].forward
    model.model[index].forward = lambda x: own(x).sin()  # type: ignore[method-assign]


def reader(model: DetectionModel) -> None:
    layers = model.graph.layers
    index = next(
        i for i, layer in enumerate(layers) if set(layer.sources) & model._unjoined and i not in model._unjoined
    )
    model.model[index] = Joining(model.model[index])


@pytest.mark.parametrize("change", [concat, upsample, forward_of_an_instance, reader])
def test_a_replaced_layer_runs(change: Callable[[DetectionModel], None], device: str) -> None:
    torch.manual_seed(0)
    model = create_model("gelan-t", 3).to(device).train().double()
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64, device=device)

    def maps() -> Tensor:
        return torch.cat([each.flatten() for each in model.raw(x).main])

    before = maps()
    change(model)
    with yf.backend("eager"):
        expected = maps()
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(maps(), expected, rtol=1e-5, atol=1e-6)
