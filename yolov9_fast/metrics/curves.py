"""Precision, recall and F1 against confidence, and precision against recall, at IoU 0.5, from pycocotools' matches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE_STEPS = 1001
_IOU_50 = 0
_AREA_ALL = 0


@dataclass(frozen=True)
class PrCurves:
    """Curves of the C classes that have at least one object; R = 101 recalls, S = 1001 confidences; all float64.

    `precision_at_recall` is the interpolated precision that COCO's AP50 averages; `precision`, `recall` and `f1`
    count the detections whose score is at least the confidence. Without such a detection precision is 1 and recall 0.
    Crowds are ignored, as in COCO.
    """

    class_indices: tuple[int, ...]
    names: tuple[str, ...]
    recall_grid: np.ndarray  # [R]
    precision_at_recall: np.ndarray  # [C, R]
    ap50: np.ndarray  # [C]
    confidence: np.ndarray  # [S]
    precision: np.ndarray  # [C, S]
    recall: np.ndarray  # [C, S]
    f1: np.ndarray  # [C, S]

    @property
    def best_index(self) -> int:
        """Index into `confidence` of the highest mean F1 over classes: the middle of its first plateau."""
        if not len(self.names):
            return 0
        mean = self.f1.mean(axis=0)
        first = int(mean.argmax())
        below = np.flatnonzero(mean[first:] < mean[first] - 1e-12)
        length = int(below[0]) if len(below) else len(mean) - first
        return first + (length - 1) // 2

    @property
    def best_confidence(self) -> float:
        """The confidence with the highest mean F1 over classes; NaN when no detection is correct."""
        if not len(self.names) or self.f1.max() == 0.0:
            return float("nan")
        return float(self.confidence[self.best_index])


def curves_from_evaluation(evaluation: Any, names: list[str]) -> PrCurves:
    """Build the curves from a `COCOeval` after `evaluate()` and `accumulate()`; `names[k]` names its k-th category."""
    parameters = evaluation.params
    precision_at_recall = evaluation.eval["precision"][_IOU_50, :, :, _AREA_ALL, -1]  # [R, K], -1 where no objects
    images = len(parameters.imgIds)
    areas = len(parameters.areaRng)
    grid = np.linspace(0.0, 1.0, CONFIDENCE_STEPS)
    indices: list[int] = []
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for k in range(len(parameters.catIds)):
        start = (k * areas + _AREA_ALL) * images
        scores, correct, objects = _matches(evaluation.evalImgs[start : start + images])
        if objects:
            indices.append(k)
            rows.append(confidence_curves(scores, correct, objects, grid))
    stacked = np.array(rows, dtype=np.float64).reshape(len(rows), 3, len(grid))
    at_recall = precision_at_recall[:, indices].T.copy()
    return PrCurves(
        class_indices=tuple(indices),
        names=tuple(names[k] for k in indices),
        recall_grid=np.asarray(parameters.recThrs, dtype=np.float64),
        precision_at_recall=at_recall,
        ap50=at_recall.mean(axis=1),
        confidence=grid,
        precision=stacked[:, 0],
        recall=stacked[:, 1],
        f1=stacked[:, 2],
    )


def confidence_curves(
    scores: np.ndarray, correct: np.ndarray, objects: int, grid: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 [S] at each confidence of `grid` [S].

    `scores` [n] and `correct` [n] (bool: matched an object) of all detections of one class, in any order; `objects` >
    0.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.concatenate([[0], np.cumsum(correct[order])]).astype(np.float64)
    kept = np.searchsorted(-scores[order], -grid, side="right")  # detections with score >= confidence
    true_positives = hits[kept]
    precision = np.where(kept > 0, true_positives / np.maximum(kept, 1), 1.0)
    recall = true_positives / objects
    f1 = 2.0 * true_positives / (kept + objects)
    return precision, recall, f1


def _matches(images: list[dict[str, Any] | None]) -> tuple[np.ndarray, np.ndarray, int]:
    """Scores, correctness and object count of one category over all images; without ignored detections and objects."""
    scores, correct, objects = [np.zeros(0)], [np.zeros(0, dtype=bool)], 0
    for image in images:
        if image is None:
            continue
        counted = ~image["dtIgnore"][_IOU_50].astype(bool)
        scores.append(np.asarray(image["dtScores"], dtype=np.float64)[counted])
        correct.append((image["dtMatches"][_IOU_50] > 0)[counted])
        objects += int(np.count_nonzero(image["gtIgnore"] == 0))
    return np.concatenate(scores), np.concatenate(correct), objects
