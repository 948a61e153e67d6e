"""Triton's 1×1 convolutions, pools and CBFuse, interpreted (or on the GPU), against float64 by eager's own error."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from yolov9_fast.kernels import adown_pool, cbfuse, concat, conv1x1, spp

from tests.ops.feature_maps import float32_precision

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (torch.channels_last, torch.contiguous_format)
# Interpreted, a case takes a second: `make test` runs one dtype in one layout, `make test-all` every pair.
CASES = [
    pytest.param(dtype, layout, marks=[] if dtype == torch.bfloat16 and layout == LAYOUTS[0] else [pytest.mark.slow])
    for dtype in DTYPES
    for layout in LAYOUTS
]


def new(shape: Sequence[int], dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return torch.randn(tuple(shape), device=DEVICE).to(dtype).contiguous(memory_format=layout)


def slot(shape: Sequence[int], dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    n, c, h, w = shape
    buffer = torch.full((n, c + 8, h, w), float("nan"), dtype=dtype, device=DEVICE).contiguous(memory_format=layout)
    return buffer[:, 8:], buffer[:, :8]


def assert_close(got: Tensor, exact: Tensor, roundings: float = 1.0) -> None:
    """Within so many roundings to the dtype of the largest value, and sums in float32."""
    allowed = (roundings * torch.finfo(got.dtype).eps + 4e-6) * max(float(exact.abs().max()), 1e-3)
    assert float((got.double() - exact).abs().max()) <= allowed


@pytest.mark.parametrize(("dtype", "layout"), CASES)
@pytest.mark.parametrize(
    ("channels", "outputs", "size"),
    [((24, 8, 16, 40), 16, (7, 5)), ((3, 5), 7, (3, 3)), ((16,), 48, (4, 4)), ((1, 2, 3, 4, 5, 6), 1, (2, 3))],
)
@pytest.mark.parametrize("turned", [False, True], ids=["weight", "transposed weight"])
def test_conv1x1_reads_and_writes_slices(
    channels: tuple[int, ...],
    outputs: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    layout: torch.memory_format,
    turned: bool,
) -> None:
    torch.manual_seed(1)
    inputs = [slot((2, c, *size), dtype, layout)[0] for c in channels]
    for x in inputs:
        x.copy_(torch.randn(x.shape))
    total = sum(channels)
    weight = new((total, outputs, 1, 1), dtype, LAYOUTS[1]).transpose(0, 1)
    weight = weight if turned else weight.contiguous()
    bias, dy = new((1, outputs, 1, 1), dtype, LAYOUTS[1]).flatten(), new((2, outputs, *size), dtype, layout)
    out, untouched = slot((2, outputs, *size), dtype, layout)
    with float32_precision("ieee"):
        conv1x1.conv1x1_forward(inputs, weight, bias, out)
        input_gradients = conv1x1.conv1x1_input_grad(dy, weight, channels)
        weight_gradient = conv1x1.conv1x1_weight_grad(dy, inputs)
    leaves = [x.double().requires_grad_() for x in inputs]
    matrix = weight.double().requires_grad_()
    exact = F.conv2d(torch.cat(leaves, 1), matrix, bias.double())
    exact.backward(dy.double())
    assert_close(out, exact.detach())
    assert untouched.isnan().all()
    for gradient, leaf in zip(input_gradients, leaves, strict=True):
        assert leaf.grad is not None
        assert_close(gradient, leaf.grad)
        assert gradient.is_contiguous(memory_format=layout) or outputs == 1  # one channel is both layouts
    assert matrix.grad is not None
    assert_close(weight_gradient, matrix.grad)


@pytest.mark.parametrize(("dtype", "layout"), CASES[:4])
@pytest.mark.parametrize("shape", [(2, 24, 7, 5), (1, 3, 3, 9)])
def test_spp_with_ties_is_three_max_pools(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    torch.manual_seed(2)
    x = (new(shape, torch.float32, layout) * 3).round().to(dtype)
    pooled = [slot(shape, dtype, layout)[0] for _ in range(3)]
    spp.spp_forward(x, *pooled)
    leaf = x.double().requires_grad_()
    exact = [leaf]
    for _ in range(3):
        exact.append(F.max_pool2d(exact[-1], 5, 1, 2))
    for got, want in zip(pooled, exact[1:], strict=True):
        assert torch.equal(got.double(), want)
    gradients = [new(shape, dtype, layout) for _ in range(4)]
    torch.autograd.backward([leaf * 1, *exact[1:]], [gradient.double() for gradient in gradients])
    assert leaf.grad is not None
    assert_close(spp.spp_backward(x, *pooled[:2], *gradients), leaf.grad)


def test_spp_passes_nan_and_minus_infinity_on_as_torch_does() -> None:
    x = torch.full((1, 8, 7, 7), float("-inf"), device=DEVICE).contiguous(memory_format=torch.channels_last)
    x[0, 1, 3, 3] = float("nan")
    pooled = [torch.empty_like(x) for _ in range(3)]
    spp.spp_forward(x, *pooled)
    want = x
    for got in pooled:
        want = F.max_pool2d(want, 5, 1, 2)
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize(("dtype", "layout"), CASES)
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 6, 7, 5), (1, 2, 2, 3)])
def test_adown_pool_is_torchs_two_pools(
    shape: tuple[int, ...], split: bool, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    torch.manual_seed(3)
    x = (new(shape, torch.float32, layout) * 3).round().to(dtype)
    first, second = adown_pool.adown_pool_forward(x, split)
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    outputs = [F.avg_pool2d(leaf, 2, 1)]
    if split:
        halves = outputs[0].chunk(2, 1)
        outputs = [halves[0], F.max_pool2d(halves[1], 3, 2, 1)]
    assert torch.equal(first, outputs[0])
    assert torch.equal(second, outputs[1]) if split else second.numel() == 0
    gradients = [new(out.shape, dtype, layout) for out in outputs]
    torch.autograd.backward(outputs, gradients)
    got = adown_pool.adown_pool_backward(gradients[0], gradients[1] if split else None, x, split)
    assert leaf.grad is not None
    assert_close(got, leaf.grad.double(), 2.0)
    if split:
        alone = adown_pool.adown_pool_backward(None, gradients[1], x, True)
        assert torch.equal(alone[:, shape[1] // 2 :], got[:, shape[1] // 2 :])
        assert not alone[:, : shape[1] // 2].any()


@pytest.mark.parametrize(("dtype", "layout"), CASES)
@pytest.mark.parametrize("shape", [(2, 24, 7, 5), (1, 3, 8, 12)])
def test_cbfuse_resizes_up_and_down_as_torch_does(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    torch.manual_seed(4)
    heights, widths = [3, 1, 14, 7, 2, 5], [2, 1, 9, 5, 3, 4]
    inputs = [new((*shape[:2], h, w), dtype, layout) for h, w in zip(heights, widths, strict=True)]
    target, dz = new(shape, dtype, layout), new(shape, dtype, layout)
    leaves = [x.double().requires_grad_() for x in inputs]
    exact = sum(F.interpolate(leaf, size=shape[2:], mode="nearest") for leaf in leaves) + target.double()
    exact.backward(dz.double())
    # Six inputs go through two launches, so two roundings.
    assert_close(cbfuse.cbfuse_forward(inputs, target), exact.detach(), 2.0)
    for got, leaf in zip(cbfuse.cbfuse_backward(dz, heights, widths), leaves, strict=True):
        assert leaf.grad is not None
        assert_close(got, leaf.grad)


@pytest.mark.parametrize(("dtype", "layout"), CASES)
@pytest.mark.parametrize(
    ("shape", "start", "count"),
    [
        ((2, 16, 3, 5), 8, 8),  # aligned: 16 bytes at a time
        ((2, 16, 4, 4), 3, 9),
        ((1, 7, 4, 4), 0, 7),
        ((3, 1, 3, 3), 0, 1),
        ((0, 4, 2, 2), 1, 2),
    ],
)
def test_tap_adds_a_slice_to_its_channels(
    shape: tuple[int, ...], start: int, count: int, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    torch.manual_seed(7)
    whole = new(shape, dtype, layout)
    part = slot((shape[0], count, *shape[2:]), dtype, layout)[0].copy_(
        new((shape[0], count, *shape[2:]), dtype, layout)
    )
    expected = whole.clone()
    expected[:, start : start + count] += part
    assert torch.equal(concat.tap_backward(whole, part, start), expected)
