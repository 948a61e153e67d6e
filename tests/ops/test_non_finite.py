"""What values that are not finite, or near the ends of the range, give: what torch's own layers give, in every form."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import yolov9_fast as yf
from tests.devices import backends
from yolov9_fast import ops
from yolov9_fast.ops import Assignment, Norm
from yolov9_fast.ops._bn_silu import OPERATOR as BN_SILU
from yolov9_fast.ops._detection_loss import OPERATOR as LOSS

NAN, INF = math.nan, math.inf
BACKENDS = backends(BN_SILU)
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_silu_at_the_ends_of_the_range(name: str, device: str) -> None:
    values = torch.tensor([-INF, -3e38, -1e30, -1000, -90, -88, -86, 0, 90, 1e30, 3e38, INF, NAN], device=device)
    x = values.repeat(3).view(1, 1, 3, 13).requires_grad_()
    zeros, ones = torch.zeros(1, device=device), torch.ones(1, device=device)

    def run(one: str) -> tuple[Tensor, Tensor]:
        with yf.backend(one):
            z = ops.bn_silu(x, None, None, zeros, ones, training=False, momentum=0.1, eps=0.0)
        return z.detach(), torch.autograd.grad(z.sum(), x)[0]

    for found, expected in zip(run(name), (F.silu(x).detach(), run("eager")[1]), strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_a_channel_with_a_bad_value_is_nan_and_the_others_are_as_without(
    name: str, device: str, bad: float, memory_format: torch.memory_format
) -> None:
    x = torch.randn(2, 5, 4, 5, generator=torch.Generator().manual_seed(0)).to(device).to(memory_format=memory_format)
    spoiled = x.clone()
    spoiled[1, 3, 2, 4] = bad

    def run(x: Tensor) -> Tensor:
        with yf.backend(name):
            norm = Norm(None, None, torch.zeros(5, device=device), torch.ones(5, device=device))
            y = ops.bn_silu(x, *norm, training=True, momentum=0.1, eps=1e-3)
            return y + ops.rep_bn_silu(x, norm, x, norm, training=True, momentum=0.1, eps=1e-3)

    found, others = run(spoiled), [0, 1, 2, 4]
    assert found[:, 3].isnan().all()
    assert_same(found[:, others], run(x)[:, others])


@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_a_variance_beyond_float32_is_infinite(
    name: str, device: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    x = torch.randn(2, 5, 4, 5, generator=torch.Generator().manual_seed(0)).to(device)
    x[:, 1] *= 1e30
    x[0, 2, 0, 0] = -1e25
    x = x.to(dtype).to(memory_format=memory_format)
    bias, results = torch.arange(5.0, device=device), []
    for one in ("eager", name):
        mean, var = torch.zeros(5, device=device), torch.ones(5, device=device)
        with yf.backend(one):
            z = ops.bn_silu(x, None, bias, mean, var, training=True, momentum=0.1, eps=1e-3)
        results.append((z.float(), mean, var))
    (expected, expected_mean, expected_var), (found, mean, var) = results
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var, expected_var, rtol=1e-5, atol=1e-6)
    assert var[[1, 2]].isinf().all()
    torch.testing.assert_close(
        found[:, 1:3], F.silu(bias[1:3])[None, :, None, None].expand(2, 2, 4, 5), rtol=1e-2, atol=0
    )


@pytest.mark.parametrize(("name", "device"), backends(LOSS))
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_ground_truth_spoils_the_gradient_of_its_anchor_only(name: str, device: str, bad: float) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 66, side, side, generator=generator).to(device).requires_grad_() for side in (3, 2)]
    gt_index = torch.full((1, 13), -1, device=device)
    gt_index[0, 4], gt_index[0, 10] = 0, 1
    gt_boxes = torch.tensor([[[2.0, 3.0, 20.0, bad], [1.0, 1.0, 9.0, 8.0]]], device=device)
    labels = torch.zeros(1, 2, dtype=torch.int64, device=device)
    with yf.backend(name):
        items = ops.detection_loss(
            maps,
            Assignment(gt_index, torch.ones(1, 13, device=device)),
            labels,
            gt_boxes,
            torch.tensor(1.0, device=device),
            strides=(8, 16),
        )
        first, second = torch.autograd.grad(items.sum(), maps)
    assert items[1].isfinite()
    assert not items[0].isfinite()
    assert second.isfinite().all()
    bad_cells = ~first.isfinite().all(1)[0]
    assert bad_cells.nonzero().tolist() == [[1, 1]]
    assert first[0, 64:].isfinite().all()
