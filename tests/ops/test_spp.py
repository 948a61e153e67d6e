"""spp: the three pooled maps and their gradient as torch's max_pool2d gives them, ties, NaN and slots included."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
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
from yolov9_fast.ops._spp import OPERATOR

BACKENDS = backends(OPERATOR)
KERNELS = backends(OPERATOR, eager=False, interpreted=False)
needs_cpu = pytest.mark.skipif(OPERATOR.why_not("cpu") is not None, reason=str(OPERATOR.why_not("cpu")))


def pool(x: Tensor) -> tuple[Tensor, ...]:
    return yf.ops.spp_with_input(x)


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ties", [False, True])
def test_as_exact_as_eager(name: str, device: str, layout: str, dtype: torch.dtype, ties: bool) -> None:
    if name == "triton" and (dtype == torch.float64 or (device == "cpu" and not ties)):
        pytest.skip("computes in float32; interpreted, the harder case alone")
    x = feature_map(
        2, 5 if name == "triton" else 19, 7, 6, layout=layout, dtype=dtype, sliced=True, ties=ties, device=device
    )
    assert_as_exact_as_eager(name, pool, [x])


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_fields_are_5_9_and_13(name: str, device: str) -> None:
    x = torch.zeros(1, 1, 17, 17, device=device)
    x[0, 0, 8, 8] = 1
    with yf.backend(name):
        sizes = [int(y.sum()) for y in yf.ops.spp(x)]
    assert sizes == [25, 81, 169]


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_the_first_maximum_gets_the_gradient(name: str, device: str) -> None:
    x = torch.zeros(1, 1, 3, 3, requires_grad=True, device=device)
    with yf.backend(name):
        first, _, _ = yf.ops.spp(x)
    first.sum().backward()
    assert x.grad is not None
    assert x.grad[0, 0].tolist() == [[9, 0, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_as_torch_pools_them(name: str, device: str, layout: str) -> None:
    x = feature_map(1, 4, 6, 7, layout=layout, device=device).detach()
    x[0, 0, 2, 3] = float("nan")
    x[0, 1, 1, :] = float("nan")
    x[0, 2] = -float("inf")
    x.requires_grad_()
    expected, got = outputs_and_gradients("eager", pool, [x]), outputs_and_gradients(name, pool, [x])
    for a, b in zip(expected[0] + expected[1], got[0] + got[1], strict=True):
        torch.testing.assert_close(b, a, equal_nan=True, rtol=1e-5, atol=1e-5)


@needs_cpu
def test_two_thousand_random_shapes() -> None:
    draw = random.Random(0)
    for case in range(2000):
        layout, shape = draw.choice(list(LAYOUTS)), (1, draw.choice([1, 3, 17]), draw.randint(1, 7), draw.randint(1, 7))
        x = feature_map(*shape, seed=case, layout=layout, sliced=draw.random() < 0.5, ties=draw.random() < 0.5)
        eager, mine = outputs_and_gradients("eager", pool, [x]), outputs_and_gradients("cpu", pool, [x])
        assert all(torch.equal(a, b) for a, b in zip(eager[0], mine[0], strict=True)), f"case {case}"
        torch.testing.assert_close(mine[1][0], eager[1][0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_slots_are_written_where_they_lie_and_nothing_beside_them(name: str, device: str, layout: str) -> None:
    x = feature_map(2, 3, 5, 4, layout=layout, device=device)
    buffer = yf.ops.ConcatBuffer.like(x, (2, 3, 3, 3, 1))
    edges = [buffer.slot(0).fill_(float("nan")), buffer.slot(4).fill_(float("nan"))]
    slots = [buffer.slot(number) for number in (1, 2, 3)]
    with yf.backend(name):
        pooled = yf.ops.spp(x, out=slots)
    for mine, slot, expected in zip(pooled, slots, yf.ops.spp(x), strict=True):
        assert mine.data_ptr() == slot.data_ptr()
        assert torch.equal(mine, expected)
    assert all(edge.isnan().all() for edge in edges)
    gradient = torch.autograd.grad(sum(y.sum() for y in pooled), x)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(sum(y.sum() for y in yf.ops.spp(x)), x)[0])


@needs_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bits_do_not_depend_on_the_number_of_threads(layout: str) -> None:
    x = feature_map(3, 40, 9, 9, layout=layout)
    with threads(1):
        one = outputs_and_gradients("cpu", pool, [x])
    with threads(2):
        two = outputs_and_gradients("cpu", pool, [x])
    assert all(torch.equal(a, b) for a, b in zip(one[0] + one[1], two[0] + two[1], strict=True))


@pytest.mark.parametrize(("name", "device"), KERNELS)
def test_an_empty_batch_gives_empty_maps(name: str, device: str) -> None:
    with yf.backend(name):
        assert [y.shape for y in yf.ops.spp(torch.zeros(0, 3, 4, 4, device=device))] == [(0, 3, 4, 4)] * 3


@needs_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: str) -> None:
    values = torch.randperm(48, generator=torch.Generator().manual_seed(0)).double().reshape(1, 2, 6, 4)
    x = values.to(memory_format=LAYOUTS[layout]).requires_grad_()
    with yf.backend("cpu"):
        assert torch.autograd.gradcheck(pool, [x])


@pytest.mark.parametrize(("name", "device"), KERNELS)
def test_a_second_derivative_is_refused(name: str, device: str) -> None:
    x = feature_map(1, 2, 4, 4, device=device)
    with yf.backend(name):
        first, _, _ = yf.ops.spp(x)
    (gradient,) = torch.autograd.grad((first * first).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(1, 2, 3, 3)
    with pytest.raises(TypeError, match=r"^x: expected a tensor of float32, .*, got torch.int64"):
        yf.ops.spp(x.long())
    with pytest.raises(ValueError, match=r"^out: expected three maps, got 1"):
        yf.ops.spp(x, out=[x])
    with pytest.raises(ValueError, match=r"^out\[1\]: expected \[1, 2, 3, 3\]"):
        yf.ops.spp(x, out=[x, torch.zeros(1, 3, 3, 3), x])
    with pytest.raises(ValueError, match=r"^out\[0\]: expected a tensor that requires no gradient"):
        yf.ops.spp(x, out=[x.clone().requires_grad_(), x, x])


@needs_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    maps = [feature_map(1, 3, 4, 5, seed=i, layout=layout).detach() for i in range(7)]
    torch.library.opcheck(torch.ops.yolov9_fast.spp_forward.default, tuple(maps[:4]))
    first = F.max_pool2d(maps[0], 5, 1, 2)
    second = F.max_pool2d(first, 5, 1, 2)
    torch.library.opcheck(torch.ops.yolov9_fast.spp_backward.default, (maps[0], first, second, *maps[3:]))


@needs_cpu
@pytest.mark.slow
def test_compiles_in_one_graph_with_slots() -> None:
    def block(x: Tensor) -> Tensor:
        buffer = yf.ops.ConcatBuffer.like(x, (2, 2, 2, 2))
        own = buffer.slot(0)
        own.copy_(x.detach())
        kept, *pooled = yf.ops.spp_with_input(x * 1, out=[buffer.slot(number) for number in (1, 2, 3)])
        return yf.ops.concat([kept, *pooled]) * 2

    x = feature_map(1, 2, 4, 4)
    expected = outputs_and_gradients("cpu", block, [x])
    got = outputs_and_gradients("cpu", torch.compile(block, fullgraph=True), [x])
    for a, b in zip(expected[0] + expected[1], got[0] + got[1], strict=True):
        torch.testing.assert_close(a, b)


@needs_cpu
@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
def test_subnormal_values_are_kept(form: torch.memory_format) -> None:
    """The processor's conversion to bfloat16 would make them zero."""
    x = torch.full((1, 32, 5, 6), 3e-39, dtype=torch.bfloat16).contiguous(memory_format=form)
    with yf.backend("cpu", op="spp"):
        pooled = yf.ops.spp(x)
    assert all((one == x).all() and (one != 0).all() for one in pooled[-3:])
