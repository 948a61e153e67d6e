"""Pictures, tables and plots that a run leaves in its folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from yolov9_fast import viz
from yolov9_fast._lazy import require
from yolov9_fast.atomic import atomic_write
from yolov9_fast.data import Batch
from yolov9_fast.engine.run_files import EventLog, RunFolder
from yolov9_fast.engine.validator import ValidationResult
from yolov9_fast.metrics import save_detections


def save_evaluation(result: ValidationResult, names: dict[int, str], folder: Path, *, plots: bool = True) -> None:
    """Write detections (COCO JSON), metrics (JSON), the per-class table, and the plots into `folder`."""
    assert result.metrics is not None
    save_detections(folder / "predictions.json", result.detections)
    atomic_write(folder / "metrics.json", json.dumps(result.metrics.as_dict(), indent=1))
    atomic_write(folder / "per_class.txt", result.metrics.table() + "\n")
    if plots:
        viz.plot_confusion_matrix(result.confusion.matrix, names, folder / "confusion_matrix.png")
        curves = {"PR": viz.plot_pr_curve, "F1": viz.plot_f1_curve, "P": viz.plot_p_curve, "R": viz.plot_r_curve}
        for name, plot in curves.items():
            plot(result.metrics.curves, folder / f"{name}_curve.png")


def write_results_plot(run: RunFolder) -> None:
    """Losses, AP and learning rates over the epochs, from results.csv."""
    viz.plot_results(run.results, run.path / "results.png")


def write_label_plot(boxes: np.ndarray, names: dict[int, str], run: RunFolder) -> None:
    """Statistics of the training labels; `boxes` [n, 5]: class, then centre and size normalised."""
    viz.plot_labels(boxes, names, run.path / "labels.png")


def write_batch_picture(batch: Batch, names: dict[int, str], run: RunFolder, index: int, events: EventLog) -> None:
    """One of the first batches with its boxes, as the network sees it."""
    picture = viz.draw_targets(batch.images, batch.targets, names)
    cv2 = require("cv2")
    cv2.imwrite(str(run.path / f"train_batch{index}.jpg"), picture)
    events.image(f"train_batch{index}", np.ascontiguousarray(picture[..., ::-1]), 0)
