"""cbfuse: nearest-resized sums against values by hand, eager and float64, for any ratio, layout and dtype."""

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
from yolov9_fast.ops._cbfuse import OPERATOR, cbfuse_reference

BACKENDS = backends(OPERATOR)
KERNELS = backends(OPERATOR, eager=False, interpreted=False)
needs_cpu = pytest.mark.skipif(OPERATOR.why_not("cpu") is not None, reason=str(OPERATOR.why_not("cpu")))


def fuse(*maps: Tensor) -> Tensor:
    return yf.ops.cbfuse(maps[:-1], maps[-1])


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_values_counted_by_hand(name: str, device: str) -> None:
    coarse = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], requires_grad=True, device=device)
    target = torch.arange(16.0, device=device).reshape(1, 1, 4, 4).requires_grad_()
    with yf.backend(name):
        out = yf.ops.cbfuse([coarse], target)
    assert out[0, 0].tolist() == [[1, 2, 4, 5], [5, 6, 8, 9], [11, 12, 14, 15], [15, 16, 18, 19]]
    out.backward(torch.arange(16.0, device=device).reshape(1, 1, 4, 4))
    assert coarse.grad is not None
    assert target.grad is not None
    assert coarse.grad[0, 0].tolist() == [[10, 18], [42, 50]]
    assert torch.equal(target.grad, torch.arange(16.0, device=device).reshape(1, 1, 4, 4))


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sliced", [False, True])
def test_as_exact_as_eager(name: str, device: str, layout: str, dtype: torch.dtype, sliced: bool) -> None:
    if name == "triton" and (dtype == torch.float64 or (device == "cpu" and not sliced)):
        pytest.skip("computes in float32; interpreted, the harder case alone")
    sizes = [(6, 8), (3, 4), (1, 1), (5, 9)]
    maps = [
        feature_map(2, 5, h, w, seed=i, layout=layout, dtype=dtype, sliced=sliced, device=device)
        for i, (h, w) in enumerate(sizes)
    ]
    target = feature_map(2, 5, 6, 8, seed=9, layout=layout, dtype=dtype, device=device)
    assert_as_exact_as_eager(name, fuse, [*maps, target])


@needs_cpu
def test_two_thousand_random_shapes() -> None:
    draw = random.Random(0)
    for case in range(2000):
        layout, count = draw.choice(list(LAYOUTS)), draw.randint(1, 3)
        batch, channels = draw.randint(1, 2), draw.choice([1, 2, 3, 8, 33])
        sizes = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(count + 1)]
        maps = [
            feature_map(batch, channels, h, w, seed=case + i, layout=layout, sliced=draw.random() < 0.5)
            for i, (h, w) in enumerate(sizes)
        ]
        eager, mine = outputs_and_gradients("eager", fuse, maps), outputs_and_gradients("cpu", fuse, maps)
        assert torch.equal(eager[0][0], mine[0][0]), f"case {case}: sums in float32 in the listed order"
        for expected, got in zip(eager[1], mine[1], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@needs_cpu
def test_the_nearest_source_is_torchs_for_every_pair_of_sizes() -> None:
    for source in range(1, 48):
        x = torch.arange(float(source)).reshape(1, 1, 1, source)
        for size in range(1, 48):
            with yf.backend("cpu"):
                out = yf.ops.cbfuse([x], torch.zeros(1, 1, 1, size))
            assert torch.equal(out, F.interpolate(x, size=(1, size), mode="nearest")), (source, size)


@needs_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bits_do_not_depend_on_the_number_of_threads(layout: str) -> None:
    maps = [feature_map(3, 40, s, s, seed=s, layout=layout) for s in (7, 14, 28)]
    with threads(1):
        one = outputs_and_gradients("cpu", fuse, maps)
    with threads(2):
        two = outputs_and_gradients("cpu", fuse, maps)
    assert all(torch.equal(a, b) for a, b in zip(one[0] + one[1], two[0] + two[1], strict=True))


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_mixed_layouts_and_odd_strides_are_read(name: str, device: str) -> None:
    a, b = (
        feature_map(2, 4, 3, 3, seed=1, device=device),
        feature_map(2, 4, 6, 6, seed=2, layout="contiguous", device=device),
    )
    odd = feature_map(2, 4, 6, 12, seed=3, device=device)[..., ::2].detach().requires_grad_()
    assert_as_exact_as_eager(name, fuse, [a, odd, b])


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_only_what_wants_a_gradient_gets_one(name: str, device: str) -> None:
    a, b = feature_map(1, 2, 2, 2, device=device), feature_map(1, 2, 3, 3, device=device).detach()
    target = feature_map(1, 2, 4, 4, device=device).detach()
    with yf.backend(name):
        out = yf.ops.cbfuse([a, b], target)
    out.sum().backward()
    assert a.grad is not None
    assert b.grad is None
    assert target.grad is None
    assert torch.equal(a.grad, torch.full_like(a, 4.0))


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_an_empty_batch_gives_an_empty_map(name: str, device: str) -> None:
    with yf.backend(name):
        assert yf.ops.cbfuse(
            [torch.zeros(0, 3, 2, 2, device=device)], torch.zeros(0, 3, 4, 4, device=device)
        ).shape == (0, 3, 4, 4)


def test_without_inputs_the_target_is_the_result() -> None:
    target = torch.ones(1, 2, 3, 4)
    assert yf.ops.cbfuse([], target) is target


@needs_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: str) -> None:
    maps = [feature_map(1, 2, h, w, layout=layout, dtype=torch.float64) for h, w in ((2, 2), (3, 1), (4, 3))]
    with yf.backend("cpu"):
        assert torch.autograd.gradcheck(fuse, maps)


