"""While something traces or transforms a network, the definitions run, whether other code's or the library's own."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import yolov9_fast as yf
from tests.accelerate import official_shaped
from yolov9_fast.losses import DetectionLoss
from yolov9_fast.models import create_model
from yolov9_fast.nn import CSPELAN, SPPELAN, ADown, Conv, DDetect, DetectionOutput
from yolov9_fast.ops._recording import recorded

Flat = Callable[[Tensor], Tensor]


def other_code() -> tuple[nn.Module, nn.Module]:
    """An accelerated model and the same one left alone."""
    torch.manual_seed(0)
    plain = official_shaped.DetectionModel().eval()
    model = copy.deepcopy(plain)
    yf.accelerate(model)
    return model, plain


class Own(nn.Module):
    """Blocks of the library, and the decoding of its head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Conv(3, 8, 3, 8), CSPELAN(8, 16, 8, 4), SPPELAN(16, 16, 4), ADown(16, 16))
        self.head = DDetect([16, 16, 16], 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.layers[:3](x)]
        for _ in range(2):
            maps.append(self.layers[3](maps[-1]))
        return self.head.decode(self.head(maps).main)


def own() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Own().eval()
    return model, model


NETWORKS = {"accelerated": other_code, "own": own}
networks = pytest.mark.parametrize("network", NETWORKS)


def image() -> Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def flat(output: Any) -> Tensor:
    return torch.cat([each.flatten() for each in ([output] if isinstance(output, Tensor) else output)])


def by_jit(model: nn.Module, x: Tensor) -> tuple[Any, str]:
    traced = torch.jit.trace(model, x, check_trace=False)
    return traced(x), str(traced.inlined_graph)


def by_make_fx(model: nn.Module, x: Tensor) -> tuple[Any, str]:
    traced = make_fx(model)(x)
    return traced(x), traced.code


def by_export(model: nn.Module, x: Tensor) -> tuple[Any, str]:
    program = torch.export.export(model, (x,), strict=False)
    return program.module()(x), str(program.graph)


@networks
@pytest.mark.parametrize(
    ("trace", "gradients"),
    [
        (by_jit, True),
        (by_jit, False),
        (by_make_fx, True),
        pytest.param(by_make_fx, False, marks=pytest.mark.slow),
        pytest.param(by_export, True, marks=pytest.mark.slow),
        pytest.param(by_export, False, marks=pytest.mark.slow),
    ],
)
def test_a_trace_holds_operators_of_pytorch_alone(network: str, trace: Any, gradients: bool) -> None:
    model, plain = NETWORKS[network]()
    with torch.set_grad_enabled(gradients):
        with yf.backend("eager"):
            expected = flat(plain(image()))
        output, text = trace(model, image())
    torch.testing.assert_close(flat(output), expected, rtol=1e-4, atol=1e-4)
    assert "yolov9_fast::" not in text
    assert "yolov9_fast." not in text.replace("__torch__.yolov9_fast.", "")


def test_a_script_is_compiled_from_the_forward_of_the_class() -> None:
    model, plain = other_code()
    layer, x = torch.jit.script(model.model[0]), image()
    assert torch.equal(layer(x), plain.model[0](x))


def test_symbolic_tracing_ends() -> None:
    model, plain = other_code()
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("symbolic tracing does not end"))
    signal.alarm(60)
    try:
        torch.testing.assert_close(flat(torch.fx.symbolic_trace(model)(image())), flat(plain(image())))
        layers = Own().eval().layers
        torch.testing.assert_close(torch.fx.symbolic_trace(layers)(image()), layers(image()))
        with pytest.raises(TypeError, match=r"images: expected a tensor, got Proxy; .*torch.export"):
            torch.fx.symbolic_trace(create_model("gelan-t", 3))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@networks
def test_transforms_of_torch_func(network: str) -> None:
    model, plain = NETWORKS[network]()
    x, direction = image(), torch.ones(1, 3, 64, 64)

    def value(network: nn.Module) -> Flat:
        return lambda image: flat(network(image)).square().mean()

    with yf.backend("eager"):
        expected = torch.func.grad(value(plain))(x), torch.func.jvp(value(plain), (x,), (direction,))
        mapped = torch.func.vmap(lambda one: flat(plain(one[None])))(x)
    torch.testing.assert_close(torch.func.grad(value(model))(x), expected[0])
    torch.testing.assert_close(torch.func.jvp(value(model), (x,), (direction,)), expected[1])
    torch.testing.assert_close(torch.func.vmap(lambda one: flat(model(one[None])))(x), mapped)
    with forward_ad.dual_level():
        dual = value(model)(forward_ad.make_dual(x, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected[1][1])
    parameters = dict(model.named_parameters())
    gradients = torch.func.grad(lambda values: flat(torch.func.functional_call(model, values, (x,))).mean())(parameters)
    assert gradients.keys() == parameters.keys()


def test_the_gradient_of_the_own_loss_by_torch_func() -> None:
    maps = [torch.rand(1, 64 + 3, size, size) for size in (8, 4, 2)]
    targets = torch.tensor([[0.0, 1.0, 0.5, 0.5, 0.4, 0.4]])
    loss = DetectionLoss(3)

    def total(maps: list[Tensor]) -> Tensor:
        return loss(DetectionOutput(maps), targets, 64).total

    expected = [each.clone().requires_grad_() for each in maps]
    total(expected).backward()
    torch.testing.assert_close(torch.func.grad(total)(maps), [each.grad for each in expected], rtol=1e-3, atol=1e-5)


def test_a_subclass_of_tensor_and_a_fake_tensor_run_the_definition() -> None:
    class Logged(Tensor):
        pass

    model, plain = other_code()
    torch.testing.assert_close(
        flat([each.as_subclass(Tensor) for each in model(image().as_subclass(Logged))]), flat(plain(image()))
    )
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert [each.shape for each in model(mode.from_tensor(image()))] == [each.shape for each in plain(image())]
    assert [each.shape for each in copy.deepcopy(model).to("meta")(image().to("meta"))]
    assert not recorded()
