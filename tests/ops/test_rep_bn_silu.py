"""rep_bn_silu: as bn_silu, for the two branches of RepConv."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import yolov9_fast as yf
from tests.devices import backends
from tests.ops.batch_norm_cases import (
    EPS,
    LAYOUTS,
    MOMENTUM,
    Case,
    assert_no_worse_than_eager,
    call,
    error,
    laid_out,
    make_case,
    run,
    truth,
)
from yolov9_fast.ops import Norm
from yolov9_fast.ops._rep_bn_silu import OPERATOR

CPU_REASON = OPERATOR.why_not("cpu")
needs_cpu = pytest.mark.skipif(CPU_REASON is not None, reason=f"no compiled rep_bn_silu: {CPU_REASON}")
BACKENDS = backends(OPERATOR, interpreted=False)
KERNELS = backends(OPERATOR, eager=False, interpreted=False)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS: dict[str, Any] = {"training": True, "momentum": MOMENTUM, "eps": EPS}


@pytest.mark.parametrize(("name", "device"), KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 24, 5, 5), (1, 16, 30, 33)], ids=str)
def test_every_dtype_layout_and_odd_size(
    name: str, device: str, dtype: torch.dtype, layout: str, shape: tuple[int, int, int, int]
) -> None:
    if name == "triton" and dtype == torch.float64:
        pytest.skip("computes in float32")
    assert_no_worse_than_eager(make_case(2, shape, dtype=dtype, layout=layout, device=device), name)


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
    assert_no_worse_than_eager(make_case(2, layout=layout, **options, device=device), name)


@pytest.mark.parametrize(
    "options",
    [{}, {"layout": "planes_slice"}, {"training": False}, {"dtype": torch.bfloat16, "residual": True}],
    ids=str,
)
@pytest.mark.parametrize(("name", "device"), backends(OPERATOR, eager=False))
def test_every_backend(name: str, device: str, options: dict[str, Any]) -> None:
    assert_no_worse_than_eager(make_case(2, **options, device=device), name)


@pytest.mark.slow
@needs_cpu
def test_a_thousand_seeded_cases_in_float64() -> None:
    for seed in range(1000):
        shape = (1 + seed % 3, 1 + seed % 37, 1 + seed % 5, 2 + seed % 4)
        case = make_case(2, shape, dtype=torch.float64, layout=LAYOUTS[seed % 4], residual=seed % 3 == 0, seed=seed)
        true, ours = truth(case), run(case, "cpu")
        for name, expected in true.items():
            assert error(ours[name], expected, 1e-3) < 1e-10, (seed, name)


@needs_cpu
def test_a_mean_of_a_thousand_deviations_does_not_cancel() -> None:
    assert_no_worse_than_eager(make_case(2, (4, 24, 20, 20), mean=1e3), "cpu")


@pytest.mark.parametrize(("name", "device"), KERNELS)
def test_inputs_in_two_layouts(name: str, device: str) -> None:
    case = make_case(2, device=device)
    mixed = Case([case.inputs[0], laid_out(case.inputs[1], "contiguous")], case.norms, laid_out(case.dz, "strided"))
    expected, ours = run(case, name), run(mixed, name)
    for key in expected:
        assert torch.equal(expected[key], ours[key]), key


@needs_cpu
def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    case, threads = make_case(2, (4, 24, 50, 50)), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(case, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_a_slot_is_written_and_differentiated(name: str, device: str, training: bool) -> None:
    case = make_case(2, training=training, device=device)
    buffer = torch.full((2, 12, 4, 3), float("nan"), device=device).contiguous(memory_format=torch.channels_last)
    expected, into = run(case, name), run(case, name, buffer[:, 4:9])
    assert all(torch.equal(expected[key], into[key]) for key in expected)
    assert torch.equal(buffer[:, 4:9], expected["z"])
    assert buffer[:, :4].isnan().all()
    assert buffer[:, 9:].isnan().all()


@pytest.mark.parametrize(("name", "device"), KERNELS)
def test_one_branch_of_the_same_input_twice_is_twice_its_normalisation(name: str, device: str) -> None:
    x = torch.randn(2, 5, 4, 3, device=device)
    norm = Norm(None, None)
    with yf.backend(name):
        both = yf.ops.rep_bn_silu(x, norm, x, norm, **OPTIONS, activation=False)
        one = yf.ops.bn_silu(x, *norm, **OPTIONS, activation=False)
    torch.testing.assert_close(both, 2 * one)


@needs_cpu
def test_gradcheck() -> None:
    case = make_case(2, (2, 3, 2, 3), dtype=torch.float64, residual=True)

    def function(x1: Tensor, x2: Tensor, *others: Tensor) -> Tensor:
        norms = [Norm(*others[0:2]), Norm(*others[2:4])]
        return call([x1, x2], norms, **OPTIONS, residual=others[4])

    leaves = [*case.inputs, *case.norms[0][:2], *case.norms[1][:2], case.residual]
    with yf.backend("cpu"):
        assert torch.autograd.gradcheck(function, [t.detach().clone().requires_grad_() for t in leaves])


@pytest.mark.parametrize(("name", "device"), KERNELS)
def test_a_second_derivative_is_refused(name: str, device: str) -> None:
    x = torch.randn(2, 5, 4, 3, requires_grad=True, device=device)
    norm = Norm(None, None)
    with yf.backend(name):
        z = yf.ops.rep_bn_silu(x, norm, x, norm, **OPTIONS)
        (grad,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.sum().backward()


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_an_empty_batch_and_one_value_a_channel(name: str, device: str) -> None:
    norm = Norm(
        torch.ones(3, requires_grad=True, device=device),
        None,
        torch.zeros(3, device=device),
        torch.ones(3, device=device),
    )
    empty, single = torch.zeros(0, 3, 2, 2, requires_grad=True, device=device), torch.zeros(1, 3, 1, 1, device=device)
    with yf.backend(name):
        z = yf.ops.rep_bn_silu(empty, norm, empty, norm, **OPTIONS)
        z.sum().backward()
        assert z.shape == empty.shape
        assert norm.running_var is not None
        assert norm.running_var.tolist() == [1, 1, 1]
        with pytest.raises(ValueError, match=r"[Ee]xpected more than 1 value per channel"):
            yf.ops.rep_bn_silu(single, norm, single, norm, **OPTIONS)


def raw_arguments(case: Case) -> dict[str, tuple[Any, ...]]:
    """Arguments of every raw operator."""
    mean, rstd = torch.zeros(case.dz.shape[1]), torch.ones(case.dz.shape[1])
    given, forward = [], []
    for x, norm in zip(case.inputs, case.norms, strict=True):
        given += [x, norm.weight, norm.bias, mean, rstd]
        forward += [x, *norm]
    out = torch.empty_like(case.dz)
    return {
        "rep_bn_silu_forward": (*forward, MOMENTUM, EPS, case.residual, out, True),
        "rep_bn_silu_backward": (case.dz, *given, True),
        "rep_bn_silu_apply": (*given, case.residual, out, True),
        "rep_bn_silu_backward_sums": (case.dz, *given, True),
        "rep_bn_silu_backward_apply": (case.dz, *given, mean, mean, mean, True),
    }


@pytest.mark.parametrize("op", list(raw_arguments(make_case(2))))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(op: str, layout: str) -> None:
    arguments = raw_arguments(make_case(2, layout=layout, residual=True))[op]
    torch.library.opcheck(getattr(torch.ops.yolov9_fast, op).default, arguments)


@pytest.mark.slow
def test_compiles_in_one_graph() -> None:
    def unit(x1: Tensor, x2: Tensor, *vectors: Tensor) -> Tensor:
        return yf.ops.rep_bn_silu(x1, Norm(*vectors[:4]), x2, Norm(*vectors[4:]), **OPTIONS)

    def gradients(function: Any) -> list[Tensor]:
        case = make_case(2, layout="contiguous")
        leaves = [t.clone().requires_grad_() for t in (*case.inputs, *case.norms[0][:2], *case.norms[1][:2])]
        running = [t.clone() for norm in case.norms for t in norm[2:]]
        z = function(*leaves[:4], *running[:2], *leaves[4:], *running[2:])
        return [z.detach(), *torch.autograd.grad(z, leaves, case.dz), *running]

    for result, expected in zip(gradients(torch.compile(unit, fullgraph=True)), gradients(unit), strict=True):
        torch.testing.assert_close(result, expected)


def test_a_wrong_argument_is_named() -> None:
    x, norm = torch.zeros(2, 5, 4, 3), Norm(None, None)
    with pytest.raises(ValueError, match=r"^x2: expected \[2, 5, 4, 3\], got \[2, 3, 4, 3\]"):
        yf.ops.rep_bn_silu(x, norm, x[:, :3], norm, **OPTIONS)
    with pytest.raises(TypeError, match=r"^x2: expected torch.float32 as x1"):
        yf.ops.rep_bn_silu(x, norm, x.half(), norm, **OPTIONS)
    with pytest.raises(ValueError, match=r"^norm2.bias: expected \[5\], got \[4\]"):
        yf.ops.rep_bn_silu(x, norm, x, Norm(None, torch.zeros(4)), **OPTIONS)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_that_accumulate_stay_apart(training: bool, device: str) -> None:
    """The biases' gradients are equal, and must not be one tensor: the second backward adds to each."""
    torch.manual_seed(0)
    maps = [torch.randn(2, 5, 4, 3, device=device) for _ in range(2)]
    norms = [
        Norm(
            torch.rand(5, device=device).requires_grad_(),
            torch.rand(5, device=device).requires_grad_(),
            torch.zeros(5, device=device),
            torch.ones(5, device=device),
        )
        for _ in range(2)
    ]

    def backward() -> list[torch.Tensor]:
        z = yf.ops.rep_bn_silu(maps[0], norms[0], maps[1], norms[1], training=training, momentum=0.0, eps=1e-3)
        z.square().sum().backward()
        return [vector.grad.clone() for norm in norms for vector in norm[:2]]

    once, twice = backward(), backward()
    for first, second in zip(once, twice, strict=True):
        torch.testing.assert_close(second, 2 * first)
