"""conv1x1: products of slices and of several maps against eager and float64, on every backend, with all gradients."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import yolov9_fast as yf
from tests.devices import backends
from tests.ops.feature_maps import (
    DTYPES,
    LAYOUTS,
    assert_as_exact_as_eager,
    feature_map,
    float32_precision,
    outputs_and_gradients,
    threads,
)
from yolov9_fast.ops._conv1x1 import (
    OPERATOR,
    PAIR,
    conv1x1_pair_reference,
    conv1x1_reference,
    matrix_forward,
    matrix_input_grad,
    matrix_weight_grad,
)

BACKENDS = backends(OPERATOR)
KERNELS = backends(OPERATOR, eager=False, interpreted=False)
needs_cpu = pytest.mark.skipif(OPERATOR.why_not("cpu") is not None, reason=str(OPERATOR.why_not("cpu")))


def weight_of(
    outputs: int, inputs: int, dtype: torch.dtype = torch.float32, seed: int = 5, device: str = "cpu"
) -> Tensor:
    values = torch.randn(outputs, inputs, 1, 1, generator=torch.Generator().manual_seed(seed)).to(device) / inputs**0.5
    return values.to(dtype).requires_grad_()


def conv(weight: Tensor, bias: Tensor, *maps: Tensor) -> Tensor:
    return yf.ops.conv1x1(maps, weight, bias)


def pair(x: Tensor, weight1: Tensor, weight2: Tensor) -> tuple[Tensor, Tensor]:
    return yf.ops.conv1x1_pair(x, weight1, weight2)


def skip_what_cannot_be(name: str, dtype: torch.dtype) -> None:
    if name == "cpu" and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("computes in float32 and float64")
    if name == "triton" and dtype == torch.float64:
        pytest.skip("computes in float32")


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_values_counted_by_hand(name: str, device: str) -> None:
    first, second = (
        torch.tensor([1.0, 2.0], device=device).reshape(1, 2, 1, 1),
        torch.tensor([10.0], device=device).reshape(1, 1, 1, 1),
    )
    weight = torch.tensor([[1.0, 1.0, 1.0], [3.0, -1.0, 0.5]], device=device).reshape(2, 3, 1, 1)
    with yf.backend(name):
        out = yf.ops.conv1x1([first, second], weight, torch.tensor([0.5, -6.0], device=device))
    assert out.flatten().tolist() == [13.5, 0.0]


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [(16,), (5, 3), (33, 17, 18)])
def test_as_exact_as_eager(name: str, device: str, layout: str, dtype: torch.dtype, channels: tuple[int, ...]) -> None:
    skip_what_cannot_be(name, dtype)
    maps = [feature_map(2, c, 5, 7, seed=c, layout=layout, dtype=dtype, sliced=True, device=device) for c in channels]
    bias = torch.linspace(-1, 1, 21, device=device).to(dtype).requires_grad_()
    assert_as_exact_as_eager(name, conv, [weight_of(21, sum(channels), dtype, device=device), bias, *maps])


@pytest.mark.parametrize(("name", "device"), KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("outputs", [1, 7, 16, 24, 48, 64, 65, 130])
def test_every_tile_of_the_product(name: str, device: str, layout: str, outputs: int) -> None:
    for inputs in (1, 16, 31, 48, 64, 100):
        maps = [feature_map(1, inputs, 10, 13, seed=inputs, layout=layout, sliced=True, device=device)]
        bias = torch.ones(outputs, requires_grad=True, device=device)
        assert_as_exact_as_eager(name, conv, [weight_of(outputs, inputs, device=device), bias, *maps])


@needs_cpu
def test_two_thousand_random_shapes() -> None:
    draw = random.Random(0)
    for case in range(2000):
        layout, dtype = draw.choice(list(LAYOUTS)), draw.choice([torch.float32, torch.float64])
        channels = [draw.choice([1, 2, 5, 16, 17, 40]) for _ in range(draw.randint(1, 3))]
        shape = (draw.randint(1, 2), draw.randint(1, 6), draw.randint(1, 6))
        maps = [
            feature_map(shape[0], c, *shape[1:], seed=case + i, layout=layout, dtype=dtype, sliced=draw.random() < 0.5)
            for i, c in enumerate(channels)
        ]
        outputs = draw.choice([1, 3, 16, 33])
        arguments = [weight_of(outputs, sum(channels), dtype), torch.zeros(outputs, dtype=dtype, requires_grad=True)]
        eager = outputs_and_gradients("eager", conv, [*arguments, *maps])
        mine = outputs_and_gradients("cpu", conv, [*arguments, *maps])
        tolerance = 1e-12 if dtype == torch.float64 else 2e-5
        for a, b in zip(eager[0] + eager[1], mine[0] + mine[1], strict=True):
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, msg=f"case {case}")


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pair_is_two_convolutions(name: str, device: str, layout: str) -> None:
    x = feature_map(2, 24, 6, 5, layout=layout, sliced=True, device=device)
    assert_as_exact_as_eager(
        name, pair, [x, weight_of(12, 24, seed=1, device=device), weight_of(20, 24, seed=2, device=device)]
    )


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_slot_is_written_where_it_lies_and_nothing_beside_it(name: str, device: str, layout: str) -> None:
    x, weight = feature_map(2, 5, 4, 3, layout=layout, device=device), weight_of(6, 5, device=device)
    buffer = yf.ops.ConcatBuffer.like(x, (3, 6, 2))
    edges = [buffer.slot(0).fill_(float("nan")), buffer.slot(2).fill_(float("nan"))]
    slot = buffer.slot(1).fill_(float("nan"))
    with yf.backend(name):
        out = yf.ops.conv1x1(x, weight, out=slot)
    assert out.data_ptr() == slot.data_ptr()
    assert all(edge.isnan().all() for edge in edges)
    expected = conv1x1_reference([x], weight)
    torch.testing.assert_close(out, expected)
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), (x, weight)),
        torch.autograd.grad(expected.square().sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [(16,), (5, 3)])
def test_library_products_on_views_are_the_convolution(channels: tuple[int, ...]) -> None:
    """What runs on CUDA, here on the CPU: the same calls, no copies."""
    maps = [feature_map(2, c, 4, 6, seed=c, sliced=True).detach() for c in channels]
    weight, bias = weight_of(7, sum(channels)).detach(), torch.linspace(-1, 1, 7)
    whole = torch.cat(maps, 1).requires_grad_()
    copy = weight.clone().requires_grad_()
    expected = F.conv2d(whole, copy, bias)
    out = torch.empty_like(expected)
    matrix_forward(maps, weight, bias, out)
    torch.testing.assert_close(out, expected)
    dy = feature_map(2, 7, 4, 6, sliced=True).detach()
    expected.backward(dy)
    assert whole.grad is not None
    assert copy.grad is not None
    torch.testing.assert_close(torch.cat(matrix_input_grad(dy, weight, list(channels)), 1), whole.grad)
    torch.testing.assert_close(matrix_weight_grad(dy, maps), copy.grad)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("size", [(0, 2, 2), (2, 1, 1), (2, 1, 2), (2, 2, 1), (1, 2, 2)])
def test_library_products_beside_maps_of_one_channel_or_pixel(
    channels: int, outputs: int, size: tuple[int, ...]
) -> None:
    """Such maps have both layouts, so what is made like them may be contiguous."""
    batch, height, width = size
    x, dy = torch.randn(batch, channels, height, width), torch.randn(batch, outputs, height, width)
    weight, out = torch.randn(outputs, channels, 1, 1), torch.empty_like(dy)
    matrix_forward([x], weight, None, out)
    torch.testing.assert_close(out, F.conv2d(x, weight))
    torch.testing.assert_close(matrix_input_grad(dy, weight, [channels])[0], F.conv2d(dy, weight.transpose(0, 1)))
    expected = torch.einsum("bohw,bchw->oc", dy, x)[:, :, None, None]
    torch.testing.assert_close(matrix_weight_grad(dy, [x]), expected)


@needs_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bits_do_not_depend_on_the_number_of_threads(layout: str) -> None:
    maps = [feature_map(3, c, 23, 31, seed=c, layout=layout) for c in (40, 24)]
    arguments = [weight_of(70, 64), torch.ones(70, requires_grad=True), *maps]
    with threads(1):
        one = outputs_and_gradients("cpu", conv, arguments)
    with threads(2):
        two = outputs_and_gradients("cpu", conv, arguments)
    del one[1][1], two[1][1]  # the bias' gradient is a sum of the framework's
    assert all(torch.equal(a, b) for a, b in zip(one[0] + one[1], two[0] + two[1], strict=True))


@needs_cpu
def test_the_weight_gradient_of_many_pixels_keeps_its_digits() -> None:
    x = (1 + 0.01 * feature_map(4, 8, 128, 128).detach()).requires_grad_()
    weight, bias = weight_of(8, 8), torch.zeros(8, requires_grad=True)
    assert_as_exact_as_eager("cpu", conv, [weight, bias, x])


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_mixed_layouts_and_odd_strides_are_read(name: str, device: str) -> None:
    odd = feature_map(2, 4, 6, 12, seed=3, device=device)[..., ::2].detach().requires_grad_()
    maps = [
        feature_map(2, 3, 6, 6, seed=1, device=device),
        odd,
        feature_map(2, 2, 6, 6, seed=2, layout="contiguous", device=device),
    ]
    bias = torch.zeros(5, requires_grad=True, device=device)
    assert_as_exact_as_eager(name, conv, [weight_of(5, 9, device=device), bias, *maps])


@pytest.mark.parametrize(("name", "device"), backends(OPERATOR, eager=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pixel_that_is_not_finite_stays_alone(name: str, device: str, dtype: torch.dtype) -> None:
    """With an odd number of channels: PyTorch's bfloat16 convolution on a CPU spoils the pixel before it."""
    skip_what_cannot_be(name, dtype)
    x = feature_map(1, 13, 1, 4, device=device).detach().to(dtype)
    x[0, :, 0, 3] = torch.nan
    with yf.backend(name):
        out = yf.ops.conv1x1([x[:, :1], x[:, 1:]], weight_of(7, 13, dtype, device=device).detach())
    assert out.isnan().nonzero()[:, 3].unique().tolist() == [3]


