"""convs: 3×3 and 1×1 convolutions of one map against eager and float64, with all gradients; when they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import yolov9_fast as yf
from tests.ops.feature_maps import threads
from yolov9_fast.engine.device import to_channels_last
from yolov9_fast.nn.blocks import Conv, RepConv
from yolov9_fast.nn.convolution import is_same_size
from yolov9_fast.ops import _convs
from yolov9_fast.ops._convs import KERNELS, OPERATOR, convs_reference, convs_where_faster

needs_cpu = pytest.mark.skipif(OPERATOR.why_not("cpu") is not None, reason=str(OPERATOR.why_not("cpu")))
CASES = {
    "RepConv": ((2, 24, 20, 20), ((24, 3), (24, 1))),
    "one 3x3": ((3, 8, 5, 7), ((16, 3),)),
    "one 1x1": ((2, 16, 6, 3), ((40, 1),)),
    "several panels, wide and narrow": ((1, 80, 3, 4), ((72, 3), (56, 1), (136, 3))),
    "one pixel": ((2, 16, 1, 1), ((8, 3), (8, 1))),
    "one row": ((2, 8, 1, 9), ((8, 3),)),
    "one column": ((2, 8, 9, 1), ((8, 3),)),
    "several strips": ((1, 32, 40, 41), ((16, 3), (16, 1))),
}


def given(case: str, dtype: torch.dtype, *, sliced: bool = False) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Map, weights of both memory formats, and gradients of the results."""
    generator = torch.Generator().manual_seed(3)
    (batch, channels, height, width), kinds = CASES[case]

    def rows(count: int) -> Tensor:
        wide = torch.randn(batch, height, width, count + 8 * sliced, generator=generator, dtype=torch.float64)
        return wide.to(dtype).permute(0, 3, 1, 2)[:, :count]

    weights = [
        torch.randn(outputs, channels, k, k, generator=generator, dtype=torch.float64).to(dtype) for outputs, k in kinds
    ]
    weights[0] = weights[0].contiguous(memory_format=torch.channels_last)
    return rows(channels), weights, [rows(outputs) for outputs, _ in kinds]


def results(x: Tensor, weights: Sequence[Tensor], dys: Sequence[Tensor], backend: str) -> list[Tensor]:
    x, weights = x.detach().requires_grad_(), [weight.detach().requires_grad_() for weight in weights]
    with yf.backend(backend, "convs"):
        ys = yf.ops.convs(x, weights)
    return [*ys, *torch.autograd.grad(ys, [x, *weights], dys)]


@needs_cpu
@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_eager(case: str, dtype: torch.dtype, sliced: bool) -> None:
    x, weights, dys = given(case, dtype, sliced=sliced)
    exact = results(x.double(), [w.double() for w in weights], [dy.double() for dy in dys], "eager")
    for number, (own, eager, truth) in enumerate(
        zip(results(x, weights, dys, "cpu"), results(x, weights, dys, "eager"), exact, strict=True)
    ):
        scale = truth.abs().max()
        least = 16 * torch.finfo(dtype).eps * scale  # eager in float64 is the truth, and may add in any order
        error = (own.double() - truth).abs().max()
        assert error <= torch.maximum(2 * (eager.double() - truth).abs().max(), least), number
        if number > len(weights):
            assert own.stride() == weights[number - len(weights) - 1].stride()


@needs_cpu
def test_gradients_by_differences() -> None:
    x, weights, _ = given("one 3x3", torch.float64)
    x = x[:1, :, :2, :3].contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = weights[0][:8].detach().requires_grad_()
    point = weight.detach()[:, :, 1:2, 1:2].clone().requires_grad_()
    with yf.backend("cpu", "convs"):
        assert torch.autograd.gradcheck(lambda *a: tuple(yf.ops.convs(a[0], a[1:])), (x, weight, point))


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    arguments = given("several strips", dtype)
    with threads(1):
        one = results(*arguments, "cpu")
    with threads(3):
        assert all(map(torch.equal, one, results(*arguments, "cpu")))


@needs_cpu
def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights, dys = given("RepConv", torch.float32)
    weights[1].requires_grad_()
    expected = results(x, weights, dys, "cpu")[-1]
    with yf.backend("cpu", "convs"):
        ys = yf.ops.convs(x, weights)
    torch.autograd.backward(ys, dys)
    assert weights[0].grad is None
    assert x.grad is None
    assert weights[1].grad is not None
    assert torch.equal(weights[1].grad, expected)


@needs_cpu
def test_kernels_have_the_strides_of_fakes() -> None:
    for case in CASES:
        x, weights, dys = given(case, torch.float32)
        for kernel, arguments in zip(KERNELS, ((x, weights), (dys, weights), (dys, x, weights)), strict=True):
            real = kernel.registered()(*arguments)
            with FakeTensorMode(allow_non_fake_inputs=True):
                fake = kernel.fake(*arguments)
            plain = kernel.reference(*arguments)
            for a, b, c in zip(*([r] if isinstance(r, Tensor) else r for r in (real, fake, plain)), strict=True):
                assert a.stride() == b.stride() == c.stride()
                torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 8, 4, 4), ()), "weights: expected at least one, got none"),
        (((1, 8, 4, 4), ((8, 9, 3, 3),)), r"weights\[0\]: expected \[O, 8, k, k\] of k = 1 or 3, got \[8, 9, 3, 3\]"),
        (((1, 8, 4, 4), ((8, 8, 5, 5),)), r"weights\[0\]: expected"),
        (((1, 8, 4, 4), ((8, 8, 1, 1), (8, 8, 3, 1))), r"weights\[1\]: expected"),
        (((8, 4, 4), ((8, 8, 1, 1),)), "x: expected"),
    ],
)
def test_bad_arguments(shapes: tuple[tuple[int, ...], tuple[tuple[int, ...], ...]], message: str) -> None:
    x, weights = torch.zeros(shapes[0]), [torch.zeros(shape) for shape in shapes[1]]
    with pytest.raises((ValueError, TypeError), match=message):
        yf.ops.convs(x, weights)


