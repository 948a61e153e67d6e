"""box_iou: its values against areas computed by hand and in float64, on every backend of this machine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import yolov9_fast as yf
from tests.devices import backends
from yolov9_fast.ops import _library as library
from yolov9_fast.ops._box_iou import OPERATOR

CPU_REASON = OPERATOR.why_not("cpu")
needs_cpu = pytest.mark.skipif(CPU_REASON is not None, reason=f"no compiled box_iou: {CPU_REASON}")
BACKENDS = backends(OPERATOR)
KERNELS = backends(OPERATOR, eager=False)


def random_boxes(count: int, seed: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator).to(device) * 600
    return torch.cat([corners, corners + torch.rand(count, 2, generator=generator).to(device) * 200], 1)


def float64_iou(a: Tensor, b: Tensor) -> Tensor:
    """A second implementation, in float64."""
    ax1, ay1, ax2, ay2 = a.double()[:, None].unbind(-1)
    bx1, by1, bx2, by2 = b.double()[None].unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    return width * height / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - width * height)


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_values_computed_by_hand(name: str, device: str) -> None:
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [10.0, 10.0, 14.0, 12.0]], device=device)
    b = torch.tensor(
        [[1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 2.0, 2.0], [12.0, 10.0, 16.0, 12.0], [2.0, 0.0, 4.0, 2.0]], device=device
    )
    with yf.backend(name):
        iou = yf.ops.box_iou(a, b)
    torch.testing.assert_close(iou, torch.tensor([[1 / 7, 1, 0, 0], [0, 0, 1 / 3, 0]], device=device))


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 33), (128, 17), (3, 1000)])
def test_close_to_float64(name: str, device: str, n: int, m: int) -> None:
    a, b = random_boxes(n, 0, device=device), random_boxes(m, 1, device=device)
    with yf.backend(name):
        iou = yf.ops.box_iou(a, b)
    # Subtracting corners of up to 800 pixels costs a few units of float32's 2**-24.
    torch.testing.assert_close(iou, float64_iou(a, b).float(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("name", "device"), KERNELS)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 10_000))
def test_compiled_and_eager_are_bitwise_identical(name: str, device: str, n: int, m: int, seed: int) -> None:
    a, b = random_boxes(n, seed, device=device), random_boxes(m, seed + 1, device=device).round()
    with yf.backend("eager"):
        eager = yf.ops.box_iou(a, b)
    with yf.backend(name):
        assert torch.equal(yf.ops.box_iou(a, b), eager)


@needs_cpu
def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    a, threads = random_boxes(700, 3), torch.get_num_threads()
    with yf.backend("cpu"):
        one = yf.ops.box_iou(a, a)
        torch.set_num_threads(2)
        try:
            two = yf.ops.box_iou(a, a)
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(one, two)


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 5), (5, 0)])
def test_no_boxes_give_an_empty_matrix(name: str, device: str, n: int, m: int) -> None:
    with yf.backend(name):
        assert yf.ops.box_iou(torch.zeros(n, 4, device=device), torch.zeros(m, 4, device=device)).shape == (n, m)


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_boxes_without_area_have_iou_zero_and_nan_stays_nan(name: str, device: str) -> None:
    nan = float("nan")
    odd = torch.tensor([[1.0, 1, 1, 1], [3, 3, 1, 1], [1, 1, 1, 5], [nan, 0, 2, 2], [0, 0, 2, nan]], device=device)
    square = torch.tensor([[0.0, 0, 4, 4]], device=device)
    with yf.backend(name):
        torch.testing.assert_close(yf.ops.box_iou(odd, odd[:3])[:3], torch.zeros(3, 3, device=device))
        assert yf.ops.box_iou(odd, square).isnan().flatten().tolist() == [False, False, False, True, True]
        assert yf.ops.box_iou(square, odd).isnan().flatten().tolist() == [False, False, False, True, True]


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_slices_of_wider_tables_are_read_in_place(name: str, device: str) -> None:
    table = torch.full((20, 6), float("nan"), device=device)
    table[:, 1:5] = random_boxes(20, 5, device=device)
    columns_first = random_boxes(9, 6, device=device).T.contiguous().T
    with yf.backend(name):
        iou = yf.ops.box_iou(table[::2, 1:5], columns_first)
        assert torch.equal(iou, yf.ops.box_iou(table[::2, 1:5].contiguous(), columns_first.contiguous()))


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_dtype_is_computed_in_float32(name: str, device: str, dtype: torch.dtype) -> None:
    boxes = random_boxes(10, 7, device=device).to(dtype)
    with yf.backend(name):
        iou = yf.ops.box_iou(boxes, boxes)
        assert iou.dtype == torch.float32
        assert torch.equal(iou, yf.ops.box_iou(boxes.float(), boxes.float()))


def test_auto_differentiates_the_eager_implementation(device: str) -> None:
    a, b = random_boxes(3, 8, device=device).requires_grad_(), random_boxes(4, 9, device=device)
    yf.ops.box_iou(a, b).sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    assert a.grad.abs().sum() > 0


def test_the_gradient_of_boxes_without_area_is_finite(device: str) -> None:
    a = torch.ones(1, 4, requires_grad=True, device=device)
    yf.ops.box_iou(a, a.detach()).sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()


@pytest.mark.parametrize(("name", "device"), KERNELS)
def test_the_compiled_kernel_refuses_a_gradient(name: str, device: str) -> None:
    boxes = random_boxes(2, 0, device=device).requires_grad_()
    with yf.backend(name), pytest.raises(RuntimeError, match="no gradient"):
        yf.ops.box_iou(boxes, boxes)
    with yf.backend(name), torch.no_grad():
        assert yf.ops.box_iou(boxes, boxes).shape == (2, 2)


@pytest.mark.parametrize("wrong", [torch.zeros(4), torch.zeros(2, 5), torch.zeros(1, 2, 4)])
def test_a_wrong_shape_is_named(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^b: expected \[N, 4\], got \["):
        yf.ops.box_iou(torch.zeros(1, 4), wrong)


@pytest.mark.parametrize("wrong", [torch.zeros(1, 4, dtype=torch.long), [[0, 0, 1, 1]]])
def test_a_wrong_type_is_named(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"^a: expected a floating-point tensor, got "):
        yf.ops.box_iou(wrong, torch.zeros(1, 4))  # type: ignore[arg-type]


def test_different_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^a, b: expected tensors on one device, got a on cpu, b on meta"):
        yf.ops.box_iou(torch.zeros(1, 4), torch.zeros(1, 4, device="meta"))


def test_backend_cuda_with_tensors_on_the_cpu_raises() -> None:
    with yf.backend("cuda"), pytest.raises(RuntimeError, match="cannot run"):
        yf.ops.box_iou(torch.zeros(1, 4), torch.zeros(1, 4))


@pytest.mark.parametrize("boxes", [random_boxes(5, 1), torch.zeros(0, 4), torch.rand(4, 6).T[:, :4]])
def test_opcheck(boxes: Tensor) -> None:
    torch.library.opcheck(torch.ops.yolov9_fast.box_iou.default, (boxes, random_boxes(3, 2)))


@pytest.mark.slow
def test_compiles_in_one_graph() -> None:
    compiled = torch.compile(yf.ops.box_iou, fullgraph=True)
    a, b = random_boxes(6, 1), random_boxes(4, 2)
    torch.testing.assert_close(compiled(a, b), yf.ops.box_iou(a, b))


@pytest.mark.skipif(library.loaded["cuda"] is not None, reason=f"no CUDA part: {library.loaded['cuda']}")
def test_the_cuda_part_loads_without_a_gpu() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("yolov9_fast::box_iou", "CUDA")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("n", "m"), [(0, 3), (1, 1), (300, 77), (70_000, 3)])
def test_cuda_is_bitwise_identical_to_the_cpu(n: int, m: int) -> None:
    a, b = random_boxes(n, 0), random_boxes(m, 1)
    with yf.backend("eager"):
        expected = yf.ops.box_iou(a, b)
    with yf.backend("cuda"):
        assert torch.equal(yf.ops.box_iou(a.cuda(), b.cuda()).cpu(), expected)
