"""Confusion matrices counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from yolov9_fast.metrics import ConfusionMatrix

A = (0.0, 0.0, 10.0, 10.0)
B = (50.0, 50.0, 60.0, 60.0)
A_SHIFTED = (0.0, 1.0, 10.0, 11.0)  # IoU with A: 90 / 110 = 0.82
A_HALF = (0.0, 0.0, 10.0, 5.0)  # IoU with A: 0.5
A_THIRD = (0.0, 5.0, 10.0, 15.0)  # IoU with A: 1 / 3


def matrix(detections: list[tuple[float, ...]], labels: list[tuple[float, ...]], **options: float) -> np.ndarray:
    confusion = ConfusionMatrix(2, **options)
    confusion.update(torch.tensor(detections).reshape(-1, 6), torch.tensor(labels).reshape(-1, 5))
    return confusion.matrix


def test_each_kind_of_match_has_its_cell() -> None:
    got = matrix(
        [(*A, 0.9, 0), (*B, 0.8, 0), (100.0, 0.0, 110.0, 10.0, 0.7, 1)],
        [(0, *A), (1, *B), (1, 0.0, 100.0, 10.0, 110.0)],
    )
    np.testing.assert_array_equal(got, [[1, 1, 0], [0, 0, 1], [0, 1, 0]])


def test_each_object_is_taken_once_by_the_best_overlap() -> None:
    got = matrix([(*A_HALF, 0.99, 1), (*A_SHIFTED, 0.5, 0)], [(0, *A)])
    np.testing.assert_array_equal(got, [[1, 0, 0], [0, 0, 1], [0, 0, 0]])


def test_of_equal_overlaps_the_higher_score_wins() -> None:
    got = matrix([(*A, 0.5, 1), (*A, 0.9, 0)], [(0, *A)])
    np.testing.assert_array_equal(got, [[1, 0, 0], [0, 0, 1], [0, 0, 0]])


def test_a_detection_without_its_best_object_takes_the_next() -> None:
    near = (0.0, 2.0, 10.0, 12.0)  # overlaps A_SHIFTED by 0.82 as A does
    got = matrix([(*A, 0.9, 0), (*A_SHIFTED, 0.8, 1)], [(0, *A), (1, *near)])
    np.testing.assert_array_equal(got, [[1, 0, 0], [0, 1, 0], [0, 0, 0]])


def test_thresholds_decide_what_counts() -> None:
    assert matrix([(*A, 0.24, 0)], [(0, *A)])[2, 0] == 1
    assert matrix([(*A, 0.25, 0)], [(0, *A)])[0, 0] == 1
    assert matrix([(*A_THIRD, 0.9, 0)], [(0, *A)])[0].tolist() == [0, 0, 1]
    assert matrix([(*A_THIRD, 0.9, 0)], [(0, *A)], iou=0.3)[0].tolist() == [1, 0, 0]


def test_counts_of_images_add_up() -> None:
    confusion = ConfusionMatrix(2)
    none_found, none_there = torch.zeros(0, 6), torch.zeros(0, 5)
    confusion.update(none_found, none_there)
    assert confusion.matrix.sum() == 0
    confusion.update(torch.tensor([[*A, 0.9, 1]]), none_there)
    confusion.update(none_found, torch.tensor([[1, *A], [0, *B]]))
    np.testing.assert_array_equal(confusion.matrix, [[0, 0, 0], [0, 0, 1], [1, 1, 0]])


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"classes in 0\.\.1, got 2"):
        matrix([(*A, 0.9, 2)], [])
    with pytest.raises(ValueError, match=r"labels: expected shape \[n, 5\]"):
        ConfusionMatrix(2).update(torch.zeros(0, 6), torch.zeros(3, 6))
    with pytest.raises(ValueError, match="iou"):
        ConfusionMatrix(2, iou=1.5)
