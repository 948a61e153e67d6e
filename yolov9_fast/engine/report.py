"""What a run reports: the numbers of an epoch, the files of an evaluation."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from yolov9_fast import viz
from yolov9_fast.atomic import atomic_write
from yolov9_fast.engine.validator import ValidationResult
from yolov9_fast.metrics import save_detections

log = logging.getLogger(__name__)

_METRICS = ("ap", "ap50", "ap75", "precision", "recall")
_SIZES = ("small", "medium", "large")
_CURVES = {"PR": viz.plot_pr_curve, "F1": viz.plot_f1_curve, "P": viz.plot_p_curve, "R": viz.plot_r_curve}


def loss_text(losses: Mapping[str, float]) -> str:
    """`box 1.234 cls …`."""
    return " ".join(f"{name} {value:.3f}" for name, value in losses.items())


def try_plot(plot: Callable[..., object], *arguments: object) -> None:
    """Call `plot`; a plot that fails is a warning and ends no run."""
    try:
        plot(*arguments)
    except Exception as error:
        log.warning(f"{getattr(plot, '__name__', 'plot')}: the plot is left out: {error}")


def validation_columns(result: ValidationResult) -> dict[str, float]:
    """The columns of results.csv that come from the validation; the AP of a size without objects is left out."""
    assert result.metrics is not None
    assert result.loss is not None
    columns = {f"val/{name}": value for name, value in result.loss.items()}
    columns |= {f"metrics/{name}": getattr(result.metrics, name) for name in _METRICS}
    by_size = {f"metrics/ap_{size}": getattr(result.metrics, f"ap_{size}") for size in _SIZES}
    columns |= {name: value for name, value in by_size.items() if not math.isnan(value)}
    return columns | {"seconds/val": sum(result.seconds.values())}


def evaluation_files(plots: bool) -> list[str]:
    """Names of the files that the final evaluation of a run leaves in its folder."""
    data = ["predictions.json", "metrics.json", "per_class.txt"]
    drawn = ["confusion_matrix.png", *(f"{name}_curve.png" for name in _CURVES), "results.png"]
    return data + drawn if plots else data


def save_evaluation(result: ValidationResult, names: dict[int, str], folder: Path, *, plots: bool = True) -> None:
    """Write detections (COCO JSON), metrics (JSON), the per-class table, and the plots into `folder`."""
    assert result.metrics is not None
    save_detections(folder / "predictions.json", result.detections)
    atomic_write(folder / "metrics.json", json.dumps(result.metrics.as_dict(), indent=1))
    atomic_write(folder / "per_class.txt", result.metrics.table() + "\n")
    if plots:
        try_plot(viz.plot_confusion_matrix, result.confusion.matrix, names, folder / "confusion_matrix.png")
        for name, plot in _CURVES.items():
            try_plot(plot, result.metrics.curves, folder / f"{name}_curve.png")
