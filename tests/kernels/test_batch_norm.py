"""Triton's BatchNorm + SiLU, alone and of RepConv, interpreted or on the GPU, against float64 by eager's error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from yolov9_fast.kernels import batch_norm, bn_silu, bn_silu_single_pass, rep_bn_silu
from yolov9_fast.kernels.config import Tile
from yolov9_fast.kernels.launch import recording, views

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (torch.channels_last, torch.contiguous_format)
# `make test` interprets float32 in one layout and bfloat16 in the other, `make test-all` every pair.
FAST = ((torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last))
CASES = [
    pytest.param(dtype, layout, marks=[] if (dtype, layout) in FAST else [pytest.mark.slow])
    for dtype in DTYPES
    for layout in LAYOUTS
]
SHAPES = ((2, 24, 7, 5), (3, 5, 1, 3), (2, 16, 8, 8), (1, 1, 3, 2))


@pytest.fixture(params=["tiled", "single pass"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "tiled":
        monkeypatch.setattr(bn_silu_single_pass, "tile_of", lambda view, vector, tensors: None)
    return str(request.param)


ULPS = 2 if torch.device(DEVICE).type == "cpu" and "tests.ptx.plugin" not in sys.modules else 4
"""A GPU's `ex2`, or the emulated one, errs by two itself."""


