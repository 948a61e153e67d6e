"""Curves against counting by hand and against COCO's AP50."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolov9_fast.metrics import evaluate_coco
from yolov9_fast.metrics.curves import confidence_curves


def test_curves_by_hand() -> None:
    scores = np.array([0.2, 0.9, 0.6])
    correct = np.array([True, True, False])
    grid = np.array([0.0, 0.2, 0.21, 0.6, 0.9, 0.91])
    precision, recall, f1 = confidence_curves(scores, correct, 4, grid)
    np.testing.assert_allclose(precision, [2 / 3, 2 / 3, 1 / 2, 1 / 2, 1, 1])
    np.testing.assert_allclose(recall, [1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 4, 0])
    np.testing.assert_allclose(f1, [4 / 7, 4 / 7, 2 / 6, 2 / 6, 2 / 5, 0])


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=30), st.integers(0, 5))
def test_curves_equal_counting(found: list[tuple[int, bool]], missed: int) -> None:
    scores = np.array([score / 20 for score, _ in found], dtype=np.float64)
    correct = np.array([right for _, right in found], dtype=bool)
    objects = int(correct.sum()) + missed + 1
    grid = np.linspace(0, 1, 21)
    precision, recall, f1 = confidence_curves(scores, correct, objects, grid)
    for i, confidence in enumerate(grid):
        kept = scores >= confidence
        hits = (kept & correct).sum()
        assert precision[i] == pytest.approx(hits / kept.sum() if kept.any() else 1.0)
        assert recall[i] == pytest.approx(hits / objects)
        assert f1[i] == pytest.approx(2 * hits / (kept.sum() + objects))


def test_the_area_under_each_curve_is_the_ap50_of_its_class(shared: Path) -> None:
    root = shared / "data" / "coco_eval_reference" / "val2014_100"
    gt = json.loads((root / "instances_val2014_100.json").read_text())
    found = json.loads((root / "instances_val2014_fakebbox100_results.json").read_text())
    curves = evaluate_coco(gt, found).curves
    assert curves.precision_at_recall.mean() == pytest.approx(0.6969727247, abs=6e-7)
    assert (np.diff(curves.precision_at_recall, axis=1) <= 1e-12).all()
    assert (np.diff(curves.recall, axis=1) <= 0).all()
    best = curves.f1.mean(axis=0)
    assert best[curves.best_index] == best.max()