@pytest.mark.parametrize(("name", "device"), KERNELS)
def test_a_second_derivative_is_refused(name: str, device: str) -> None:
    x, target = feature_map(1, 2, 2, 2, device=device), feature_map(1, 2, 4, 4, device=device)
    with yf.backend(name):
        out = yf.ops.cbfuse([x], target)
    (gradient,) = torch.autograd.grad((out * out).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@needs_cpu
def test_autocast_adds_maps_of_several_dtypes() -> None:
    coarse, target = feature_map(1, 3, 2, 2, dtype=torch.bfloat16), feature_map(1, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16), yf.backend("cpu"):
        out = yf.ops.cbfuse([coarse], target)
    assert out.dtype == torch.float32
    assert torch.equal(out, cbfuse_reference([coarse.float()], target))


def test_wrong_arguments_are_named() -> None:
    target = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"^inputs\[0\]: expected batch and channels \[2, 3\]"):
        yf.ops.cbfuse([torch.zeros(2, 4, 2, 2)], target)
    with pytest.raises(TypeError, match=r"^inputs\[0\]: expected torch.float32"):
        yf.ops.cbfuse([torch.zeros(2, 3, 2, 2, dtype=torch.float64)], target)
    with pytest.raises(ValueError, match=r"^inputs\[0\]: expected \[B, C, H, W\] with C, H and W of at least 1"):
        yf.ops.cbfuse([torch.zeros(2, 3, 0, 2)], target)
    with pytest.raises(TypeError, match=r"^target: expected a tensor of .*, got NoneType"):
        yf.ops.cbfuse([], None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^inputs\[0\]: expected a tensor on cpu, got one on meta"):
        yf.ops.cbfuse([torch.zeros(2, 3, 2, 2, device="meta")], target)


@needs_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    a, b, target = (feature_map(2, 3, s, s, layout=layout).detach() for s in (2, 3, 6))
    torch.library.opcheck(torch.ops.yolov9_fast.cbfuse_forward.default, ([a, b], target))
    torch.library.opcheck(torch.ops.yolov9_fast.cbfuse_backward.default, (target, [2, 3], [2, 3]))


@needs_cpu
@pytest.mark.slow
def test_compiles_in_one_graph() -> None:
    maps = [feature_map(1, 2, s, s, seed=s) for s in (2, 4)]
    expected = outputs_and_gradients("cpu", fuse, maps)
    got = outputs_and_gradients("cpu", torch.compile(fuse, fullgraph=True), maps)
    for a, b in zip(expected[0] + expected[1], got[0] + got[1], strict=True):
        torch.testing.assert_close(a, b)
