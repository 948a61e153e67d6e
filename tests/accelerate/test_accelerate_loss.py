"""accelerate_loss: losses of the published shapes, written here with dense assigners, give the same by `ops.assign`."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import yolov9_fast as yf
from yolov9_fast._accelerate.loss import FastAssigner, FastMatcher
from yolov9_fast.ops._boxes import anchor_points, ciou

DENSE = Path(__file__).resolve().parents[2] / "bench" / "dense_assigner.py"
_spec = importlib.util.spec_from_file_location("dense_assigner_of_tests", DENSE)
assert _spec is not None
assert _spec.loader is not None
_dense = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _dense
_spec.loader.exec_module(_dense)

CLASSES, SIZE = 6, 128
CELLS = [(SIZE // each, SIZE // each) for each in (8, 16, 32)]
_centres, STRIDES = anchor_points(CELLS)
POINTS = _centres * STRIDES


class TaskAlignedAssigner(_dense.DenseAssigner):
    """As in the published YOLOv9: four outputs."""

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        return super().forward(*args)[:4]


class _OfUltralytics(_dense.DenseAssigner):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(inside_only=True, **kwargs)


class _LengthensShortSides(_OfUltralytics):
    """As later versions: a side shorter than a value that the instance holds has that length for the candidates."""

    def inside(self, points: Tensor, gt_boxes: Tensor) -> Tensor:
        least = getattr(self, "stride_val", None) or self.stride[0]
        low, high = gt_boxes.chunk(2, -1)
        middle, half = (low + high) / 2, (high - low).clamp(min=least) / 2
        return super().inside(points, torch.cat((middle - half, middle + half), -1))


def of_ultralytics(base: type = _OfUltralytics) -> type:
    """A class by the name and module by which theirs goes."""
    return type("TaskAlignedAssigner", (base,), {"__module__": "ultralytics.utils.tal"})


def lengthening(**attributes: Any) -> Any:
    assigner = of_ultralytics(_LengthensShortSides)(num_classes=CLASSES)
    vars(assigner).update(attributes)
    return SimpleNamespace(assigner=assigner)


class RenamedAssigner(_dense.DenseAssigner):
    pass


class DualLoss:
    """No module, like the published one: two branches, an assigner each."""

    def __init__(self, kind: type = TaskAlignedAssigner) -> None:
        self.assigner = kind(topk=10, num_classes=CLASSES, alpha=0.5, beta=6.0)
        self.assigner2 = kind(topk=7, num_classes=CLASSES, alpha=1.0, beta=4.0)

    def __call__(self, *case: Tensor) -> Tensor:
        total = torch.zeros(())
        for assigner in (self.assigner, self.assigner2):
            _, boxes, scores, foreground = assigner(*case)[:4]
            total = total + scores.sum() + (boxes * foreground[..., None]).sum() / 1000
        return total


class BoxMatcher:
    """The dense form of rule "mit": targets [B, N, 5] with class −1 as padding, class logits, boxes in pixels."""

    def __init__(self, reg_max: int = 16, iou: str = "CIoU") -> None:
        self.class_num, self.reg_max, self.iou, self.topk = CLASSES, reg_max, iou, 10
        self.factor = {"iou": 6.0, "cls": 0.5}
        self.vec2box = SimpleNamespace(anchor_grid=POINTS, scaler=STRIDES[:, 0])

    def __call__(self, target: Tensor, predict: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        logits, boxes = predict
        labels, truths = target[..., 0].long().clamp(min=0), target[..., 1:]
        low, high = truths[:, :, None].chunk(2, -1)
        sides = torch.cat((POINTS - low, high - POINTS), -1)
        allowed = (sides.amin(-1) >= 0) & (sides.amax(-1) / STRIDES[:, 0] <= self.reg_max - 1.01)
        overlap = ciou(truths[:, :, None], boxes[:, None]).clamp(min=0)
        score = logits.sigmoid().transpose(1, 2).gather(1, labels[..., None].expand(-1, -1, boxes.shape[1]))
        metric = score.sqrt() * overlap**6 * (target[..., :1] >= 0)
        best = (metric * allowed).topk(self.topk, -1)
        claims = torch.zeros_like(allowed).scatter(-1, best.indices, best.values > 0)
        without = (claims.sum(-1) == 0) & (metric.amax(-1) > 0)
        claims |= nn.functional.one_hot(metric.argmax(-1), boxes.shape[1]).bool() & without[..., None]
        winner = (overlap * claims).argmax(1)
        foreground = claims.any(1)
        claims &= nn.functional.one_hot(winner, truths.shape[1]).transpose(1, 2).bool()
        metric, overlap = metric * claims, overlap * claims
        weight = (metric / (metric.amax(-1, keepdim=True) + 1e-9) * overlap.amax(-1, keepdim=True)).amax(1)
        winner = claims.int().argmax(1)
        scores = nn.functional.one_hot(labels.gather(1, winner), CLASSES) * weight[..., None]
        chosen = truths.gather(1, winner[..., None].expand(-1, -1, 4))
        return torch.cat((scores, chosen), -1), foreground


def scene(seed: int = 0, batch: int = 3, truths: int = 5, low: float = 16.0, device: str = "cpu") -> tuple[Tensor, ...]:
    """Objects of a size at which more than topk anchors have a metric: then the dense top-k leaves nothing open."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    reach = 14 + rand(batch, len(POINTS), 4) * 20
    boxes = torch.cat((POINTS - reach[..., :2], POINTS + reach[..., 2:]), 2)
    half = low + rand(batch, truths, 2) * 10
    centre = 30 + rand(batch, truths, 2) * (SIZE - 60)
    mask = torch.ones(batch, truths, 1)
    mask[-1, truths // 2 :] = 0
    objects = torch.cat((centre - half, centre + half), 2) * mask
    labels = torch.randint(0, CLASSES, (batch, truths, 1), generator=generator).float() * mask
    case = rand(batch, len(POINTS), CLASSES), boxes, POINTS, labels, objects, mask
    return tuple(each.to(device) for each in case)


def assert_equal_targets(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    assert len(one) == len(other)
    for position, (a, b) in enumerate(zip(one, other, strict=True)):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if position == 2:
            torch.testing.assert_close(a, b, rtol=5e-6, atol=1e-7)
        else:
            assert torch.equal(a, b), position


@pytest.mark.parametrize("seed", range(5))
def test_both_assigners_of_a_dual_loss_give_the_published_targets(seed: int, device: str) -> None:
    plain, fast = DualLoss(), DualLoss()
    report = yf.accelerate_loss(fast)
    assert report.swapped == [("assigner", "yolov9"), ("assigner2", "yolov9")]
    assert not report.skipped
    case = scene(seed, device=device)
    assert (plain.assigner(*case)[3].sum(1) > 10).all()
    assert_equal_targets(fast.assigner(*case), plain.assigner(*case))
    assert_equal_targets(fast.assigner2(*case), plain.assigner2(*case))
    torch.testing.assert_close(fast(*case), plain(*case))


@pytest.mark.parametrize("seed", range(5))
def test_an_assigner_from_ultralytics_goes_by_its_rule_and_returns_the_index(seed: int, device: str) -> None:
    kind = of_ultralytics()
    plain, fast = DualLoss(kind), DualLoss(kind)
    assert yf.accelerate_loss(fast).swapped == [("assigner", "ultralytics"), ("assigner2", "ultralytics")]
    case = scene(seed, device=device)
    assert len(fast.assigner(*case)) == 5
    assert_equal_targets(fast.assigner(*case), plain.assigner(*case))


@pytest.mark.parametrize(
    ("attributes", "positives"),
    [({"stride": [8, 16, 32], "stride_val": 16}, 5), ({"stride": [8, 16, 32]}, 2), ({"stride_val": 16.0}, 5)],
)
def test_short_sides_are_as_long_as_the_assigner_says(attributes: dict[str, Any], positives: int) -> None:
    """A box of 8 px at 64 px."""
    centres, strides = anchor_points([(8, 8), (4, 4), (2, 2)])
    points = centres * strides
    boxes = torch.cat((points - 20, points + 20), 1)[None]
    scores = torch.linspace(0.1, 0.9, len(points))[None, :, None].expand(-1, -1, CLASSES).contiguous()
    case = (
        scores,
        boxes,
        points,
        torch.zeros(1, 1, 1),
        torch.tensor([[[20.5, 20.5, 28.5, 28.5]]]),
        torch.ones(1, 1, 1),
    )
    plain, fast = lengthening(**attributes), lengthening(**attributes)
    assert yf.accelerate_loss(fast).swapped == [("assigner", "ultralytics")]
    assert int(plain.assigner(*case)[3].sum()) == positives
    assert_equal_targets(fast.assigner(*case), plain.assigner(*case))


@pytest.mark.parametrize("seed", range(3))
def test_contests_of_lengthened_boxes_are_those_of_the_assigner(seed: int, device: str) -> None:
    attributes = {"stride": [8, 16, 32], "stride_val": 40}
    plain, fast = lengthening(**attributes), lengthening(**attributes)
    yf.accelerate_loss(fast)
    case = scene(seed, low=8.0, device=device)
    assert_equal_targets(fast.assigner(*case), plain.assigner(*case))
    fast.assigner.stride_val = plain.assigner.stride_val = 24
    assert_equal_targets(fast.assigner(*case), plain.assigner(*case))


def test_lengthened_sides_by_another_rule_are_left_alone() -> None:
    assert "lengthens" in yf.accelerate_loss(lengthening(stride_val=16), rule="yolov9").skipped[0][1]
    for wrong in ("wide", [], -1, float("nan")):
        assert "stride_val" in yf.accelerate_loss(lengthening(stride_val=wrong)).skipped[0][1]


@pytest.mark.parametrize(("seed", "low"), [(0, 16.0), (1, 16.0), (2, 16.0), (3, 0.5), (4, 2.0)])
def test_a_matcher_inside_a_loss_gives_the_published_targets(seed: int, low: float) -> None:
    scores, boxes, _, labels, objects, mask = scene(seed, low=low)
    target = torch.cat((torch.where(mask > 0, labels, -1.0), objects), -1)
    plain = SimpleNamespace(loss=SimpleNamespace(matcher=BoxMatcher()))
    fast = SimpleNamespace(loss=SimpleNamespace(matcher=BoxMatcher()))
    assert yf.accelerate_loss(fast).swapped == [("loss.matcher", "mit")]
    logits = scores.logit()
    expected, foreground = plain.loss.matcher(target, (logits, boxes))
    found, found_foreground = fast.loss.matcher(target, (logits, boxes))
    assert torch.equal(found_foreground, foreground)
    assert bool(foreground.any(1).all())
    torch.testing.assert_close(found[..., :CLASSES], expected[..., :CLASSES], rtol=2e-5, atol=1e-6)
    assert torch.equal(found[..., CLASSES:][foreground], expected[..., CLASSES:][foreground])
    assert fast.loss.matcher.reg_max == 16  # what the original knows is still answered


@pytest.mark.parametrize("kind", [TaskAlignedAssigner, of_ultralytics()])
def test_a_batch_without_ground_truths_is_all_background(kind: type, device: str) -> None:
    fast = DualLoss(kind)
    yf.accelerate_loss(fast)
    case = scene(device=device)
    empty = (
        *case[:3],
        torch.zeros(3, 0, 1, device=device),
        torch.zeros(3, 0, 4, device=device),
        torch.zeros(3, 0, 1, device=device),
    )
    assert_equal_targets(fast.assigner(*empty), DualLoss(kind).assigner(*empty))
    matcher = FastMatcher(BoxMatcher())
    aligned, foreground = matcher(torch.zeros(3, 0, 5, device=device), (case[0], case[1]))
    assert aligned.shape == (3, len(POINTS), CLASSES + 4)
    assert aligned.count_nonzero() == 0
    assert not foreground.any()


def test_a_loss_that_is_a_module_and_one_of_two_losses_are_found() -> None:
    module = nn.Module()
    module.assigner = TaskAlignedAssigner(num_classes=CLASSES)
    assert yf.accelerate_loss(module).swapped == [("assigner", "yolov9")]
    assert isinstance(module.assigner, FastAssigner)
    pair = SimpleNamespace(one2many=DualLoss(of_ultralytics()), one2one=DualLoss(of_ultralytics()))
    assert [path for path, _ in yf.accelerate_loss(pair).swapped] == [
        "one2many.assigner",
        "one2many.assigner2",
        "one2one.assigner",
        "one2one.assigner2",
    ]


def test_twice_is_once_and_restoring_gives_the_very_objects_back() -> None:
    loss = DualLoss()
    originals = loss.assigner, loss.assigner2
    yf.accelerate_loss(loss)
    fast = loss.assigner
    again = yf.accelerate_loss(loss)
    assert loss.assigner is fast
    assert not again.swapped
    assert "already" in again.skipped[0][1]
    yf.restore_loss(loss)
    assert (loss.assigner, loss.assigner2) == originals
    assert not yf.restore_loss(loss).swapped


def test_an_accelerated_loss_can_be_pickled_and_copied() -> None:
    loss, case = DualLoss(), scene()
    yf.accelerate_loss(loss)
    for other in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert isinstance(other.assigner, FastAssigner)
        assert other.assigner is not loss.assigner
        assert torch.equal(other(*case), loss(*case))
        yf.restore_loss(other)
        assert isinstance(other.assigner, TaskAlignedAssigner)
    matcher = SimpleNamespace(matcher=BoxMatcher())
    yf.accelerate_loss(matcher)
    assert isinstance(copy.deepcopy(pickle.loads(pickle.dumps(matcher))).matcher, FastMatcher)


def test_options_changed_afterwards_are_obeyed() -> None:
    plain, fast, case = DualLoss(), DualLoss(), scene()
    yf.accelerate_loss(fast)
    plain.assigner.topk = fast.assigner.topk = 3
    assert_equal_targets(fast.assigner(*case), plain.assigner(*case))


def test_a_class_of_unknown_origin_is_taken_only_by_name_of_its_rule() -> None:
    loss = DualLoss(RenamedAssigner)
    report = yf.accelerate_loss(loss)
    assert not report.swapped
    assert "RenamedAssigner is no TaskAlignedAssigner" in str(report)
    assert yf.accelerate_loss(loss, rule="yolov9", returns_index=True).swapped
    case = scene()
    assert_equal_targets(loss.assigner(*case), RenamedAssigner(num_classes=CLASSES)(*case))


def odd(**attributes: Any) -> DualLoss:
    loss = DualLoss()
    for name, value in attributes.items():
        setattr(loss.assigner, name, value)
    return loss


@pytest.mark.parametrize(
    ("loss", "rule", "reason"),
    [
        (odd(eps=1e-6), None, "has eps 1e-06"),
        (odd(topk2=3), None, "selects a second time"),
        (odd(beta=0.0), None, "which ops.assign refuses"),
        (DualLoss(), "mit", "is given no strides"),
        (SimpleNamespace(matcher=BoxMatcher(reg_max=8)), None, "has reg_max 8"),
        (SimpleNamespace(matcher=BoxMatcher(iou="GIoU")), None, "measures overlap by GIoU"),
        (SimpleNamespace(matcher=BoxMatcher()), "yolov9", "follows rule 'mit'"),
        (SimpleNamespace(matcher=object()), "mit", "has no topk"),
        (SimpleNamespace(assigner=object()), "yolov9", "has no topk, num_classes, alpha, beta"),
        (SimpleNamespace(assigner=type("RotatedTaskAlignedAssigner", (), {})()), None, "rotated"),
        (SimpleNamespace(), None, "no attribute assigner"),
    ],
)
def test_what_cannot_be_replaced_is_reported_with_the_reason(loss: Any, rule: str | None, reason: str) -> None:
    before = dict(vars(loss))
    report = yf.accelerate_loss(loss, rule=rule)
    assert reason in str(report)
    first = next(iter(before), None)
    assert first is None or vars(loss)[first] is before[first]


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^rule: expected one of yolov9, ultralytics, mit or None, got 'yolov8'"):
        yf.accelerate_loss(DualLoss(), rule="yolov8")


def test_half_precision_scores_of_mixed_training_are_taken() -> None:
    loss, case = DualLoss(), scene()
    yf.accelerate_loss(loss)
    scores = case[0].half()
    assert_equal_targets(loss.assigner(scores, *case[1:]), loss.assigner(scores.float(), *case[1:]))
