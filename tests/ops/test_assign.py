"""assign: the published task-aligned assignment, from golden numbers, small cases by hand, and a loop in numpy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from yolov9_fast.ops import assign
from yolov9_fast.ops.boxes import anchor_points

GRID = 5
STRIDE = 8


def points() -> Tensor:
    centres, stride = anchor_points([(GRID, GRID)], [STRIDE])
    return centres * stride


def boxes_on_anchors(half: float = 8.0) -> Tensor:
    centre = points()
    return torch.cat((centre - half, centre + half), 1)[None]


def scores(value: float = 0.5, classes: int = 2) -> Tensor:
    return torch.full((1, GRID * GRID, classes), value)


def run(score: Tensor, box: Tensor, labels: list[int], truths: list[list[float]], **kwargs: float):
    truth = torch.tensor(truths).view(1, -1, 4)
    label = torch.tensor(labels).view(1, -1)
    return assign(score, box, points(), label, truth, torch.ones(1, len(labels)), **kwargs)


@pytest.mark.parametrize("case", ["plain", "ties", "empty_images", "tiny_boxes"])
def test_equals_the_published_assignment(shared: Path, case: str) -> None:
    golden = {k: torch.from_numpy(v) for k, v in np.load(shared / f"golden/ops/tal_{case}.npz").items()}
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
    assert torch.nonzero(result.gt_index[0] >= 0)[:, 0].tolist() == [12]  # the other centres lie on the border
    result = run(score, boxes_on_anchors(), [1], [[11.0, 11.0, 29.0, 29.0]])
    assert torch.nonzero(result.gt_index[0] >= 0)[:, 0].tolist() == inside
    result = run(score, boxes_on_anchors(), [1], [[11.0, 11.0, 29.0, 29.0]], topk=1)
    assert torch.nonzero(result.gt_index[0] >= 0)[:, 0].tolist() == [12]


def test_weight_is_the_metric_scaled_to_the_best_overlap() -> None:
    score = scores(0.25)
    result = run(score, boxes_on_anchors(), [0], [[12.0, 12.0, 28.0, 28.0]])
    # One anchor with the very box: o = 1, m = 0.5, weight = 0.5 · 1 / (0.5 + 1e-9).
    assert result.weight[0, 12].item() == pytest.approx(1.0, abs=1e-6)
    assert result.weight.count_nonzero() == 1


def test_ties_go_to_the_lowest_anchor() -> None:
    box = torch.tensor([[[4.0, 4.0, 36.0, 36.0]]]).expand(1, GRID * GRID, 4)
    result = run(scores(), box, [0], [[5.0, 5.0, 35.0, 35.0]], topk=3)
    assert torch.nonzero(result.gt_index[0] >= 0)[:, 0].tolist() == [6, 7, 8]


def test_an_anchor_claimed_twice_goes_to_the_highest_overlap_of_the_image() -> None:
    # Anchor 12 predicts truth 2 exactly; 0 and 1 contain its centre and, with topk of all anchors, claim it.
    box = boxes_on_anchors(half=2.0)
    far = [30.0, 30.0, 38.0, 38.0]
    box[0, 12] = torch.tensor(far)
    result = run(scores(), box, [0, 0, 1], [[11.0, 11.0, 29.0, 29.0], [12.0, 12.0, 28.5, 28.5], far], topk=25)
    assert result.gt_index[0, 12] == 2
    assert result.gt_index[0, 24] == 2


def test_an_anchor_claimed_once_stays_even_where_another_overlaps_more() -> None:
    box = boxes_on_anchors(half=2.0)
    far = [30.0, 30.0, 38.0, 38.0]
    box[0, 12] = torch.tensor(far)
    result = run(scores(), box, [0, 1], [[11.0, 11.0, 29.0, 29.0], far], topk=25)
    assert result.gt_index[0, 12] == 0


def test_equal_overlaps_go_to_the_first_ground_truth() -> None:
    truth = [12.0, 12.0, 28.0, 28.0]
    result = run(scores(), boxes_on_anchors(), [0, 1], [truth, truth])
    assert result.gt_index[0, 12] == 0


def test_positives_without_overlap_have_weight_zero() -> None:
    box = boxes_on_anchors() + 1000
    result = run(scores(), box, [0], [[0.0, 0.0, 10.0, 10.0]])
    assert result.gt_index[0, 0] == 0
    assert result.weight.count_nonzero() == 0


def test_padding_claims_nothing() -> None:
    truth = torch.tensor([[[12.0, 12.0, 28.0, 28.0], [0.0, 0.0, 40.0, 40.0]]])
    mask = torch.tensor([[True, False]])
    result = assign(scores(), boxes_on_anchors(), points(), torch.zeros(1, 2), truth, mask)
    assert set(result.gt_index.unique().tolist()) == {-1, 0}


@pytest.mark.parametrize("count", [0, 3])
def test_no_object_is_all_background(count: int) -> None:
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


def test_degenerate_and_endless_ground_truths_do_no_harm() -> None:
    truths = [[20.0, 20.0, 20.0, 20.0], [30.0, 30.0, 10.0, 10.0], [-math.inf, 0.0, math.inf, 40.0]]
    truths += [[math.nan, 0.0, 20.0, 20.0], [12.0, 12.0, 28.0, 28.0]]
    result = run(scores(), boxes_on_anchors(), [0] * 5, truths)
    assert bool(result.weight.isfinite().all())
    assert not set(result.gt_index.unique().tolist()) & {0, 1, 3}


def test_five_thousand_objects_in_one_image() -> None:
    centre = torch.rand(1, 5000, 2, generator=torch.Generator().manual_seed(0)) * 40
    truth = torch.cat((centre - 3, centre + 3), 2)
    label = torch.zeros(1, 5000)
    result = assign(scores(), boxes_on_anchors(4), points(), label, truth, torch.ones(1, 5000))
    assert bool((result.gt_index >= 0).all())


def test_the_size_of_a_piece_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(7, batch=2, truths=6)
    whole = assign(*case)
    monkeypatch.setitem(assign.__globals__, "_pairs_at_once", lambda _: 1)
    pieces = assign(*case)
    assert torch.equal(whole.gt_index, pieces.gt_index)
    assert torch.equal(whole.weight, pieces.weight)


def test_strided_scores_and_every_mask_form_agree() -> None:
    score, box, point, label, truth, mask = random_case(3, batch=2, truths=5)
    first = assign(score, box, point, label, truth, mask)
    strided = score.transpose(1, 2).contiguous().transpose(1, 2)
    second = assign(strided, box, point, label[..., None].float(), truth, mask[..., None].float())
    assert torch.equal(first.gt_index, second.gt_index)
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("name", ["scores", "boxes", "anchor_points", "gt_labels", "gt_boxes", "gt_mask"])
def test_a_wrong_shape_is_named(name: str) -> None:
    names = ("scores", "boxes", "anchor_points", "gt_labels", "gt_boxes", "gt_mask")
    arguments = dict(zip(names, random_case(0, batch=2, truths=3), strict=True))
    arguments[name] = arguments[name][:1, :2].clone() if name != "scores" else arguments[name][0]
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        assign(**arguments)


def test_topk_must_be_positive() -> None:
    with pytest.raises(ValueError, match="topk"):
        assign(*random_case(0, batch=1, truths=1), topk=0)


def random_case(seed: int, batch: int, truths: int, classes: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    centre = points() + (rand(batch, GRID * GRID, 2) - 0.5) * 8
    half = 2 + rand(batch, GRID * GRID, 2) * 8
    truth_centre, truth_half = rand(batch, truths, 2) * 40, 1 + rand(batch, truths, 2) * 15
    # Coarse scores and overlaps of nearly equal boxes make contests and ties common.
    score = (rand(batch, GRID * GRID, classes) * 4).round() / 4
    label = torch.randint(0, classes, (batch, truths), generator=generator)
    mask = rand(batch, truths) > 0.2
    boxes = torch.cat((centre - half, centre + half), 2)
    truth = torch.cat((truth_centre - truth_half, truth_centre + truth_half), 2) * mask[..., None]
    return score, boxes, points(), label, truth, mask


def by_loops(score, boxes, point, label, truth, mask, topk: int) -> tuple[np.ndarray, np.ndarray]:
    """The definition, one pair at a time, in float64."""
    batch, anchors = boxes.shape[:2]
    gt_index, weight = np.full((batch, anchors), -1), np.zeros((batch, anchors))
    for b in range(batch):
        overlap = np.array([[max(_ciou(t, p), 0.0) for p in boxes[b].tolist()] for t in truth[b].tolist()])
        metric = np.array([score[b, :, c].double().numpy() ** 0.5 for c in label[b]]) * overlap**6
        claims: dict[int, list[int]] = {}
        for g, (x1, y1, x2, y2) in enumerate(truth[b].tolist()):
            inside = [min(x - x1, y - y1, x2 - x, y2 - y) > 1e-9 for x, y in point.tolist()]
            order = sorted(range(anchors), key=lambda a: (-metric[g, a] * inside[a], a))  # noqa: B023
            for a in order[:topk]:
                if inside[a] and mask[b, g]:
                    claims.setdefault(a, []).append(g)
        for a, claimants in claims.items():
            gt_index[b, a] = claimants[0] if len(claimants) == 1 else int(np.argmax(overlap[:, a]))
        for g in range(truth.shape[1]):
            own = gt_index[b] == g
            if own.any():
                weight[b, own] = metric[g, own] * overlap[g, own].max() / (metric[g, own].max() + 1e-9)
    return gt_index, weight


def _ciou(a: list[float], b: list[float]) -> float:
    eps = 1e-7
    aw, ah, bw, bh = a[2] - a[0], a[3] - a[1] + eps, b[2] - b[0], b[3] - b[1] + eps
    inter = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    iou = inter / (aw * ah + bw * bh - inter + eps)
    c2 = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2 + eps
    rho2 = ((b[0] + b[2] - a[0] - a[2]) ** 2 + (b[1] + b[3] - a[1] - a[3]) ** 2) / 4
    v = 4 / math.pi**2 * (math.atan(bw / bh) - math.atan(aw / ah)) ** 2
    return iou - rho2 / c2 - v * v / (v - iou + 1 + eps)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), truths=st.integers(1, 6), topk=st.integers(1, 12))
def test_equals_a_loop_over_the_definition(seed: int, truths: int, topk: int) -> None:
    case = tuple(each.double() if each.is_floating_point() else each for each in random_case(seed, 2, truths))
    result = assign(*case, topk=topk)
    gt_index, weight = by_loops(*case, topk=topk)
    assert np.array_equal(result.gt_index.numpy(), gt_index)
    np.testing.assert_allclose(result.weight.numpy(), weight, rtol=1e-9, atol=1e-12)
