"""assign: the published task-aligned assignment, from golden numbers, small cases by hand, and a loop in numpy.

Every test runs with the eager reference, the compiled kernel and emulated CUDA blocks.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import yolov9_fast as yf
from tests.ops import emulated
from yolov9_fast.ops import _library as library
from yolov9_fast.ops import assign
from yolov9_fast.ops._backend import BackendUnavailable
from yolov9_fast.ops._boxes import anchor_points

GRID = 5
STRIDE = 8
MODULE = importlib.import_module("yolov9_fast.ops._assign")
MISSING = library.why_not_compiled("assign", "cpu")


@pytest.fixture(autouse=True, params=["eager", "cpu", "emulated"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Which implementation `assign` runs in this test."""
    name = request.param
    if name == "cpu" and MISSING is not None:
        pytest.skip(f"no compiled assign: {MISSING}")
    if name == "emulated":
        raw = emulated.operators().assign
        monkeypatch.setattr(MODULE, "OPERATOR", lambda *args: raw(*args, 32, 1))
    with yf.backend("cpu" if name == "cpu" else "eager"):
        yield name


def points() -> Tensor:
    centres, stride = anchor_points([(GRID, GRID)], [STRIDE])
    return centres * stride


def boxes_on_anchors(half: float = 8.0) -> Tensor:
    centre = points()
    return torch.cat((centre - half, centre + half), 1)[None]


def scores(value: float = 0.5, classes: int = 2) -> Tensor:
    return torch.full((1, GRID * GRID, classes), value)


def run(score: Tensor, box: Tensor, labels: list[int], gt_boxes: list[list[float]], **kwargs: float):
    boxes = torch.tensor(gt_boxes).view(1, -1, 4)
    label = torch.tensor(labels).view(1, -1)
    return assign(score, box, points(), label, boxes, torch.ones(1, len(labels)), **kwargs)


@pytest.mark.parametrize("case", ["plain", "ties", "empty_images", "tiny_boxes"])
def test_equals_the_published_assignment(golden_folder: Path, case: str) -> None:
    golden = {k: torch.from_numpy(v) for k, v in np.load(golden_folder / f"ops/tal_{case}.npz").items()}
    result = assign(
        golden["pd_scores"],
        golden["pd_bboxes"],
        golden["anchor_points"],
        golden["gt_labels"],
        golden["gt_bboxes"],
        golden["mask_gt"],
        topk=int(golden["topk"]),
        alpha=float(golden["alpha"]),
        beta=float(golden["beta"]),
    )
    foreground = result.gt_index >= 0
    assert torch.equal(foreground, golden["fg_mask"])
    index = result.gt_index.clamp(min=0)
    labels = golden["gt_labels"][..., 0].long().gather(1, index)
    boxes = golden["gt_bboxes"].gather(1, index[..., None].expand(-1, -1, 4))
    assert torch.equal(labels[foreground], golden["target_labels"][foreground])
    assert torch.equal(boxes[foreground], golden["target_bboxes"][foreground])
    at_label = torch.zeros_like(golden["target_scores"])
    at_label[foreground, labels[foreground]] = result.weight[foreground]
    torch.testing.assert_close(at_label, golden["target_scores"], rtol=5e-6, atol=1e-7)


def test_a_ground_truth_takes_its_best_anchors_inside() -> None:
    score = scores(0.25)
    score[0, 12, 1] = 1.0
    result = run(score, boxes_on_anchors(), [1], [[12.0, 12.0, 28.0, 28.0]])
    inside = [6, 7, 8, 11, 12, 13, 16, 17, 18]
    assert torch.nonzero(result.gt_index[0] >= 0)[:, 0].tolist() == [12]  # the other centres are on the border
    result = run(score, boxes_on_anchors(), [1], [[11.0, 11.0, 29.0, 29.0]])
    assert torch.nonzero(result.gt_index[0] >= 0)[:, 0].tolist() == inside
    result = run(score, boxes_on_anchors(), [1], [[11.0, 11.0, 29.0, 29.0]], topk=1)
    assert torch.nonzero(result.gt_index[0] >= 0)[:, 0].tolist() == [12]


def test_weight_is_the_metric_scaled_to_the_best_overlap() -> None:
    score = scores(0.25)
    result = run(score, boxes_on_anchors(), [0], [[12.0, 12.0, 28.0, 28.0]])
    # One anchor predicts exactly this box: o = 1, m = 0.5, weight = 0.5 · 1 / (0.5 + 1e-9).
    assert result.weight[0, 12].item() == pytest.approx(1.0, abs=1e-6)
    assert result.weight.count_nonzero() == 1


