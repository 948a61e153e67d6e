"""detection_loss: each term by hand, its gradients, and batches without objects."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from yolov9_fast.ops import Assignment, detection_loss
from yolov9_fast.ops._boxes import ciou
from yolov9_fast.ops._detection_loss import class_loss, dfl_loss

STRIDES = (8,)


def case(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Assignment, Tensor, Tensor, Tensor]:
    """Two images of 2 × 3 cells and 3 classes; three anchors learn two ground truths."""
    generator = torch.Generator().manual_seed(0)
    level = torch.randn(2, 67, 2, 3, generator=generator, dtype=torch.float64).to(dtype)
    index = torch.full((2, 6), -1)
    weight = torch.zeros(2, 6, dtype=dtype)
    index[0, 1], index[0, 4], index[1, 2] = 0, 1, 0
    weight[0, 1], weight[0, 4], weight[1, 2] = 0.75, 0.5, 0.25
    labels = torch.tensor([[2, 0], [1, 0]])
    boxes = torch.tensor([[[2.0, 1.0, 20.0, 15.0], [4.0, 3.0, 24.0, 16.0]], [[10.0, 0.0, 23.0, 9.0], [0.0] * 4]])
    return [level], Assignment(index, weight), labels, boxes.to(dtype), torch.tensor(1.5, dtype=dtype)


def by_loops(level: Tensor, assignment: Assignment, labels: Tensor, boxes: Tensor, normaliser: Tensor) -> list[float]:
    """The formulas, one anchor and class at a time."""
    box = cls = dfl = 0.0
    for image in range(level.shape[0]):
        for anchor in range(6):
            row, column = divmod(anchor, 3)
            raw = level[image, :, row, column]
            gt, weight = int(assignment.gt_index[image, anchor]), assignment.weight[image, anchor].item()
            for label in range(3):
                target = weight if gt >= 0 and int(labels[image, gt]) == label else 0.0
                p = raw[64 + label].sigmoid().item()
                cls -= target * math.log(p) + (1 - target) * math.log(1 - p)
            if gt < 0:
                continue
            bins = raw[:64].view(4, 16).softmax(1)
            sides = (bins * torch.arange(16)).sum(1).tolist()
            x, y = column + 0.5, row + 0.5
            target_box = (boxes[image, gt] / 8).tolist()
            predicted = [x - sides[0], y - sides[1], x + sides[2], y + sides[3]]
            as_double = [torch.tensor(each, dtype=torch.float64) for each in (predicted, target_box)]
            box += weight * (1 - ciou(*as_double).item())
            distances = (x - target_box[0], y - target_box[1], target_box[2] - x, target_box[3] - y)
            for side, distance in enumerate(distances):
                distance = min(max(distance, 0.0), 14.99)
                low = int(distance)
                logs = bins[side].log().tolist()
                dfl -= weight / 4 * ((low + 1 - distance) * logs[low] + (distance - low) * logs[low + 1])
    return [each / normaliser.item() for each in (box, cls, dfl)]


def test_terms_equal_their_formulas() -> None:
    maps, *rest = case()
    result = detection_loss(maps, *rest, strides=STRIDES)
    assert result.tolist() == pytest.approx(by_loops(maps[0], *rest), rel=1e-9)


def test_gradient_of_class_and_dfl_equals_finite_differences() -> None:
    maps, *rest = case()
    # Without the box term: complete IoU treats α as a constant, so its gradient is not that of its value.
    assert torch.autograd.gradcheck(lambda x: detection_loss([x], *rest, strides=STRIDES)[1:], maps[0].requires_grad_())


def test_dfl_by_hand() -> None:
    bins = torch.zeros(1, 4, 16, dtype=torch.float64)
    bins[0, 0, 3], bins[0, 0, 4] = 2.0, 1.0
    distance = torch.tensor([[3.25, 0.0, 15.0, -1.0]], dtype=torch.float64)
    rest = math.log(math.exp(2) + math.exp(1) + 14)
    expected = (rest - 0.75 * 2 - 0.25 * 1 + 3 * math.log(16)) / 4
    assert dfl_loss(bins, distance).item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda x: dfl_loss(x, distance), bins.requires_grad_())


def test_distances_beyond_the_bins_learn_the_last_one() -> None:
    bins = torch.zeros(1, 4, 16, requires_grad=True)
    dfl_loss(bins, torch.full((1, 4), 40.0)).sum().backward()
    assert bins.grad is not None
    assert bins.grad[0, 0].argmin() == 15


def test_without_objects_only_class_logits_have_a_gradient() -> None:
    maps, assignment, *_ = case()
    nothing = Assignment(torch.full_like(assignment.gt_index, -1), torch.zeros_like(assignment.weight))
    level = maps[0].requires_grad_()
    empty = torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, 4, dtype=torch.float64)
    result = detection_loss([level], nothing, *empty, torch.tensor(1.0), strides=STRIDES)
    assert result[0].item() == result[2].item() == 0
    assert result[1].item() == pytest.approx(F.softplus(level[:, 64:]).sum().item())
    result.sum().backward()
    assert level.grad is not None
    assert level.grad[:, :64].count_nonzero() == 0
    torch.testing.assert_close(level.grad[:, 64:], level[:, 64:].sigmoid())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_maps_are_computed_in_float32(dtype: torch.dtype) -> None:
    maps, *rest = case(torch.float32)
    low = maps[0].to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = detection_loss([low], *rest, strides=STRIDES)
    assert result.dtype == torch.float32
    assert torch.equal(result, detection_loss([low.float()], *rest, strides=STRIDES))


def test_memory_layout_does_not_matter() -> None:
    maps, *rest = case(torch.float32)
    strided = [level.to(memory_format=torch.channels_last) for level in maps]
    expected = detection_loss(maps, *rest, strides=STRIDES)
    assert torch.equal(detection_loss(strided, *rest, strides=STRIDES), expected)


def test_positive_weight_scales_the_positive_part() -> None:
    logits, target = torch.tensor([0.3]), torch.tensor([0.5])
    p = logits.sigmoid()
    expected = -(3 * target * p.log() + (1 - target) * (1 - p).log())
    torch.testing.assert_close(class_loss(logits, target, class_pos_weight=3.0), expected[0])


def test_focal_loss_by_hand() -> None:
    logits, target = torch.tensor([0.3, -1.0]), torch.tensor([1.0, 0.0])
    p, q = logits.sigmoid().tolist()
    expected = -0.25 * (1 - p) ** 2 * math.log(p) - 0.75 * q**2 * math.log(1 - q)
    assert class_loss(logits, target, focal_gamma=2.0).item() == pytest.approx(expected, rel=1e-5)


def test_label_smoothing_spreads_an_assigned_anchors_target() -> None:
    maps, *rest = case()
    plain = detection_loss(maps, *rest, strides=STRIDES)
    smooth = detection_loss(maps, *rest, strides=STRIDES, label_smoothing=0.2)
    assert torch.equal(plain[[0, 2]], smooth[[0, 2]])
    # BCE is linear in the target: −logit · (change of the target).
    change = 0.0
    for image, anchor, label, weight in ((0, 1, 2, 0.75), (0, 4, 0, 0.5), (1, 2, 1, 0.25)):
        logits = maps[0][image, 64:].flatten(1)[:, anchor].tolist()
        change -= sum(logit * (-0.1 if c == label else 0.1) * weight for c, logit in enumerate(logits)) / 1.5
    assert (smooth - plain)[1].item() == pytest.approx(change)


def test_an_argument_that_does_not_fit_is_named() -> None:
    maps, assignment, labels, boxes, normaliser = case()
    with pytest.raises(ValueError, match=r"^assignment.gt_index: expected"):
        wrong = Assignment(assignment.gt_index[:, :5], assignment.weight)
        detection_loss(maps, wrong, labels, boxes, normaliser, strides=STRIDES)
    with pytest.raises(ValueError, match=r"^gt_boxes: expected"):
        detection_loss(maps, assignment, labels[:, :1], boxes, normaliser, strides=STRIDES)
    with pytest.raises(ValueError, match=r"^maps: expected"):
        detection_loss(maps, assignment, labels, boxes, normaliser)