def assert_no_worse(got: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """err(got) ≤ 2 × err(eager), both against float64, with a few ulp of the scale for tiny cases."""
    for index, (a, b, c) in enumerate(zip(got, eager, exact, strict=True)):
        assert a.isfinite().all(), index
        floor = ULPS * torch.finfo(a.dtype).eps * float(c.abs().max())
        error, allowed = float((a.double() - c).abs().max()), 2 * float((b.double() - c).abs().max()) + floor
        assert error <= allowed, f"result {index}: error {error:.3g}, allowed {allowed:.3g}"


def new(shape: Sequence[int], dtype: torch.dtype, layout: torch.memory_format, mean: float = 0.0) -> Tensor:
    return (torch.randn(tuple(shape), device=DEVICE) * 2 + mean).to(dtype).contiguous(memory_format=layout)


def slot(x: Tensor, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    """A slice of 8 channels in of a buffer full of NaN, like `x`, and the part before it."""
    n, c, h, w = x.shape
    buffer = torch.full((n, c + 8, h, w), float("nan"), dtype=x.dtype, device=DEVICE).contiguous(memory_format=layout)
    return buffer[:, 8:], buffer[:, :8]


def differentiate(function: Callable[..., Tensor], leaves: Sequence[Tensor], dz: Tensor) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    out.backward(dz.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize(("dtype", "layout"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bn_silu(form: str, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    torch.manual_seed(1)
    x, dz, residual = new(shape, dtype, layout, 3.0), new(shape, dtype, layout), new(shape, dtype, layout)
    weight, bias = torch.randn(shape[1], device=DEVICE), torch.randn(shape[1], device=DEVICE)
    running = [torch.zeros(shape[1], device=DEVICE), torch.ones(shape[1], device=DEVICE)]
    expected = [part.double() for part in running]
    out, untouched = slot(x, layout)
    strided = slot(x, layout)[0].copy_(dz)
    mean, rstd = bn_silu.bn_silu_forward(x, weight, bias, *running, 0.03, 1e-3, residual, out, True)
    gradients = bn_silu.bn_silu_backward(strided, x, weight, bias, mean, rstd, True)

    def unit(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.batch_norm(x, None, None, weight, bias, True, 0.03, 1e-3)) + residual.to(x.dtype)

    eager = differentiate(unit, [x, weight, bias], dz)
    exact = differentiate(unit, [part.double() for part in (x, weight, bias)], dz)
    assert_no_worse([out, *gradients], eager, exact)
    assert untouched.isnan().all()
    F.batch_norm(x.double(), *expected, training=True, momentum=0.03)
    torch.testing.assert_close(running, [part.float() for part in expected], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "layout"), CASES)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_rep_bn_silu(form: str, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    torch.manual_seed(2)
    x1, x2, dz, residual = (new(shape, dtype, layout, mean) for mean in (2.0, -1.0, 0.0, 0.0))
    weight1, bias1, weight2, bias2 = (torch.randn(shape[1], device=DEVICE) for _ in range(4))
    out, untouched = slot(x1, layout)
    vectors = rep_bn_silu.rep_bn_silu_forward(
        x1, weight1, bias1, None, None, x2, weight2, bias2, None, None, 0.03, 1e-3, residual, out, True
    )
    dx1, dx2, *rest = rep_bn_silu.rep_bn_silu_backward(
        dz, x1, weight1, bias1, *vectors[:2], x2, weight2, bias2, *vectors[2:], True
    )

    def unit(x1: Tensor, x2: Tensor, *parameters: Tensor) -> Tensor:
        one = F.batch_norm(x1, None, None, *parameters[:2], True, 0.03, 1e-3)
        return F.silu(one + F.batch_norm(x2, None, None, *parameters[2:], True, 0.03, 1e-3)) + residual.to(x1.dtype)

    leaves = [x1, x2, weight1, bias1, weight2, bias2]
    eager = differentiate(unit, leaves, dz)
    exact = differentiate(unit, [leaf.double() for leaf in leaves], dz)
    assert_no_worse([out, dx1, dx2, *rest], eager, exact)
    assert untouched.isnan().all()


@pytest.mark.parametrize("layout", [LAYOUTS[0], pytest.param(LAYOUTS[1], marks=pytest.mark.slow)])
def test_statistics_survive_a_mean_of_a_thousand_deviations(form: str, layout: torch.memory_format) -> None:
    torch.manual_seed(3)
    x = (torch.randn(2, 4, 64, 64, device=DEVICE) + 1000.0).contiguous(memory_format=layout)
    mean, m2 = bn_silu.bn_stats(x)
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=2e-7, atol=0)
    spread = (exact - exact.mean((0, 2, 3), keepdim=True)).square().sum((0, 2, 3))
    torch.testing.assert_close(m2.double(), spread, rtol=1e-4, atol=0)
    out = torch.empty_like(x)
    _, rstd = bn_silu.bn_silu_forward(x, None, None, None, None, 0.1, 0.0, None, out, False)
    torch.testing.assert_close(rstd.double(), (spread / 8192).rsqrt(), rtol=1e-4, atol=0)


def test_statistics_of_four_million_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    if DEVICE == "cpu":  # the interpreter's time goes with the number of tiles
        monkeypatch.setattr(batch_norm, "tile", lambda *_: Tile(65536, 1, 4))
        monkeypatch.setattr(batch_norm, "PROGRAMS", 16)
    x = (torch.randn(1, 1, 2048, 2048, device=DEVICE) + 1000.0).contiguous()
    mean, m2 = bn_silu.bn_stats(x)
    exact = x.double()
    assert abs(float(mean) - float(exact.mean())) < 6.2e-5  # one ulp of 1000
    assert float(m2) == pytest.approx(float((exact - exact.mean()).square().sum()), rel=1e-4)


def test_given_statistics_and_sums_make_the_same_gradients() -> None:
    torch.manual_seed(5)
    x, dz = new((2, 24, 7, 5), torch.float32, LAYOUTS[0]), new((2, 24, 7, 5), torch.float32, LAYOUTS[0])
    weight, bias = torch.randn(24, device=DEVICE), torch.randn(24, device=DEVICE)
    out = torch.empty_like(x)
    mean, rstd = bn_silu.bn_silu_forward(x, weight, bias, None, None, 0.1, 1e-3, None, out, True)
    again = x.clone(memory_format=torch.preserve_format)
    bn_silu.bn_silu_apply(again, weight, bias, mean, rstd, None, again, True)
    torch.testing.assert_close(again, out)
    dx, dweight, dbias = bn_silu.bn_silu_backward(dz, x, weight, bias, mean, rstd, True)
    sums = bn_silu.bn_silu_backward_sums(dz, x, weight, bias, mean, rstd, True)
    torch.testing.assert_close(sums, torch.stack((dbias, dweight)))
    parts = bn_silu.bn_silu_backward_apply(dz, x, weight, bias, mean, rstd, *(sums / 70), True)
    torch.testing.assert_close(parts, dx)


def test_an_empty_batch_has_zero_statistics() -> None:
    mean, m2 = bn_silu.bn_stats(torch.empty(0, 8, 4, 4, device=DEVICE))
    assert not mean.any()
    assert not m2.any()


def test_what_cannot_be_written_is_refused() -> None:
    x = torch.zeros(2, 8, 4, 4, device=DEVICE)
    with pytest.raises(ValueError, match="out: expected channels_last, contiguous, or channel slices"):
        bn_silu.bn_silu_apply(
            x, None, None, x[0, :, 0, 0], x[0, :, 0, 0], None, torch.zeros(2, 8, 4, 8)[..., ::2], True
        )
    with pytest.raises(TypeError, match="float64"):
        bn_silu.bn_stats(x.double())


def test_two_runs_give_the_same_bits() -> None:
    x = new((2, 24, 19, 17), torch.float32, LAYOUTS[0])
    first, second = batch_norm.bn_stats(x), batch_norm.bn_stats(x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_stage_loads_all_partials_at_once() -> None:
    """One turn of its loop where the first stage has as many programs as it may; more images than that take more."""
    x = torch.empty((32, 64, 80, 80), dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    vector = torch.empty(64, device="meta")
    partials = batch_norm.plan("bn_statistics_kernel", views(x)[0], 8).partials
    with recording(90) as seen:
        batch_norm.bn_stats(x)
        bn_silu.bn_silu_backward_sums(x, x, vector, vector, vector, vector, True)
    last = [dict(launch.constants) for launch in seen if launch.kernel in ("bn_finish_kernel", "column_sums_kernel")]
    assert 64 < partials <= batch_norm.PROGRAMS
    assert [-(-partials // constants["BLOCK_G"]) for constants in last] == [1, 1]
    for count in range(1, batch_norm.PROGRAMS + 1):
        tile = batch_norm.finishing(count)
        assert count <= tile["BLOCK_G"]
        assert tile["BLOCK_G"] * tile["BLOCK_C"] <= 16 * 32 * tile["warps"]


@pytest.mark.parametrize("partials", [1, 63, 1000, 1024, 1500])
def test_second_stages_add_as_exactly_as_float64(partials: int) -> None:
    """Blocks of 8 pixels, the last of 5, about a mean of 1000."""
    torch.manual_seed(6)
    channels, span = 3, 8
    pixels = partials * span - 3
    partial = torch.stack((torch.randn(partials, channels) + 1000.0, torch.rand(partials, channels) * span)).to(DEVICE)
    mean, m2 = (torch.empty(channels, device=DEVICE) for _ in range(2))
    tile = batch_norm.finishing(partials)
    arguments = (partial, mean, m2, None, None, 0.0, 0.0, partials, channels, partials, span, pixels, pixels)
    batch_norm.bn_finish_kernel((1,), *arguments, RSTD=False, **tile)
    means, spreads = partial.double()
    count = torch.full((partials, 1), float(span), dtype=torch.float64, device=DEVICE)
    count[-1] = span - 3
    exact = (means * count).sum(0) / pixels
    torch.testing.assert_close(mean.double(), exact, rtol=1.2e-7, atol=0)
    expected = (spreads + count * (means - exact).square()).sum(0)
    torch.testing.assert_close(m2.double(), expected, rtol=2e-6 if partials > 1 else 1e-6, atol=1e-6)
    sums = torch.empty(channels, device=DEVICE)
    batch_norm.column_sums(partial[1:], sums)
    # Interpreted, numpy adds the rows one after the other; a GPU adds them as a tree.
    torch.testing.assert_close(sums.double(), spreads.sum(0), rtol=3e-6, atol=0)