def test_ties_are_won_by_the_lowest_anchor() -> None:
    box = torch.tensor([[[4.0, 4.0, 36.0, 36.0]]]).expand(1, GRID * GRID, 4)
    result = run(scores(), box, [0], [[5.0, 5.0, 35.0, 35.0]], topk=3)
    assert torch.nonzero(result.gt_index[0] >= 0)[:, 0].tolist() == [6, 7, 8]


def test_an_anchor_claimed_twice_is_assigned_by_the_highest_overlap_of_the_image() -> None:
    # Anchor 12 predicts ground truth 2 exactly; 0 and 1 contain its centre and, as topk is all anchors, claim it.
    box = boxes_on_anchors(half=2.0)
    far = [30.0, 30.0, 38.0, 38.0]
    box[0, 12] = torch.tensor(far)
    result = run(scores(), box, [0, 0, 1], [[11.0, 11.0, 29.0, 29.0], [12.0, 12.0, 28.5, 28.5], far], topk=25)
    assert result.gt_index[0, 12] == 2
    assert result.gt_index[0, 24] == 2


def test_an_anchor_claimed_once_is_assigned_there_even_if_another_overlaps_more() -> None:
    box = boxes_on_anchors(half=2.0)
    far = [30.0, 30.0, 38.0, 38.0]
    box[0, 12] = torch.tensor(far)
    result = run(scores(), box, [0, 1], [[11.0, 11.0, 29.0, 29.0], far], topk=25)
    assert result.gt_index[0, 12] == 0


def test_equal_overlaps_are_won_by_the_first_ground_truth() -> None:
    same = [12.0, 12.0, 28.0, 28.0]
    result = run(scores(), boxes_on_anchors(), [0, 1], [same, same])
    assert result.gt_index[0, 12] == 0


def test_positives_without_overlap_have_weight_zero() -> None:
    box = boxes_on_anchors() + 1000
    result = run(scores(), box, [0], [[0.0, 0.0, 10.0, 10.0]])
    assert result.gt_index[0, 0] == 0
    assert result.weight.count_nonzero() == 0


def test_padding_claims_nothing() -> None:
    gt_box = torch.tensor([[[12.0, 12.0, 28.0, 28.0], [0.0, 0.0, 40.0, 40.0]]])
    mask = torch.tensor([[True, False]])
    result = assign(scores(), boxes_on_anchors(), points(), torch.zeros(1, 2), gt_box, mask)
    assert set(result.gt_index.unique().tolist()) == {-1, 0}


@pytest.mark.parametrize("count", [0, 3])
def test_without_objects_all_is_background(count: int) -> None:
    result = assign(
        scores(),
        boxes_on_anchors(),
        points(),
        torch.zeros(1, count, 1),
        torch.zeros(1, count, 4),
        torch.zeros(1, count, 1),
    )
    assert result.gt_index.shape == result.weight.shape == (1, GRID * GRID)
    assert bool((result.gt_index == -1).all())
    assert result.weight.count_nonzero() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_predictions_that_are_not_finite_give_finite_weights(bad: float) -> None:
    score, box = scores(), boxes_on_anchors()
    score[0, 12] = bad
    box[0, 6] = bad
    result = run(score, box, [0, 1], [[11.0, 11.0, 29.0, 29.0], [10.0, 10.0, 30.0, 30.0]])
    assert bool(result.weight.isfinite().all())
    assert result.weight[0, [6, 12]].count_nonzero() == 0


def test_degenerate_and_infinite_ground_truths_give_finite_weights() -> None:
    gt_boxes = [[20.0, 20.0, 20.0, 20.0], [30.0, 30.0, 10.0, 10.0], [-math.inf, 0.0, math.inf, 40.0]]
    gt_boxes += [[math.nan, 0.0, 20.0, 20.0], [12.0, 12.0, 28.0, 28.0]]
    result = run(scores(), boxes_on_anchors(), [0] * 5, gt_boxes)
    assert bool(result.weight.isfinite().all())
    assert not set(result.gt_index.unique().tolist()) & {0, 1, 3}


