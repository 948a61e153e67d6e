"""bn_silu: forward, every gradient and the running statistics against float64, on every backend of this machine."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import yolov9_fast as yf
from tests.devices import backends
from tests.ops.batch_norm_cases import (
    EPS,
    LAYOUTS,
    MOMENTUM,
    Case,
    assert_no_worse_than_eager,
    error,
    laid_out,
    make_case,
    run,
    truth,
)
from tests.ops.feature_maps import threads
from yolov9_fast.ops._bn_silu import OPERATOR

CPU_REASON = OPERATOR.why_not("cpu")
needs_cpu = pytest.mark.skipif(CPU_REASON is not None, reason=f"no compiled bn_silu: {CPU_REASON}")
BACKENDS = backends(OPERATOR, interpreted=False)
KERNELS = backends(OPERATOR, eager=False, interpreted=False)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def compute(x: Tensor, **options: Any) -> Tensor:
    """bn_silu of x alone: no parameters, statistics of the batch."""
    options = {"training": True, "momentum": MOMENTUM, "eps": EPS} | options
    return yf.ops.bn_silu(x, None, None, None, None, **options)


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_two_values_a_channel_become_plus_and_minus_one(name: str, device: str) -> None:
    x = torch.tensor([3.0, 5.0, -10.0, 10.0], device=device).view(1, 2, 1, 2)
    with yf.backend(name):
        z = compute(x, eps=1e-12)
    expected = torch.tensor([-1.0, 1.0, -1.0, 1.0], device=device).view(1, 2, 1, 2)
    torch.testing.assert_close(z, expected * torch.sigmoid(expected))


@pytest.mark.parametrize(("name", "device"), KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 24, 5, 5), (2, 80, 4, 4), (1, 16, 40, 33), (2, 33, 1, 1)], ids=str)
def test_every_dtype_layout_and_odd_size(
    name: str, device: str, dtype: torch.dtype, layout: str, shape: tuple[int, int, int, int]
) -> None:
    if name == "triton" and dtype == torch.float64:
        pytest.skip("computes in float32")
    assert_no_worse_than_eager(make_case(1, shape, dtype=dtype, layout=layout, residual=True, device=device), name)


@pytest.mark.parametrize(("name", "device"), KERNELS)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_every_mode(
    name: str, device: str, layout: str, training: bool, affine: bool, activation: bool, residual: bool
) -> None:
    options = {"training": training, "affine": affine, "activation": activation, "residual": residual}
    assert_no_worse_than_eager(make_case(1, layout=layout, **options, device=device), name)
    if training:
        assert_no_worse_than_eager(make_case(1, layout=layout, running=False, **options, device=device), name)


@pytest.mark.parametrize(
    "options",
    [{}, {"layout": "planes_slice"}, {"training": False}, {"dtype": torch.bfloat16, "residual": True}],
    ids=str,
)
@pytest.mark.parametrize(("name", "device"), backends(OPERATOR, eager=False))
def test_every_backend(name: str, device: str, options: dict[str, Any]) -> None:
    assert_no_worse_than_eager(make_case(1, **options, device=device), name)


@pytest.mark.parametrize(("name", "device"), KERNELS)
@given(
    st.integers(1, 4),
    st.integers(1, 70),
    st.integers(1, 9),
    st.integers(6, 9),
    st.sampled_from(LAYOUTS),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_any_shape(
    name: str, device: str, n: int, c: int, h: int, w: int, layout: str, training: bool, seed: int
) -> None:
    assert_no_worse_than_eager(
        make_case(1, (n, c, h, w), layout=layout, training=training, seed=seed, device=device), name
    )


@needs_cpu
def test_two_thousand_seeded_cases_in_float64() -> None:
    for seed in range(2000):
        shape = (1 + seed % 3, 1 + seed % 37, 1 + seed % 5, 2 + seed % 4)
        case = make_case(1, shape, dtype=torch.float64, layout=LAYOUTS[seed % 4], residual=seed % 3 == 0, seed=seed)
        true, ours = truth(case), run(case, "cpu")
        for name, expected in true.items():
            assert error(ours[name], expected) < 1e-10, (seed, name)


@needs_cpu
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_a_mean_of_a_thousand_deviations_does_not_cancel(layout: str) -> None:
    assert_no_worse_than_eager(make_case(1, (4, 24, 20, 20), layout=layout, mean=1e3), "cpu")


@needs_cpu
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_statistics_of_four_million_values_a_channel(layout: str) -> None:
    x = laid_out(torch.randn(4, 2, 1024, 1024, generator=torch.Generator().manual_seed(1)) + 1e3, layout)
    mean, m2 = torch.ops.yolov9_fast.bn_stats(x)
    true = x.double()
    variance = true.var((0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), true.mean((0, 2, 3)), rtol=6e-8, atol=0)
    torch.testing.assert_close(m2.double() / 2**22, variance, rtol=1e-6, atol=0)
    running = torch.zeros(2), torch.zeros(2)
    F.batch_norm(x, *running, training=True, momentum=1.0)
    eager = (running[1].double() - true.var((0, 2, 3))).abs().max()
    assert (m2.double() / 2**22 - variance).abs().max() <= max(2 * eager, 1e-6)


@pytest.mark.parametrize(("name", "device"), KERNELS)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_a_constant_channel_gives_its_bias(name: str, device: str, layout: str) -> None:
    x = laid_out(torch.full((3, 2, 5, 7), 1000.1, device=device), layout)
    bias = torch.tensor([0.5, -0.5], device=device)
    with yf.backend(name):
        z = yf.ops.bn_silu(
            x, torch.ones(2, device=device), bias, None, None, training=True, momentum=0.1, eps=EPS, activation=False
        )
    assert torch.equal(z, bias.view(1, 2, 1, 1).expand_as(z))


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_running_statistics_average_cumulatively_when_the_caller_says_so(name: str, device: str) -> None:
    batches = torch.randn(3, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).to(device)
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    with yf.backend(name):
        for number, x in enumerate(batches, start=1):
            yf.ops.bn_silu(x, None, None, mean, var, training=True, momentum=1 / number, eps=EPS)
    torch.testing.assert_close(mean, batches.mean((1, 3, 4)).mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var, batches.transpose(1, 2).flatten(2).var(2).mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_one_value_a_channel_raises_as_torch_does(name: str, device: str) -> None:
    with yf.backend(name), pytest.raises(ValueError, match=r"[Ee]xpected more than 1 value per channel when training"):
        compute(torch.zeros(1, 3, 1, 1, device=device))


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_an_empty_batch_is_empty_and_leaves_the_running_statistics(name: str, device: str) -> None:
    x = torch.zeros(0, 3, 2, 2, requires_grad=True, device=device)
    weight = torch.ones(3, requires_grad=True, device=device)
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    with yf.backend(name):
        z = yf.ops.bn_silu(x, weight, weight, mean, var, training=True, momentum=0.1, eps=EPS)
        z.sum().backward()
    assert z.shape == x.shape
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert weight.grad is not None
    assert weight.grad.tolist() == [0, 0, 0]
    assert mean.tolist() == [0, 0, 0]
    assert var.tolist() == [1, 1, 1]


@needs_cpu
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_the_result_does_not_depend_on_the_number_of_threads(layout: str) -> None:
    case, threads = make_case(1, (4, 24, 50, 50), layout=layout, residual=True), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(case, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


def slots(layout: str, *channels: int, device: str = "cpu") -> list[Tensor]:
    """Neighbouring slices of one buffer of NaN, each with its own version counter."""
    buffer = torch.full((2, sum(channels), 4, 3), float("nan"), device=device)
    if layout == "channels_last":
        buffer = buffer.contiguous(memory_format=torch.channels_last)
    parts = buffer.split(list(channels), 1)
    return [
        torch.empty(0, device=device).set_(buffer.untyped_storage(), p.storage_offset(), p.shape, p.stride())
        for p in parts
    ]


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("training", [True, False])
def test_slots_of_one_buffer_are_written_and_differentiated(
    name: str, device: str, layout: str, training: bool
) -> None:
    before, slot, after = slots(layout, 3, 5, 2, device=device)
    case = make_case(1, layout=layout, training=training, residual=True, device=device)
    case.dz = laid_out(case.dz, "rows_slice" if layout == "channels_last" else "planes_slice")
    expected, into = run(case, name), run(case, name, slot)
    assert all(torch.equal(expected[key], into[key]) for key in expected)
    assert torch.equal(slot, expected["z"])
    assert into["z"].data_ptr() == slot.data_ptr()
    assert before.isnan().all()
    assert after.isnan().all()


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_two_slots_feed_what_saves_them(name: str, device: str) -> None:
    first, second = slots("channels_last", 2, 3, device=device)
    x, y = (
        torch.randn(2, 2, 4, 3, requires_grad=True, device=device),
        torch.randn(2, 3, 4, 3, requires_grad=True, device=device),
    )
    with yf.backend(name):
        a, b = compute(x, out=first), compute(y, out=second)
        (a.square().sum() + b.square().sum()).backward()
        plain = torch.autograd.grad(compute(x).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, plain)


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_a_second_use_of_a_slot_that_backward_still_needs_is_an_error(name: str, device: str) -> None:
    slot, _ = slots("channels_last", 5, 1, device=device)
    x = torch.randn(2, 5, 4, 3, requires_grad=True, device=device)
    with yf.backend(name):
        loss = compute(x, out=slot).square().sum()
        compute(x.detach() * 2, out=slot)
        with pytest.raises(RuntimeError, match=r"modified (by an inplace operation|inplace)"):
            loss.backward()


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_backward_runs_twice_where_the_graph_is_kept(name: str, device: str) -> None:
    x = torch.randn(2, 5, 4, 3, requires_grad=True, device=device)
    with yf.backend(name):
        z = compute(x)
        grads = [torch.autograd.grad(z, x, torch.ones_like(z), retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)


@pytest.mark.parametrize(("name", "device"), KERNELS)
def test_a_second_derivative_is_refused(name: str, device: str) -> None:
    x = torch.randn(2, 5, 4, 3, requires_grad=True, device=device)
    with yf.backend(name):
        (grad,) = torch.autograd.grad(compute(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.sum().backward()


@pytest.mark.parametrize(("name", "device"), KERNELS)
def test_only_the_input_and_two_vectors_are_saved(name: str, device: str) -> None:
    saved: list[Tensor] = []
    x = torch.randn(2, 5, 4, 3, requires_grad=True, device=device)
    weight = torch.ones(5, requires_grad=True, device=device)
    with yf.backend(name), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        yf.ops.bn_silu(x, weight, weight, None, None, training=True, momentum=0.1, eps=EPS)
    assert sorted(t.numel() for t in saved) == [5, 5, 5, 5, x.numel()]


@pytest.mark.parametrize(("name", "device"), KERNELS)
@pytest.mark.parametrize("needed", range(3))
@pytest.mark.parametrize("training", [True, False])
def test_only_the_gradients_asked_for(name: str, device: str, needed: int, training: bool) -> None:
    case = make_case(1, training=training, device=device)
    arguments = [case.inputs[0], *case.norms[0][:2]]
    arguments[needed] = arguments[needed].clone().requires_grad_()
    with yf.backend(name):
        z = yf.ops.bn_silu(*arguments, *case.norms[0][2:], training=training, momentum=MOMENTUM, eps=EPS)
        (grad,) = torch.autograd.grad(z, arguments[needed], case.dz)
    torch.testing.assert_close(grad, run(case, name)[("dx0", "dweight0", "dbias0")[needed]])


@needs_cpu
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_gradcheck(training: bool, layout: str) -> None:
    case = make_case(1, (2, 3, 2, 3), dtype=torch.float64, layout=layout, residual=True, training=training)

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        running = [vector.clone() for vector in case.norms[0][2:]]
        return yf.ops.bn_silu(x, weight, bias, *running, training=training, momentum=0.1, eps=EPS, residual=residual)

    leaves = [t.detach().clone().requires_grad_() for t in (case.inputs[0], *case.norms[0][:2], case.residual)]
    with yf.backend("cpu"):
        assert torch.autograd.gradcheck(function, leaves)


def raw_arguments(case: Case) -> dict[str, tuple[Any, ...]]:
    """Arguments of every raw operator."""
    x, norm, dz = case.inputs[0], case.norms[0], case.dz
    statistics = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    given = (x, norm.weight, norm.bias, *statistics)
    return {
        "bn_silu_forward": (x, *norm, MOMENTUM, EPS, case.residual, torch.empty_like(x), True),
        "bn_silu_backward": (dz, *given, True),
        "bn_stats": (x,),
        "bn_combine": (torch.rand(3, 2 * x.shape[1] + 1), *norm[2:], MOMENTUM, EPS),
        "bn_silu_apply": (*given, case.residual, torch.empty_like(x), True),
        "bn_silu_backward_sums": (dz, *given, True),
        "bn_silu_backward_apply": (dz, *given, *statistics, True),
    }


@pytest.mark.parametrize("op", list(raw_arguments(make_case(1))))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(op: str, layout: str) -> None:
    arguments = raw_arguments(make_case(1, layout=layout, residual=True))[op]
    torch.library.opcheck(getattr(torch.ops.yolov9_fast, op).default, arguments)


@pytest.mark.slow
def test_compiles_in_one_graph_with_and_without_a_slot() -> None:
    def unit(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        buffer = torch.empty(2, 8, 4, 3)
        options: dict[str, Any] = {"training": True, "momentum": 0.1, "eps": EPS}
        y = yf.ops.bn_silu(x, weight, bias, mean, var, **options)
        return yf.ops.bn_silu(y, weight, bias, mean, var, **options, residual=x, out=buffer[:, 1:6]) * 2

    def gradients(function: Any) -> list[Tensor]:
        case = make_case(1, layout="contiguous")
        leaves = [t.clone().requires_grad_() for t in (case.inputs[0], *case.norms[0][:2])]
        running = [t.clone() for t in case.norms[0][2:]]
        z = function(*leaves, *running)
        return [z.detach(), *torch.autograd.grad(z, leaves, case.dz), *running]

    for result, expected in zip(gradients(torch.compile(unit, fullgraph=True)), gradients(unit), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_under_autocast_the_result_keeps_the_type_of_the_convolution(name: str, device: str) -> None:
    x, weight = torch.randn(2, 3, 4, 4, requires_grad=True, device=device), torch.randn(5, 3, 1, 1, device=device)
    gamma, beta = torch.ones(5, requires_grad=True, device=device), torch.zeros(5, requires_grad=True, device=device)
    with yf.backend(name), torch.autocast(device, torch.bfloat16):
        y = F.conv2d(x, weight)
        z = yf.ops.bn_silu(
            y,
            gamma,
            beta,
            torch.zeros(5, device=device),
            torch.ones(5, device=device),
            training=True,
            momentum=0.1,
            eps=EPS,
        )
    z.float().square().sum().backward()
    assert z.dtype == torch.bfloat16
    assert gamma.grad is not None
    assert gamma.grad.dtype == torch.float32


@pytest.mark.parametrize(("name", "device"), KERNELS)
def test_parameters_in_half_get_their_gradients_in_half(name: str, device: str) -> None:
    x = torch.randn(2, 5, 4, 3, device=device).half()
    weight = torch.ones(5, device=device).half().requires_grad_()
    with yf.backend(name):
        yf.ops.bn_silu(x, weight, None, None, None, training=True, momentum=0.1, eps=EPS).sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float16


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("recorded", [True, False])
def test_a_folded_unit_is_bias_and_silu_in_place_where_nothing_is_recorded(
    name: str, device: str, recorded: bool
) -> None:
    x, bias = torch.randn(2, 5, 4, 3, device=device), torch.randn(5, requires_grad=True, device=device)
    expected = F.silu(x + bias.detach().view(1, -1, 1, 1))
    with yf.backend(name), torch.set_grad_enabled(recorded):
        z = yf.ops.bias_silu(x, bias)
    torch.testing.assert_close(z.detach(), expected)
    assert (z.data_ptr() == x.data_ptr()) is not recorded
    if recorded:
        z.sum().backward()
        assert bias.grad is not None


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_a_folded_unit_adds_a_residual(name: str, device: str) -> None:
    x, bias, residual = (
        torch.randn(2, 5, 4, 3, device=device),
        torch.randn(5, device=device),
        torch.randn(2, 5, 4, 3, requires_grad=True, device=device),
    )
    expected = F.silu(x + bias.view(1, -1, 1, 1)) + residual
    with yf.backend(name):
        z = yf.ops.bias_silu(x, bias, residual=residual)
        (grad,) = torch.autograd.grad(z.sum(), residual)
        alone = yf.ops.bias_silu(x, bias, residual=residual.detach())
    torch.testing.assert_close(z, expected)
    assert torch.equal(grad, torch.ones_like(grad))
    assert z.data_ptr() != x.data_ptr()
    assert alone.data_ptr() == x.data_ptr()
    torch.testing.assert_close(alone, expected.detach())


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"x": torch.zeros(2, 5, 4)}, ValueError, r"x: expected \[B, C, H, W\], got \[2, 5, 4\]"),
        ({"x": torch.zeros(2, 5, 4, 3, dtype=torch.long)}, TypeError, "x: expected a tensor of .*, got torch.int64"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight: expected \[5\], got \[4\]"),
        ({"running_mean": None}, ValueError, "running_mean, running_var: expected two tensors or None twice"),
        (
            {"running_mean": None, "running_var": None, "training": False},
            ValueError,
            "running_mean, running_var: expected tensors when",
        ),
        ({"residual": torch.zeros(2, 5, 3, 4)}, ValueError, r"residual: expected \[2, 5, 4, 3\]"),
        ({"out": torch.zeros(2, 5, 4, 3).half()}, TypeError, "out: expected torch.float32"),
        (
            {"out": torch.zeros(2, 5, 4, 3, requires_grad=True)},
            ValueError,
            "out: expected a tensor that requires no gradient",
        ),
        ({"out": torch.zeros(2, 5, 4, 3, device="meta")}, ValueError, "out: expected a tensor on cpu, got one on meta"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, Any], kind: type[Exception], words: str) -> None:
    vectors = {name: torch.ones(5) for name in ("weight", "bias", "running_mean", "running_var")}
    arguments: dict[str, Any] = {"x": torch.zeros(2, 5, 4, 3), "training": True, "momentum": 0.1, "eps": EPS} | vectors
    with pytest.raises(kind, match=f"^{words}"):
        yf.ops.bn_silu(**(arguments | change))


@needs_cpu
def test_running_statistics_of_another_type_are_refused_by_name_and_run_eagerly_otherwise() -> None:
    x, half = torch.randn(2, 3, 4, 4).half(), torch.ones(3).half()
    with yf.backend("cpu"), pytest.raises(RuntimeError, match=r"needs running statistics in torch.float32, got"):
        yf.ops.bn_silu(x, half, half, half, half, training=False, momentum=0.1, eps=EPS)
    assert yf.ops.bn_silu(x, half, half, half, half, training=False, momentum=0.1, eps=EPS).dtype == torch.float16


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_vectors_have_the_dtype_of_x_or_float32_for_half_of_its_bits(
    name: str, device: str, dtype: torch.dtype
) -> None:
    if name == "triton" and dtype == torch.float64:
        pytest.skip("computes in float32")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 4, 4, generator=generator).to(device, dtype)
    normalised = F.batch_norm(x.double(), None, None, training=True)
    taken = {None, dtype} | ({torch.float32} if dtype in (torch.bfloat16, torch.float16) else set())
    for of_vectors in itertools.product((None, torch.float32, torch.float64, torch.bfloat16, torch.float16), repeat=3):
        weight, bias, mean = (None if d is None else torch.ones(3, dtype=d, device=device) for d in of_vectors)
        vectors = (weight, bias, mean, None if mean is None else mean.clone())
        with yf.backend(name):
            if not set(of_vectors) <= taken:
                with pytest.raises(TypeError, match=r"^\w+: expected torch.*, got torch"):
                    yf.ops.bn_silu(x, *vectors, training=True, momentum=0.1, eps=1e-5)
                continue
            with contextlib.suppress(yf.ops.BackendUnavailable):  # the statistics in half precision
                z = yf.ops.bn_silu(x, *vectors, training=True, momentum=0.1, eps=1e-5)
                expected = F.silu(normalised + (bias is not None))
                assert (z.double() - expected).abs().max() < (0.02 if dtype.itemsize == 2 else 1e-4)


def test_statistics_of_two_dtypes_are_refused() -> None:
    x, mean, var = torch.rand(2, 3, 4, 4).bfloat16(), torch.zeros(3), torch.ones(3).bfloat16()
    with pytest.raises(TypeError, match=r"running_var: expected torch.float32 as running_mean, got torch.bfloat16"):
        yf.ops.bn_silu(x, None, None, mean, var, training=False, momentum=0.1, eps=1e-3)


@needs_cpu
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("size", [320, 400])
def test_large_maps_of_16_bits(layout: str, size: int) -> None:
    """Up to 2^21 values the backward keeps act' dz between its passes; beyond, it computes it again."""
    assert (16 * 400 * size > 1 << 21) is (size == 400)
    assert_no_worse_than_eager(make_case(1, (1, 16, 400, size), dtype=torch.bfloat16, layout=layout), "cpu")


@needs_cpu
def test_the_sigmoid_of_16_bits_over_the_whole_range() -> None:
    y = torch.cat((torch.linspace(-100, 100, 8001), torch.tensor([-1e30, 1e30, torch.inf, 0.0]))).bfloat16()
    x = y[None, :, None, None]
    zero, one = torch.zeros(len(y)), torch.ones(len(y))
    with yf.backend("cpu", op="bn_silu"):
        z = yf.ops.bn_silu(x, None, None, zero, one, training=False, momentum=0.1, eps=0.0).flatten()
    exact = F.silu(y.double())
    torch.testing.assert_close(z.double(), exact, rtol=2**-8, atol=1e-36)
    assert z[-4] == 0
    assert z[-2] == torch.inf


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_threads_change_no_bit_of_16_bits(dtype: torch.dtype, layout: str) -> None:
    case = make_case(1, (4, 24, 40, 40), dtype=dtype, layout=layout)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(run(case, "cpu"))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name