@pytest.mark.parametrize(("name", "device"), KERNELS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0, 3, 1, 4)])
def test_empty_maps(name: str, device: str, shape: tuple[int, ...]) -> None:
    x, weight = torch.zeros(shape, requires_grad=True, device=device), weight_of(5, 3, device=device)
    with yf.backend(name):
        out = yf.ops.conv1x1([x], weight)
    assert out.shape == (shape[0], 5, *shape[2:])
    out.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_only_what_wants_a_gradient_gets_one(name: str, device: str) -> None:
    first, second = feature_map(1, 3, 4, 4, device=device), feature_map(1, 2, 4, 4, device=device).detach()
    third, weight = feature_map(1, 4, 4, 4, device=device), weight_of(6, 9, device=device).detach()
    with yf.backend(name):
        yf.ops.conv1x1([first, second, third], weight).sum().backward()
    assert first.grad is not None
    assert second.grad is None
    assert third.grad is not None
    torch.testing.assert_close(third.grad[0, :, 0, 0], weight[:, 5:].sum((0, 2, 3)))


@pytest.mark.parametrize(("name", "device"), KERNELS)
def test_the_graph_can_be_used_twice_and_saved_tensors_are_untouched(name: str, device: str) -> None:
    x, weight = feature_map(1, 6, 4, 4, sliced=True, device=device), weight_of(5, 6, device=device)
    with yf.backend(name):
        out = yf.ops.conv1x1(x, weight)
    once = torch.autograd.grad(out.sum(), (x, weight), retain_graph=True)
    twice = torch.autograd.grad(out.sum(), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("convolutions", ["tf32", "ieee"])
@pytest.mark.parametrize("products", ["tf32", "ieee"])
def test_on_a_gpu_float32_rounds_as_convolutions_are_set_to(convolutions: str, products: str) -> None:
    """By the library's matrix products only where those have the same setting; Triton's launcher reads it itself."""
    with FakeTensorMode(), float32_precision(convolutions, products):
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.empty(4, 8, 1, 1, device="cuda", dtype=dtype)
            dense = torch.empty(1, 8, 4, 4, device="cuda", dtype=dtype, memory_format=torch.channels_last)
            sliced = torch.empty_strided((1, 8, 4, 4), (256, 1, 64, 16), device="cuda", dtype=dtype)
            same = dtype == torch.bfloat16 or convolutions == products
            for x in (dense, sliced):
                reason = OPERATOR.implementations["cuda"].supports([x], weight, None, None)
                assert ("fp32_precision" in str(reason)) is not same
                reason = PAIR.implementations["cuda"].supports(x, weight, weight)
                assert ("fp32_precision" in str(reason)) is not same
            for x, left in ((dense, True), (sliced, same)):
                reason = OPERATOR.implementations["triton"].supports([x], weight, None, None)
                assert ("one map" in str(reason)) is left


def test_auto_leaves_dense_maps_and_large_weights_to_the_framework() -> None:
    dense, sliced = feature_map(1, 8, 4, 4), feature_map(1, 8, 4, 4, sliced=True)
    large = feature_map(1, 512, 2, 2, sliced=True)
    assert OPERATOR.select([dense], weight_of(4, 8), None, None) is conv1x1_reference
    assert OPERATOR.select([large], weight_of(256, 512), None, None) is conv1x1_reference
    assert PAIR.select(large, weight_of(256, 512), weight_of(256, 512)) is conv1x1_pair_reference
    if OPERATOR.why_not("cpu") is None:
        assert OPERATOR.select([sliced], weight_of(4, 8), None, None) is not conv1x1_reference


@pytest.mark.parametrize("call", [conv, lambda weight, bias, x: yf.ops.conv1x1_pair(x, weight, weight)[1]])
def test_autocast_casts_as_conv2d_does(call: Callable[..., Tensor]) -> None:
    x, weight, bias = feature_map(1, 4, 3, 3, sliced=True), weight_of(5, 4), torch.zeros(5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(weight, bias, x)
        expected = F.conv2d(x, weight)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@needs_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: str) -> None:
    maps = [feature_map(2, c, 2, 3, layout=layout, dtype=torch.float64) for c in (2, 3)]
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    with yf.backend("cpu"):
        assert torch.autograd.gradcheck(conv, [weight_of(3, 5, torch.float64), bias, *maps])
        weights = [weight_of(2, 2, torch.float64), weight_of(3, 2, torch.float64)]
        assert torch.autograd.gradcheck(pair, [maps[0], *weights])


@pytest.mark.parametrize(("name", "device"), KERNELS)
def test_a_second_derivative_is_refused(name: str, device: str) -> None:
    x, weight = feature_map(1, 2, 2, 2, sliced=True, device=device), weight_of(3, 2, device=device)
    with yf.backend(name):
        out = yf.ops.conv1x1(x, weight)
    (gradient,) = torch.autograd.grad((out * out).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_wrong_arguments_are_named() -> None:
    x, weight = torch.zeros(1, 3, 4, 4), torch.zeros(5, 3, 1, 1)
    with pytest.raises(ValueError, match=r"^inputs: expected at least one map"):
        yf.ops.conv1x1([], weight)
    with pytest.raises(ValueError, match=r"^weight: expected \[O, 6, 1, 1\], got \[5, 3, 1, 1\]"):
        yf.ops.conv1x1([x, x], weight)
    with pytest.raises(ValueError, match=r"^inputs\[1\]: expected the shape of inputs\[0\]"):
        yf.ops.conv1x1([x, torch.zeros(1, 3, 4, 5)], weight)
    with pytest.raises(ValueError, match=r"^bias: expected \[5\], got \[4\]"):
        yf.ops.conv1x1(x, weight, torch.zeros(4))
    with pytest.raises(TypeError, match="expected one dtype"):
        yf.ops.conv1x1(x.double(), weight)
    with pytest.raises(ValueError, match=r"^out: expected \[1, 5, 4, 4\]"):
        yf.ops.conv1x1(x, weight, out=x)
    with pytest.raises(ValueError, match="one device"):
        yf.ops.conv1x1(x.to("meta"), weight)
    with pytest.raises(TypeError, match=r"^inputs\[0\]: expected a tensor of .*, got int"):
        yf.ops.conv1x1([3], weight)  # type: ignore[list-item]


@needs_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    maps = [feature_map(2, c, 3, 4, layout=layout, sliced=True).detach() for c in (3, 5)]
    weight, out = weight_of(6, 8).detach(), feature_map(2, 6, 3, 4, layout=layout).detach()
    torch.library.opcheck(torch.ops.yolov9_fast.conv1x1_forward.default, (maps, weight, torch.ones(6), out))
    torch.library.opcheck(torch.ops.yolov9_fast.conv1x1_input_grad.default, (out, weight, [3, 5]))
    torch.library.opcheck(torch.ops.yolov9_fast.conv1x1_weight_grad.default, (out, maps))


@needs_cpu
@pytest.mark.slow
def test_compiles_in_one_graph() -> None:
    def both(weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return yf.ops.conv1x1([a, b], weight), *yf.ops.conv1x1_pair(a, weight[:, :3], weight[:, :3] * 2)

    arguments = [weight_of(4, 5), feature_map(1, 3, 4, 4), feature_map(1, 2, 4, 4)]
    expected = outputs_and_gradients("cpu", both, arguments)
    got = outputs_and_gradients("cpu", torch.compile(both, fullgraph=True), arguments)
    for a, b in zip(expected[0] + expected[1], got[0] + got[1], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
def test_the_definition_of_a_pair_copies_a_slice_once(form: torch.memory_format) -> None:
    x = torch.randn(2, 12, 5, 4).contiguous(memory_format=form)[:, 4:8].requires_grad_()
    weights = [torch.randn(3, 4, 1, 1) for _ in range(2)]
    read: list[Tensor] = []

    class Convolutions(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.convolution.default:
                read.append(args[0])
            return func(*args, **(kwargs or {}))

    with Convolutions():
        pair = conv1x1_pair_reference(x, *weights)
    assert len({one.data_ptr() for one in read}) == 1 < len(read)
    assert all(one.is_contiguous(memory_format=form) for one in read)
    for y, weight in zip(pair, weights, strict=True):
        torch.testing.assert_close(y, F.conv2d(x, weight))