def test_five_thousand_objects_in_one_image() -> None:
    centre = torch.rand(1, 5000, 2, generator=torch.Generator().manual_seed(0)) * 40
    gt_box = torch.cat((centre - 3, centre + 3), 2)
    label = torch.zeros(1, 5000)
    result = assign(scores(), boxes_on_anchors(4), points(), label, gt_box, torch.ones(1, 5000))
    assert bool((result.gt_index >= 0).all())


def test_strided_scores_and_every_mask_shape_agree() -> None:
    score, box, point, label, gt_box, mask = random_case(3, batch=2, objects=5)
    first = assign(score, box, point, label, gt_box, mask)
    strided = score.transpose(1, 2).contiguous().transpose(1, 2)
    second = assign(strided, box, point, label[..., None].float(), gt_box, mask[..., None].float())
    assert torch.equal(first.gt_index, second.gt_index)
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("name", ["scores", "boxes", "anchor_points", "gt_labels", "gt_boxes", "gt_mask"])
def test_a_wrong_shape_is_named(name: str) -> None:
    names = ("scores", "boxes", "anchor_points", "gt_labels", "gt_boxes", "gt_mask")
    arguments = dict(zip(names, random_case(0, batch=2, objects=3), strict=True))
    arguments[name] = arguments[name][:1, :2].clone() if name != "scores" else arguments[name][0]
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        assign(**arguments)


@pytest.mark.parametrize(
    "option",
    [
        {"topk": 0},
        {"alpha": -1.0},
        {"beta": 0.0},
        {"beta": math.nan},
        {"rule": "other"},
        {"min_side": 16.0},
        {"min_side": -1.0, "rule": "ultralytics"},
        {"min_side": math.inf, "rule": "ultralytics"},
    ],
)
def test_a_wrong_option_is_named(option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(option))}: expected"):
        assign(*random_case(0, batch=1, objects=1), **option)


@pytest.mark.parametrize("name", ["scores", "boxes", "anchor_points", "gt_boxes"])
def test_a_wrong_dtype_is_named(name: str) -> None:
    names = ("scores", "boxes", "anchor_points", "gt_labels", "gt_boxes", "gt_mask")
    arguments = dict(zip(names, random_case(0, batch=2, objects=3), strict=True))
    arguments[name] = arguments[name].long()
    with pytest.raises(TypeError, match=f"^{name}: expected a floating-point tensor, got torch.int64"):
        assign(**arguments)


@pytest.mark.parametrize("strides", [None, torch.ones(3)])
def test_rule_mit_requires_strides(strides: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"^strides: expected \[25\] or \[25, 1\] for rule 'mit'"):
        assign(*random_case(0, batch=1, objects=1), rule="mit", strides=strides)


def test_rule_ultralytics_chooses_among_those_that_contain_the_anchor() -> None:
    box = boxes_on_anchors(half=2.0)
    far = [30.0, 30.0, 38.0, 38.0]
    box[0, 12] = torch.tensor(far)
    gt_boxes = [[11.0, 11.0, 29.0, 29.0], [12.0, 12.0, 28.5, 28.5], far]
    assert run(scores(), box, [0, 0, 1], gt_boxes, topk=25, rule="yolov9").gt_index[0, 12] == 2
    result = run(scores(), box, [0, 0, 1], gt_boxes, topk=25, rule="ultralytics")
    assert result.gt_index[0, 12] == 0
    assert result.weight[0, 12] == 0


def test_rule_mit_takes_the_border_but_no_anchor_without_a_metric() -> None:
    strides = torch.full((GRID * GRID,), 8.0)
    gt_box = [[12.0, 12.0, 28.0, 28.0]]
    result = run(scores(), boxes_on_anchors(), [0], gt_box, rule="mit", strides=strides)
    assert torch.nonzero(result.gt_index[0] >= 0)[:, 0].tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]
    result = run(scores(), boxes_on_anchors() + 1000, [0], gt_box, rule="mit", strides=strides)
    assert bool((result.gt_index == -1).all())


def test_rule_mit_gives_a_ground_truth_without_a_positive_its_best_anchor() -> None:
    box = boxes_on_anchors()
    gt_box = [[13.0, 13.0, 19.0, 19.0]]  # contains no centre
    strides = torch.full((GRID * GRID, 1), 8.0)
    assert bool((run(scores(), box, [0], gt_box).gt_index == -1).all())
    result = run(scores(), box, [0], gt_box, rule="mit", strides=strides)
    assert torch.nonzero(result.gt_index[0] >= 0)[:, 0].tolist() == [6]  # four overlap equally: the lowest
    assert result.weight[0, 6] > 0