def test_another_dtype_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"weights\[0\]: expected torch.float32 as x, got torch.float64"):
        yf.ops.convs(torch.zeros(1, 8, 4, 4), [torch.zeros(8, 8, 3, 3, dtype=torch.float64)])


# ---- where blocks use it


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor on which the kernels are faster."""
    monkeypatch.setattr(_convs, "measured", lambda dtype: True)


def block_results(block: nn.Module, x: Tensor, backend: str) -> list[Tensor]:
    for parameter in block.parameters():
        parameter.grad = None
    x = x.detach().requires_grad_()
    with yf.backend(backend, "convs"):
        y = block(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    return [y.detach(), x.grad, *(p.grad for p in block.parameters() if p.grad is not None)]  # type: ignore[list-item]


@needs_cpu
@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("make", [lambda: RepConv(24, 16), lambda: Conv(24, 16, 3)])
def test_blocks_use_it_and_compute_the_same(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = to_channels_last(make().train())
    x = torch.randn(2, 24, 9, 11).contiguous(memory_format=torch.channels_last)
    seen: list[int] = []
    apply = _convs._Convs.apply
    monkeypatch.setattr(_convs._Convs, "apply", lambda *a: seen.append(len(a) - 2) or apply(*a))
    own_results = block_results(block, x, "auto")
    assert seen == [2 if isinstance(block, RepConv) else 1]
    for own, eager in zip(own_results, block_results(block, x, "eager"), strict=True):
        torch.testing.assert_close(own, eager, rtol=1e-4, atol=1e-4)


@needs_cpu
@pytest.mark.usefixtures("measured")
def test_auto_takes_small_maps_of_few_channels_alone() -> None:
    def taken(*shape: int, outputs: int = 16, kernel: int = 3, dtype: torch.dtype = torch.float32) -> bool:
        x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
        return convs_where_faster(x, [torch.zeros(outputs, shape[1], kernel, kernel, dtype=dtype)]) is not None

    assert taken(8, 16, 40, 40)
    assert taken(8, 24, 20, 20, outputs=24)
    assert not taken(8, 16, 80, 80)
    assert not taken(1, 64, 4, 4)
    assert not taken(1, 16, 4, 4, outputs=64)
    assert not taken(8, 16, 20, 20, kernel=1)
    assert not taken(8, 12, 20, 20)
    assert not taken(8, 16, 20, 20, dtype=torch.float64)
    assert not taken(8, 16, 20, 20, dtype=torch.float16)
    assert taken(8, 48, 20, 20, outputs=48, dtype=torch.bfloat16)
    assert not taken(8, 16, 20, 20, kernel=1, dtype=torch.bfloat16)
    assert not taken(8, 72, 10, 10, dtype=torch.bfloat16)
    x, weight = torch.zeros(2, 16, 8, 8), torch.zeros(16, 16, 3, 3)
    assert convs_where_faster(x, [weight]) is None, "planes"
    rows = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert convs_where_faster(rows, [weight]) is None
        assert convs_where_faster(rows.bfloat16(), [weight]) is None
        assert convs_where_faster(rows.bfloat16(), [weight.bfloat16()]) is not None
    with yf.backend("eager"):
        assert convs_where_faster(rows, [weight]) is None


def test_without_measured_vector_units_the_framework_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_convs, "measured", lambda dtype: False)
    x = torch.zeros(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    assert convs_where_faster(x, [torch.zeros(16, 16, 3, 3)]) is None
    for own, expected in zip(
        yf.ops.convs(x, [torch.ones(16, 16, 3, 3)]), convs_reference(x, [torch.ones(16, 16, 3, 3)]), strict=True
    ):
        assert torch.equal(own, expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kernel_size": 3, "padding": 1}, True),
        ({"kernel_size": 1}, True),
        ({"kernel_size": 3}, False),
        ({"kernel_size": 3, "padding": "same"}, False),
        ({"kernel_size": 3, "padding": 1, "stride": 2}, False),
        ({"kernel_size": 3, "padding": 1, "dilation": 2}, False),
        ({"kernel_size": 3, "padding": 1, "groups": 2}, False),
        ({"kernel_size": 5, "padding": 2}, False),
        ({"kernel_size": (3, 1), "padding": (1, 0)}, False),
    ],
)
def test_which_convolutions_keep_the_size(options: dict[str, object], expected: bool) -> None:
    assert is_same_size(nn.Conv2d(8, 8, **options)) is expected  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", [3, torch.zeros(8, 8, 3, 3), [torch.zeros(8, 8, 3, 3), None]])
def test_weights_that_are_no_list_of_tensors_are_refused(weights: Any) -> None:
    with pytest.raises(TypeError, match="weights: expected a list of tensors, got"):
        yf.ops.convs(torch.zeros(1, 8, 4, 4), weights)
