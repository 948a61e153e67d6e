"""nms: the published results exactly, small cases by hand, and a greedy loop in numpy."""

from __future__ import annotations

import ast
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import yolov9_fast as yf
from yolov9_fast.ops import Detections, nms
from yolov9_fast.ops._nms import OPERATOR

CPU_REASON = OPERATOR.why_not("cpu")
needs_cpu = pytest.mark.skipif(CPU_REASON is not None, reason=f"no compiled nms: {CPU_REASON}")


@pytest.fixture(params=["eager", pytest.param("cpu", marks=needs_cpu)], autouse=True)
def chosen_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs every test of this file on every backend."""
    with yf.backend(request.param):
        yield


def prediction(rows: list[tuple[tuple[float, float, float, float], tuple[float, ...]]]) -> Tensor:
    """[1, 4 + nc, A] from rows of (x1, y1, x2, y2) and class scores."""
    boxes = [((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1) for (x1, y1, x2, y2), _ in rows]
    return torch.tensor([[*box, *scores] for box, (_, scores) in zip(boxes, rows, strict=True)]).T[None]


def kept_rows(result: Detections, image: int = 0) -> list[tuple[float, int]]:
    """(score, class) of an image, in order."""
    rows = result.boxes[image, : int(result.count[image])].tolist()
    return [(round(row[4], 4), int(row[5])) for row in rows]


UNIT = (0.0, 0.0, 10.0, 10.0)
NEAR = (1.0, 0.0, 11.0, 10.0)  # IoU with UNIT 9/11 = 0.818
HALF = (0.0, 0.0, 10.0, 5.0)  # IoU with UNIT exactly 0.5


@pytest.mark.parametrize("case", ["val", "predict", "agnostic", "classes"])
def test_equals_the_published_result(golden_folder: Path, case: str) -> None:
    golden = np.load(golden_folder / f"ops/nms_{case}.npz")
    options: dict[str, Any] = ast.literal_eval(str(golden["kwargs"]))
    options["conf"], options["iou"] = options.pop("conf_thres"), options.pop("iou_thres")
    result = nms(torch.from_numpy(golden["prediction"]), **options)
    for image, count in enumerate(result.count.tolist()):
        expected = golden[f"detections_{image}"]
        assert count == len(expected)
        np.testing.assert_allclose(result.boxes[image, :count].numpy(), expected, rtol=1e-6)


def test_the_best_suppresses_those_of_its_class_that_overlap_it() -> None:
    result = nms(prediction([(UNIT, (0.8, 0.0)), (NEAR, (0.9, 0.0)), (NEAR, (0.0, 0.7))]))
    assert kept_rows(result) == [(0.9, 0), (0.7, 1)]
    assert result.boxes[0, 0].tolist() == pytest.approx([*NEAR, 0.9, 0])
    assert result.boxes.shape == (1, 300, 6)
    assert result.boxes[0, 2:].count_nonzero() == 0


def test_a_suppressed_box_suppresses_nothing() -> None:
    chain = [((float(x), 0.0, 10.0 + x, 10.0), (0.9 - x / 100,)) for x in (0, 3, 6, 9)]
    assert kept_rows(nms(prediction(chain), iou=0.5)) == [(0.9, 0), (0.84, 0)]


def test_agnostic_suppresses_across_classes() -> None:
    rows = [(UNIT, (0.8, 0.0)), (NEAR, (0.0, 0.7))]
    assert kept_rows(nms(prediction(rows))) == [(0.8, 0), (0.7, 1)]
    assert kept_rows(nms(prediction(rows), agnostic=True)) == [(0.8, 0)]


def test_multi_label_makes_every_class_a_candidate() -> None:
    rows = [(UNIT, (0.8, 0.3, 0.6))]
    assert kept_rows(nms(prediction(rows))) == [(0.8, 0), (0.6, 2), (0.3, 1)]
    assert kept_rows(nms(prediction(rows), multi_label=False)) == [(0.8, 0)]


def test_classes_filter_after_the_best_class_is_chosen() -> None:
    rows = [(UNIT, (0.8, 0.3)), ((50.0, 50.0, 60.0, 60.0), (0.1, 0.2))]
    assert kept_rows(nms(prediction(rows), classes=[1])) == [(0.3, 1), (0.2, 1)]
    assert kept_rows(nms(prediction(rows), classes=[1], multi_label=False)) == [(0.2, 1)]
    assert kept_rows(nms(prediction(rows), classes=[])) == []


def test_thresholds_are_strict() -> None:
    rows = [(UNIT, (0.75,)), (HALF, (0.5,))]
    assert kept_rows(nms(prediction(rows), conf=0.5)) == [(0.75, 0)]
    assert kept_rows(nms(prediction(rows), iou=0.5)) == [(0.75, 0), (0.5, 0)]
    assert kept_rows(nms(prediction(rows), iou=0.4999)) == [(0.75, 0)]


def test_equal_scores_keep_the_order_of_anchors() -> None:
    rows = [((20.0 * i, 0.0, 20.0 * i + 10, 10.0), (0.5, 0.5)) for i in range(40)]
    result = nms(prediction(rows))
    assert result.boxes[0, :80, 0].tolist() == pytest.approx([20.0 * (i // 2) for i in range(80)])
    assert result.boxes[0, :80, 5].tolist() == [0, 1] * 40


def test_far_coordinates_keep_their_precision() -> None:
    # Offsetting boxes by class × a large number would round these together.
    far = [((1e5 + x, 0.0, 1e5 + x + 1, 1.0), (0.0,) * 79 + (0.5 + x / 10,)) for x in (0.0, 0.5)]
    assert len(kept_rows(nms(prediction(far), iou=0.5))) == 2


def test_max_det_keeps_the_best() -> None:
    rows = [((20.0 * i, 0.0, 20.0 * i + 10, 10.0), (0.1 + i / 1000,)) for i in range(600)]
    result = nms(prediction(rows), max_det=7)
    assert result.boxes.shape == (1, 7, 6)
    assert kept_rows(result) == [(round(0.1 + i / 1000, 4), 0) for i in range(599, 592, -1)]


def test_more_candidates_than_allowed_are_cut_with_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(nms.__globals__, "_warned", set())
    rows = [((20.0 * i, 0.0, 20.0 * i + 10, 10.0), (0.5,)) for i in range(10)]
    with caplog.at_level(logging.WARNING):
        result = nms(prediction(rows), max_candidates=4)
        nms(prediction(rows), max_candidates=4)
    assert result.boxes[0, :4, 0].tolist() == pytest.approx([0, 20, 40, 60])
    assert int(result.count[0]) == 4
    assert [record.getMessage() for record in caplog.records] == [
        "nms: 10 candidates in one image, only the best 4 are used (max_candidates)"
    ]


@pytest.mark.parametrize("multi_label", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_candidates_that_are_not_finite_are_ignored(bad: float, multi_label: bool) -> None:
    finite = [(UNIT, (0.9, 0.1)), ((50.0, 50.0, 60.0, 60.0), (0.2, 0.6))]
    rows = [*finite, ((bad, 0.0, 10.0, 10.0), (0.95, 0.95)), ((30.0, 30.0, 40.0, 40.0), (bad, bad))]
    result = nms(prediction(rows), multi_label=multi_label)
    assert kept_rows(result) == kept_rows(nms(prediction(finite), multi_label=multi_label))


def test_the_best_class_is_chosen_among_finite_scores() -> None:
    assert kept_rows(nms(prediction([(UNIT, (math.nan, 0.4))]), multi_label=False)) == [(0.4, 1)]


def test_boxes_without_area_do_not_suppress() -> None:
    point = (5.0, 5.0, 5.0, 5.0)
    assert len(kept_rows(nms(prediction([(point, (0.9,)), (point, (0.8,))])))) == 2


@pytest.mark.parametrize("shape", [(0, 6, 10), (2, 6, 0), (2, 6, 10)])
def test_no_candidates_give_an_empty_result(shape: tuple[int, int, int]) -> None:
    result = nms(torch.zeros(shape))
    assert result.boxes.shape == (shape[0], 300, 6)
    assert result.count.tolist() == [0] * shape[0]


def test_low_precision_is_computed_in_float32() -> None:
    case = random_prediction(0, anchors=200, classes=3)
    result = nms(case.half())
    assert result.boxes.dtype == torch.float32
    assert torch.equal(result.boxes, nms(case.half().float()).boxes)


def test_the_prediction_may_be_strided_and_is_not_modified() -> None:
    case = random_prediction(1, anchors=200, classes=3)
    strided = case.transpose(1, 2).contiguous().transpose(1, 2)
    before = strided.clone()
    assert torch.equal(nms(strided).boxes, nms(case).boxes)
    assert torch.equal(strided, before)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"conf": -0.1}, "conf"),
        ({"conf": math.nan}, "conf"),
        ({"iou": 1.5}, "iou"),
        ({"max_det": 0}, "max_det"),
        ({"max_candidates": 0}, "max_candidates"),
        ({"classes": [2]}, "classes"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        nms(torch.zeros(1, 6, 10), **options)


def test_a_wrong_prediction_is_named() -> None:
    with pytest.raises(ValueError, match=r"^prediction: expected"):
        nms(torch.zeros(6, 10))
    with pytest.raises(TypeError, match=r"^prediction: expected"):
        nms(torch.zeros(1, 6, 10, dtype=torch.int64))


def random_prediction(seed: int, anchors: int, classes: int, images: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    case = torch.rand(images, 4 + classes, anchors, generator=generator)
    case[:, :2] *= 60
    case[:, 2:4] = 10 + case[:, 2:4] * 30
    case[:, 4:] = (case[:, 4:] * 50).round() / 50  # many equal scores
    return case


def by_loops(one: np.ndarray, conf: float, iou: float, agnostic: bool, max_det: int) -> list[tuple[int, int]]:
    """(anchor, class) of the detections of one image, one pair of boxes at a time."""
    scores = one[4:]
    pairs = [(a, c) for a in range(one.shape[1]) for c in range(len(scores)) if scores[c, a] > np.float32(conf)]
    pairs.sort(key=lambda pair: -scores[pair[1], pair[0]])
    half = one[2:4] / 2
    corners = np.concatenate((one[:2] - half, one[:2] + half)).T
    kept: list[tuple[int, int]] = []
    for a, c in pairs:
        if not any((agnostic or c == other) and _iou(corners[k], corners[a]) > np.float32(iou) for k, other in kept):
            kept.append((a, c))
    return kept[:max_det]


def _iou(a: np.ndarray, b: np.ndarray) -> np.float32:
    zero = np.float32(0)
    inter = max(min(a[2], b[2]) - max(a[0], b[0]), zero) * max(min(a[3], b[3]) - max(a[1], b[1]), zero)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


@given(
    seed=st.integers(0, 10**6),
    anchors=st.integers(1, 250),
    conf=st.sampled_from([0.001, 0.5, 0.9]),
    iou=st.sampled_from([0.0, 0.3, 0.7]),
    agnostic=st.booleans(),
    max_det=st.sampled_from([3, 300]),
)
def test_equals_a_greedy_loop(seed: int, anchors: int, conf: float, iou: float, agnostic: bool, max_det: int) -> None:
    case = random_prediction(seed, anchors, classes=2, images=1)
    result = nms(case, conf=conf, iou=iou, agnostic=agnostic, max_det=max_det)
    one = case[0].numpy()
    expected = by_loops(one, conf, iou, agnostic, max_det)
    rows = result.boxes[0, : int(result.count[0])].numpy()
    assert [int(label) for label in rows[:, 5]] == [c for _, c in expected]
    assert rows[:, 4].tolist() == [one[4 + c, a] for a, c in expected]
    assert ((rows[:, 0] + rows[:, 2]) / 2).tolist() == pytest.approx([one[0, a] for a, _ in expected], abs=1e-4)
