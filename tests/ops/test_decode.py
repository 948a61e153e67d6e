"""decode: distributions of sides to boxes in pixels, class logits to scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from yolov9_fast.ops import decode
from yolov9_fast.ops._boxes import anchor_points, ciou, xywh_to_xyxy, xyxy_to_xywh


def random_maps(classes: int = 3, size: tuple[int, int] = (64, 96), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 64 + classes, size[0] // s, size[1] // s) for s in (8, 16, 32)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def test_one_cell_by_hand() -> None:
    level = torch.full((1, 65, 2, 3), -100.0)
    for side, bin_ in enumerate((1, 0, 3, 2)):
        level[0, side * 16 + bin_] = 100.0
    level[0, 64] = 0.0
    out = decode([level], strides=[8])
    # Cell (row 1, column 2): centre (2.5, 1.5); left 1, top 0, right 3, bottom 2.
    x1, y1, x2, y2 = 1.5 * 8, 1.5 * 8, 5.5 * 8, 3.5 * 8
    assert out.shape == (1, 5, 6)
    assert out[0, :, 5].tolist() == pytest.approx([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, 0.5])


def test_the_side_is_the_mean_of_its_distribution() -> None:
    level = torch.zeros(1, 65, 1, 1)
    assert decode([level], strides=[32])[0, 2:4, 0].tolist() == pytest.approx([15 * 32.0, 15 * 32.0])


def test_anchors_are_ordered_by_level_row_and_column() -> None:
    points, stride = anchor_points([(2, 3), (1, 1)], [8, 16])
    assert points.tolist() == [[0.5, 0.5], [1.5, 0.5], [2.5, 0.5], [0.5, 1.5], [1.5, 1.5], [2.5, 1.5], [0.5, 0.5]]
    assert stride[:, 0].tolist() == [8.0] * 6 + [16.0]


def test_memory_layout_does_not_matter() -> None:
    maps = random_maps()
    strided = [level.to(memory_format=torch.channels_last) for level in maps]
    assert torch.equal(decode(maps), decode(strided))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_maps_are_decoded_in_float32(dtype: torch.dtype) -> None:
    maps = random_maps(dtype=dtype)
    expected = decode([level.float() for level in maps])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = decode(maps)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)


def test_gradient_equals_finite_differences() -> None:
    level = torch.randn(1, 66, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda x: decode([x], strides=[8]), level.requires_grad_())


def test_it_traces_in_one_graph() -> None:
    maps = random_maps()
    compiled = torch.compile(decode, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(maps), decode(maps))


@pytest.mark.parametrize(
    "shapes",
    [[], [(1, 70, 8, 8)], [(1, 64, 8, 8)] * 3, [(1, 70, 8, 8), (1, 70, 4, 4), (2, 70, 2, 2)], [(70, 8, 8)] * 3],
)
def test_maps_that_do_not_fit_are_refused(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"^maps: expected"):
        decode([torch.zeros(shape) for shape in shapes])


def test_corner_and_centre_form_are_inverse() -> None:
    boxes = torch.tensor([[1.0, 2.0, 5.0, 10.0]])
    assert xyxy_to_xywh(boxes).tolist() == [[3.0, 6.0, 4.0, 8.0]]
    assert torch.equal(xywh_to_xyxy(xyxy_to_xywh(boxes)), boxes)


def test_ciou_by_hand() -> None:
    a = torch.tensor([0.0, 0.0, 2.0, 2.0], dtype=torch.float64)
    assert ciou(a, a).item() == pytest.approx(1, abs=1e-6)
    # Same shape, moved by (1, 1): IoU 1/7, centre distance² 2, enclosing diagonal² 18.
    assert ciou(a, a + 1).item() == pytest.approx(1 / 7 - 2 / 18, abs=1e-6)
    # Disjoint: only the distance counts.
    assert ciou(a, a + 4).item() == pytest.approx(-32 / 72, abs=1e-6)
    # Another shape, same centre: IoU 1/2, v by its definition.
    wide = torch.tensor([-1.0, 0.0, 3.0, 2.0], dtype=torch.float64)
    v = 4 / torch.pi**2 * (torch.atan(torch.tensor(2.0)) - torch.pi / 4).item() ** 2
    assert ciou(a, wide).item() == pytest.approx(0.5 - v * v / (v - 0.5 + 1), abs=1e-6)


def test_ciou_gradient_equals_finite_differences_with_alpha_constant() -> None:
    # Equal aspect ratios: v and its gradient vanish, so that α does not matter.
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 5.0, 3.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, 0.5, 3.0, 2.5], [2.0, 1.5, 6.0, 3.5]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ciou(x, b), a.requires_grad_(), atol=1e-4)
    # Other ratios: finite differences of the formula with a constant α.
    tall = torch.tensor([0.0, 0.0, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    square = torch.tensor([0.0, 0.0, 3.0, 3.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(ciou(tall, square), tall)
    step = torch.eye(4, dtype=torch.float64) * 1e-6
    with torch.no_grad():
        alpha = _alpha(tall, square)
        slope = [(_ciou_at(tall + s, square, alpha) - _ciou_at(tall - s, square, alpha)) / 2e-6 for s in step]
    torch.testing.assert_close(gradient, torch.stack(slope), rtol=1e-4, atol=1e-6)


def _parts(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inter = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).prod()
    iou = inter / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inter)
    distance = ((a[:2] + a[2:] - b[:2] - b[2:]) / 2).square().sum()
    diagonal = (torch.maximum(a[2:], b[2:]) - torch.minimum(a[:2], b[:2])).square().sum()
    aspect = [torch.atan((box[2] - box[0]) / (box[3] - box[1])) for box in (a, b)]
    return iou, distance / diagonal, 4 / torch.pi**2 * (aspect[0] - aspect[1]).square()


def _alpha(a: Tensor, b: Tensor) -> Tensor:
    iou, _, v = _parts(a, b)
    return v / (v - iou + 1)


def _ciou_at(a: Tensor, b: Tensor, alpha: Tensor) -> Tensor:
    iou, distance, v = _parts(a, b)
    return iou - distance - alpha * v
