"""Plots of a training run and of an evaluation: losses, AP, curves over confidence and recall, confusion matrix."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from yolov9_fast._lazy import require
from yolov9_fast._untrusted import read_text, reason, user_path
from yolov9_fast.errors import DataError
from yolov9_fast.viz.color import class_color
from yolov9_fast.viz.draw import Names, class_name
from yolov9_fast.viz.figure import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, VERMILION, plain, save_figure, write_empty

_LEGEND_CLASSES = 12
_COUNTED_CELLS = 31

_Series = tuple[str, str, str]  # column, label, colour
_Entry = tuple[Any, str]  # a line and its text in the legend
_Panel = tuple[str, str, tuple[_Series, ...]]  # title, unit, series


def _loss_panel(name: str, title: str) -> _Panel:
    return title, "loss", ((f"train/{name}", "training", BLUE), (f"val/{name}", "validation", ORANGE))


_LOSSES = {"box": "Box loss", "cls": "Class loss", "dfl": "Distribution focal loss"}
_RESULT_PANELS: tuple[_Panel, ...] = (
    *(_loss_panel(name, title) for name, title in _LOSSES.items()),
    (
        "Average precision",
        "AP",
        (("metrics/ap", "AP", BLUE), ("metrics/ap50", "AP50", ORANGE), ("metrics/ap75", "AP75", GREEN)),
    ),
    (
        "Precision and recall",
        "share",
        (("metrics/precision", "precision", BLUE), ("metrics/recall", "recall", VERMILION)),
    ),
    (
        "Learning rate",
        "learning rate",
        (("lr/bias", "biases", PURPLE), ("lr/weight", "weights", BLUE), ("lr/bn", "norms", GREEN)),
    ),
)


class Curves(Protocol):
    """The attributes that the curve plots read, for C classes with objects: those of `yolov9_fast.metrics.PrCurves`."""

    @property
    def class_indices(self) -> tuple[int, ...]: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def recall_grid(self) -> np.ndarray: ...  # [R]
    @property
    def precision_at_recall(self) -> np.ndarray: ...  # [C, R]
    @property
    def ap50(self) -> np.ndarray: ...  # [C]
    @property
    def confidence(self) -> np.ndarray: ...  # [S]
    @property
    def precision(self) -> np.ndarray: ...  # [C, S]
    @property
    def recall(self) -> np.ndarray: ...  # [C, S]
    @property
    def f1(self) -> np.ndarray: ...  # [C, S]
    @property
    def best_index(self) -> int: ...
    @property
    def best_confidence(self) -> float: ...


def plot_results(csv_path: str | Path, out: str | Path) -> Path:
    """Losses, AP, precision and recall, and learning rates by epoch, from a run's `results.csv`; returns `out`.

    Each further loss term (columns `train/NAME`, `val/NAME`) gets a panel.

    Missing columns, empty cells and NaN are skipped. Raises `DataError` when the file has no header or no row.
    """
    columns = _read_columns(user_path(csv_path, "csv_path"))
    epochs = columns.get("epoch")
    if epochs is None or not np.isfinite(epochs).all():
        epochs = np.arange(1, 1 + len(next(iter(columns.values()))), dtype=np.float64)

    terms = [column.removeprefix("train/") for column in columns if column.startswith("train/")]
    panels = [*_RESULT_PANELS, *(_loss_panel(name, name) for name in terms if name not in _LOSSES)]
    rows = math.ceil(len(panels) / 3)

    def paint(figure: Any) -> None:
        grid = list(figure.subplots(rows, 3).flat)
        for axes, (title, unit, series) in zip(grid, panels, strict=False):
            _result_panel(axes, epochs, columns, series)
            axes.set(title=title, xlabel="epoch", ylabel=unit)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()

    return save_figure(out, (13.0, 3.6 * rows), paint)


def plot_pr_curve(curves: Curves, out: str | Path) -> Path:
    """Interpolated precision against recall at IoU 0.5, per class and their mean, with AP50; returns `out`."""
    labels = [f"{name}  {ap:.3f}" for name, ap in zip(curves.names, curves.ap50, strict=True)]
    mean = f"mean of {len(labels)} classes  AP50 {curves.ap50.mean():.3f}" if labels else ""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        entries = _class_curves(axes, curves, curves.recall_grid, curves.precision_at_recall, labels, mean)
        axes.set(title="Precision against recall at IoU 0.5", xlabel="recall", ylabel="precision")
        _legend(axes, entries, "AP50 by class" if len(labels) <= _LEGEND_CLASSES else None)

    return save_figure(out, (8.6, 5.6), paint)


def plot_f1_curve(curves: Curves, out: str | Path) -> Path:
    """F1 against confidence at IoU 0.5, with the best confidence marked; returns `out`."""
    return _confidence_plot(curves, curves.f1, "F1", out)


def plot_p_curve(curves: Curves, out: str | Path) -> Path:
    """Precision against confidence at IoU 0.5; returns `out`."""
    return _confidence_plot(curves, curves.precision, "Precision", out)


def plot_r_curve(curves: Curves, out: str | Path) -> Path:
    """Recall against confidence at IoU 0.5; returns `out`."""
    return _confidence_plot(curves, curves.recall, "Recall", out)


def plot_confusion_matrix(matrix: np.ndarray, names: Names, out: str | Path, normalize: bool = True) -> Path:
    """Draw a confusion matrix [nc + 1, nc + 1] (row predicted, column true, background last); returns `out`.

    `normalize`: shares of each true class (columns sum to 1) instead of counts. Up to 30 classes cells have numbers.
    Raises `ValueError` for a matrix that is not square with at least 2 rows.
    """
    counts = np.asarray(matrix, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or len(counts) < 2:
        raise ValueError(f"matrix: expected [nc + 1, nc + 1], got {list(counts.shape)}")
    size = len(counts)
    totals = counts.sum(axis=0, keepdims=True)
    values = counts / np.where(totals > 0, totals, 1.0) if normalize else counts
    labels = [plain(class_name(names, k)) for k in range(size - 1)] + ["background"]

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        top = 1.0 if normalize else max(float(values.max()), 1.0)
        shown = np.ma.masked_where(counts == 0, values)
        image = axes.imshow(shown, cmap="Blues", vmin=0.0, vmax=top, aspect="equal", interpolation="nearest")
        font = max(4.0, min(10.0, 600.0 / size))
        axes.set_xticks(range(size), labels, rotation=90 if size > 6 else 30, ha="center" if size > 6 else "right")
        axes.set_yticks(range(size), labels)
        axes.tick_params(labelsize=font, length=2)
        axes.grid(False)
        if size <= _COUNTED_CELLS:
            _write_cells(axes, counts, values, normalize, min(10.0, 165.0 / size))
        axes.axhline(size - 1.5, color=FAINT, linewidth=0.8)
        axes.axvline(size - 1.5, color=FAINT, linewidth=0.8)
        title = "Confusion matrix, shares of each true class" if normalize else "Confusion matrix, counts"
        axes.set(title=title, xlabel="true class", ylabel="predicted class")
        bar = figure.colorbar(image, ax=axes, fraction=0.04, shrink=0.8, pad=0.02)
        bar.set_label("share of the true class" if normalize else "boxes")
        bar.outline.set_visible(False)

    side = min(16.0, 5.6 + 0.13 * size)
    return save_figure(out, (side + 1.2, side), paint)


def _read_columns(path: Path) -> dict[str, np.ndarray]:
    text = read_text(path, "results", "TABLE_BYTES")
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise DataError(f"{path}: results: expected a table: {reason(error)}") from error
    if len(rows) < 2:
        raise DataError(f"{path}: expected a header and at least one row, got {len(rows)} lines")
    header = [cell.strip() for cell in rows[0]]
    return {
        name: np.array([_number(row[k]) if k < len(row) else math.nan for row in rows[1:]])
        for k, name in enumerate(header)
    }


def _number(cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _result_panel(axes: Any, epochs: np.ndarray, columns: dict[str, np.ndarray], series: tuple[_Series, ...]) -> None:
    ticker = require("matplotlib.ticker")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)
    drawn = [(columns[column], label, color) for column, label, color in series if column in columns]
    drawn = [entry for entry in drawn if np.isfinite(entry[0]).any()]
    if not drawn:
        write_empty(axes, "not recorded")
        axes.set_yticks([])
        return
    family = series[0][0].partition("/")[0]
    for k, (values, label, color) in enumerate(drawn):
        marker = "o" if np.isfinite(values).sum() <= 20 else None
        # The learning rates are equal after the warm-up: narrow lines over wide ones keep all of them visible.
        width = 1.8 + (1.6 * (len(drawn) - 1 - k) if family == "lr" else 0.0)
        known = np.isfinite(values)
        axes.plot(
            epochs[known], values[known], color=color, label=label, marker=marker, markersize=3.5, linewidth=width
        )
    highest = max(float(np.nanmax(values)) for values, _, _ in drawn)
    if family == "metrics":
        axes.set_ylim(0.0, min(1.02, 1.15 * highest) if highest > 0 else 1.0)
    elif family == "train" and highest > 0 and min(float(np.nanmin(values)) for values, _, _ in drawn) >= 0:
        limit = _loss_limit([values for values, _, _ in drawn])
        axes.set_ylim(0.0, 1.08 * limit)
        if highest > limit:
            axes.set_title(f"peaks to {highest:.3g}", loc="right", fontsize=9, fontweight="normal")
    if series[0][0] == "metrics/ap" and "metrics/ap" in columns and np.isfinite(columns["metrics/ap"]).any():
        _mark_best(axes, epochs, columns["metrics/ap"])
    axes.legend(loc="best")


def _loss_limit(curves: Sequence[np.ndarray]) -> float:
    """Upper limit of a loss panel, which a few early peaks of the validation loss may exceed."""
    highest = max(float(np.nanmax(values)) for values in curves)
    typical = max(float(np.nanquantile(values, 0.7)) for values in curves)
    return min(highest, 3.0 * typical)


def _mark_best(axes: Any, epochs: np.ndarray, ap: np.ndarray) -> None:
    best = int(np.nanargmax(ap))
    axes.plot([epochs[best]], [ap[best]], marker="o", markersize=7, color=BLUE, markeredgecolor="white", zorder=3)
    axes.set_title(f"best AP {ap[best]:.3f} in epoch {epochs[best]:g}", loc="right", fontsize=9, fontweight="normal")


def _confidence_plot(curves: Curves, values: np.ndarray, what: str, out: str | Path) -> Path:
    def paint(figure: Any) -> None:
        axes = figure.subplots()
        mean = f"mean of {len(curves.names)} classes"
        entries = _class_curves(axes, curves, curves.confidence, values, list(curves.names), mean)
        if not math.isnan(curves.best_confidence):
            entries += _mark_confidence(axes, curves.best_confidence, float(values[:, curves.best_index].mean()), what)
        unit = what if what == "F1" else what.lower()
        axes.set(title=f"{what} against confidence at IoU 0.5", xlabel="confidence", ylabel=unit)
        _legend(axes, entries, None)

    return save_figure(out, (8.6, 5.6), paint)


def _mark_confidence(axes: Any, confidence: float, height: float, what: str) -> list[_Entry]:
    axes.axvline(confidence, color=FAINT, linewidth=1.0, linestyle="--")
    note = f"{what} {height:.3f} at confidence {confidence:.3f},\nwhere the mean F1 is highest"
    (mark,) = axes.plot(
        [confidence], [height], "o", markersize=8, color=INK, markeredgecolor="white", zorder=3, label=note
    )
    return [(mark, note)]


def _class_curves(
    axes: Any, curves: Curves, x: np.ndarray, values: np.ndarray, labels: list[str], mean_label: str
) -> list[_Entry]:
    """One line per class, coloured while they are few, in grey when they are many; the mean on top. The legend."""
    axes.set(xlim=(0.0, 1.0), ylim=(0.0, 1.02))
    if not labels:
        write_empty(axes, "no objects to find")
        return []
    few = len(labels) <= _LEGEND_CLASSES
    entries: list[_Entry] = []
    for index, label, line in zip(curves.class_indices, labels, values, strict=True):
        if few:
            color = tuple(channel / 255 for channel in class_color(index))
            entries += [(drawn, plain(label)) for drawn in axes.plot(x, line, color=color, linewidth=1.4, label=label)]
        else:
            axes.plot(x, line, color=FAINT, linewidth=0.6, alpha=0.5)
    if len(labels) > 1:
        (mean,) = axes.plot(x, values.mean(axis=0), color=INK, linewidth=3.0, label=mean_label)
        entries.append((mean, mean_label))
    if not few:
        (single,) = axes.plot([], [], color=FAINT, linewidth=0.8, label="single classes")
        entries.append((single, "single classes"))
    return entries


def _legend(axes: Any, entries: list[_Entry], title: str | None) -> None:
    if not entries:
        return
    # matplotlib leaves out lines whose label begins with an underscore: the texts are set afterwards.
    legend = axes.legend(
        [line for line, _ in entries],
        ["" for _ in entries],
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        title=title,
        alignment="left",
        borderaxespad=0.0,
    )
    for text, (_, label) in zip(legend.get_texts(), entries, strict=True):
        text.set_text(label)


def _write_cells(axes: Any, counts: np.ndarray, values: np.ndarray, normalize: bool, font: float) -> None:
    dark = (1.0 if normalize else max(float(values.max()), 1.0)) * 0.55
    for row, column in zip(*np.nonzero(counts), strict=True):
        value = values[row, column]
        text = f"{value:.2f}" if normalize else f"{int(value)}"
        color = "white" if value > dark else INK
        axes.text(column, row, text, ha="center", va="center", fontsize=font, color=color)
