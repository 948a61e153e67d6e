"""adown_pool: average pool and max pool of its half as torch computes them one after the other, gradients included."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import yolov9_fast as yf
from tests.devices import backends
from tests.ops.feature_maps import (
    DTYPES,
    LAYOUTS,
    assert_as_exact_as_eager,
    feature_map,
    outputs_and_gradients,
    threads,
)
from yolov9_fast.ops._adown_pool import OPERATOR, adown_pool_reference

BACKENDS = backends(OPERATOR)
KERNELS = backends(OPERATOR, eager=False, interpreted=False)
needs_cpu = pytest.mark.skipif(OPERATOR.why_not("cpu") is not None, reason=str(OPERATOR.why_not("cpu")))


def halves(x: Tensor) -> tuple[Tensor, Tensor | None]:
    return yf.ops.adown_pool(x)


def average(x: Tensor) -> Tensor:
    return yf.ops.adown_pool(x, split=False)[0]


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_values_counted_by_hand(name: str, device: str) -> None:
    x = torch.arange(32.0, device=device).reshape(1, 2, 4, 4).requires_grad_()
    with yf.backend(name):
        first, second = yf.ops.adown_pool(x)
    assert second is not None
    assert first[0, 0].tolist() == [[2.5, 3.5, 4.5], [6.5, 7.5, 8.5], [10.5, 11.5, 12.5]]
    # Windows of rows and columns {-1, 0, 1} and {1, 2, 3} of the second half's averages 18.5 ... 28.5.
    assert second[0, 0].tolist() == [[23.5, 24.5], [27.5, 28.5]]
    second.backward(torch.tensor([[[[4.0, 8.0], [16.0, 32.0]]]], device=device))
    assert x.grad is not None
    assert x.grad[0, 1].tolist() == [[0, 0, 0, 0], [0, 1, 3, 2], [0, 5, 15, 10], [0, 4, 12, 8]]
    assert not x.grad[0, 0].any()


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ties", [False, True])
def test_as_exact_as_eager(name: str, device: str, layout: str, dtype: torch.dtype, ties: bool) -> None:
    if name == "triton" and (dtype == torch.float64 or (device == "cpu" and not ties)):
        pytest.skip("computes in float32; interpreted, the harder case alone")
    x = feature_map(
        2, 10 if name == "triton" else 38, 7, 6, layout=layout, dtype=dtype, sliced=True, ties=ties, device=device
    )
    assert_as_exact_as_eager(name, halves, [x])
    assert_as_exact_as_eager(name, average, [x])


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_as_torch_pools_them(name: str, device: str, layout: str) -> None:
    x = feature_map(1, 8, 6, 7, layout=layout, device=device).detach()
    x[0, 4, 2, 3] = float("nan")
    x[0, 5, 1, :] = float("nan")
    x[0, 6] = -float("inf")
    x.requires_grad_()
    expected, got = outputs_and_gradients("eager", halves, [x]), outputs_and_gradients(name, halves, [x])
    for a, b in zip(expected[0] + expected[1], got[0] + got[1], strict=True):
        torch.testing.assert_close(b, a, equal_nan=True, rtol=1e-5, atol=1e-5)


@needs_cpu
def test_two_thousand_random_shapes_give_the_bits_of_torch() -> None:
    draw = random.Random(0)
    for case in range(2000):
        layout = draw.choice(list(LAYOUTS))
        shape = (1, 2 * draw.choice([1, 3, 17]), draw.randint(2, 9), draw.randint(2, 9))
        x = feature_map(*shape, seed=case, layout=layout, sliced=draw.random() < 0.5, ties=draw.random() < 0.5)
        call = draw.choice([halves, average])
        eager, mine = outputs_and_gradients("eager", call, [x]), outputs_and_gradients("cpu", call, [x])
        assert all(torch.equal(a, b) for a, b in zip(eager[0], mine[0], strict=True)), f"case {case}"
        torch.testing.assert_close(mine[1][0], eager[1][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("used", [0, 1])
def test_a_half_that_nobody_used_has_a_gradient_of_zeros(name: str, device: str, used: int) -> None:
    x = feature_map(1, 4, 5, 6, device=device)
    with yf.backend(name):
        result = yf.ops.adown_pool(x)[used]
    assert result is not None
    result.square().sum().backward()
    expected = feature_map(1, 4, 5, 6, device=device)
    reference = adown_pool_reference(expected)[used]
    assert reference is not None
    reference.square().sum().backward()
    assert x.grad is not None
    assert expected.grad is not None
    torch.testing.assert_close(x.grad, expected.grad)


@pytest.mark.parametrize(("name", "device"), KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_dense_in_the_layout_of_x(name: str, device: str, layout: str) -> None:
    with yf.backend(name):
        for result in yf.ops.adown_pool(feature_map(2, 8, 6, 6, layout=layout, sliced=True, device=device)):
            assert result is not None
            assert result.is_contiguous(memory_format=LAYOUTS[layout])


@needs_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bits_do_not_depend_on_the_number_of_threads(layout: str) -> None:
    x = feature_map(3, 40, 9, 9, layout=layout)
    with threads(1):
        one = outputs_and_gradients("cpu", halves, [x])
    with threads(2):
        two = outputs_and_gradients("cpu", halves, [x])
    assert all(torch.equal(a, b) for a, b in zip(one[0] + one[1], two[0] + two[1], strict=True))


@pytest.mark.parametrize(("name", "device"), KERNELS)
def test_an_empty_batch_gives_empty_maps(name: str, device: str) -> None:
    with yf.backend(name):
        first, second = yf.ops.adown_pool(torch.zeros(0, 4, 6, 5, device=device))
    assert second is not None
    assert first.shape == (0, 2, 5, 4)
    assert second.shape == (0, 2, 3, 2)


@needs_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: str) -> None:
    values = torch.randperm(60, generator=torch.Generator().manual_seed(0)).double().reshape(1, 2, 6, 5)
    x = values.to(memory_format=LAYOUTS[layout]).requires_grad_()
    with yf.backend("cpu"):
        assert torch.autograd.gradcheck(halves, [x])
        assert torch.autograd.gradcheck(average, [x])


@pytest.mark.parametrize(("name", "device"), KERNELS)
def test_a_second_derivative_is_refused(name: str, device: str) -> None:
    x = feature_map(1, 2, 4, 4, device=device)
    with yf.backend(name):
        first = average(x)
    (gradient,) = torch.autograd.grad((first * first).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"^x: expected a height and width of at least 2, got \[1, 2, 1, 5\]"):
        yf.ops.adown_pool(torch.zeros(1, 2, 1, 5))
    with pytest.raises(ValueError, match=r"^x: expected an even number of channels"):
        yf.ops.adown_pool(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"^x: expected \[B, C, H, W\], got \[3, 4, 4\]"):
        yf.ops.adown_pool(torch.zeros(3, 4, 4))


@needs_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", [True, False])
def test_opcheck(layout: str, split: bool) -> None:
    x = feature_map(1, 4, 5, 6, layout=layout).detach()
    torch.library.opcheck(torch.ops.yolov9_fast.adown_pool_forward.default, (x, split))
    first, second = torch.ops.yolov9_fast.adown_pool_forward(x, split)
    gradient = second if split else None
    torch.library.opcheck(torch.ops.yolov9_fast.adown_pool_backward.default, (first, gradient, x, split))
    torch.library.opcheck(torch.ops.yolov9_fast.adown_pool_backward.default, (first, None, x, split))


@needs_cpu
@pytest.mark.slow
def test_compiles_in_one_graph() -> None:
    x = feature_map(1, 4, 4, 4)
    expected = outputs_and_gradients("cpu", halves, [x])
    got = outputs_and_gradients("cpu", torch.compile(halves, fullgraph=True), [x])
    for a, b in zip(expected[0] + expected[1], got[0] + got[1], strict=True):
        torch.testing.assert_close(a, b)