def test_rule_mit_skips_anchors_with_a_side_out_of_reach() -> None:
    strides = torch.full((GRID * GRID,), 2.0)  # 14.99 strides are 29.98 pixels
    box = torch.tensor([[[0.0, 0.0, 40.0, 40.0]]]).expand(1, GRID * GRID, 4)
    result = run(scores(), box, [0], [[0.0, 0.0, 40.0, 40.0]], topk=25, rule="mit", strides=strides)
    assert torch.nonzero(result.gt_index[0] >= 0)[:, 0].tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]
    strides[7] = 1.0
    result = run(scores(), box, [0], [[0.0, 0.0, 40.0, 40.0]], topk=25, rule="mit", strides=strides)
    assert 7 not in torch.nonzero(result.gt_index[0] >= 0)[:, 0].tolist()


def test_rule_mit_chooses_among_those_that_claim() -> None:
    box, score = boxes_on_anchors(half=8.0), scores()
    nearest = [13.0, 13.0, 28.0, 28.0]
    box[0, 12], score[0, 12, 1] = torch.tensor(nearest), 0.0  # so the third has no metric there
    gt_boxes = [[8.0, 8.0, 32.0, 32.0], [12.0, 12.0, 31.0, 31.0], nearest]
    strides = torch.full((GRID * GRID,), 8.0)
    assert run(score, box, [0, 0, 1], gt_boxes, topk=25).gt_index[0, 12] == 2
    assert run(score, box, [0, 0, 1], gt_boxes, topk=25, rule="mit", strides=strides).gt_index[0, 12] == 1


@pytest.mark.parametrize("label", [-1, 2, 1000])
def test_a_label_without_a_class_has_no_score(label: int) -> None:
    result = run(scores(), boxes_on_anchors(), [label], [[11.0, 11.0, 29.0, 29.0]])
    assert result.weight.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    score, box, point, label, gt_box, mask = random_case(5, batch=2, objects=5)
    score, box = score.to(dtype), box.to(dtype)
    result = assign(score, box, point, label, gt_box, mask)
    wide = assign(score.float(), box.float(), point, label, gt_box, mask)
    assert result.weight.dtype == dtype
    assert torch.equal(result.gt_index, wide.gt_index)
    assert torch.equal(result.weight, wide.weight.to(dtype))


def test_autocast_changes_nothing() -> None:
    case = random_case(6, batch=2, objects=5)
    plain = assign(*case, alpha=0.3, beta=1.7)
    with torch.autocast("cpu", torch.bfloat16):
        inside = assign(*case, alpha=0.3, beta=1.7)
    assert torch.equal(plain.gt_index, inside.gt_index)
    assert torch.equal(plain.weight, inside.weight)


def test_no_gradient_is_recorded() -> None:
    score, box, *rest = random_case(8, batch=1, objects=3)
    result = assign(score.requires_grad_(), box.requires_grad_(), *rest)
    assert not result.weight.requires_grad


def test_an_error_says_why_a_backend_cannot_run(implementation: str) -> None:
    case = random_case(0, batch=1, objects=1)
    if implementation != "cpu":
        pytest.skip("for the compiled kernel only")
    with pytest.raises(BackendUnavailable, match=r"got boxes of torch.float64"):
        assign(case[0], case[1].double(), *case[2:])
    many = torch.rand(200, 2)
    with pytest.raises(BackendUnavailable, match="a topk of at most 128, got 129"):
        assign(torch.rand(1, 200, 1), torch.rand(1, 200, 4), many, *case[3:], topk=129)


def random_case(seed: int, batch: int, objects: int, classes: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    centre = points() + (rand(batch, GRID * GRID, 2) - 0.5) * 8
    half = 2 + rand(batch, GRID * GRID, 2) * 8
    gt_centre, gt_half = rand(batch, objects, 2) * 40, 1 + rand(batch, objects, 2) * 15
    # Coarse scores and overlaps of nearly equal boxes make anchors claimed twice and ties common.
    score = (rand(batch, GRID * GRID, classes) * 4).round() / 4
    label = torch.randint(0, classes, (batch, objects), generator=generator)
    mask = rand(batch, objects) > 0.2
    boxes = torch.cat((centre - half, centre + half), 2)
    gt_boxes = torch.cat((gt_centre - gt_half, gt_centre + gt_half), 2) * mask[..., None]
    return score, boxes, points(), label, gt_boxes, mask
