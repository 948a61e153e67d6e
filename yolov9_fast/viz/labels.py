"""Statistics of the ground truth: objects per class, positions, sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from yolov9_fast.viz.color import class_color
from yolov9_fast.viz.draw import Names, class_name
from yolov9_fast.viz.figure import INK, plain, save_figure, write_empty

_NAMED_BARS = 40
_MAX_POINTS = 20000
_MAX_HEAT_BINS = 50


def plot_labels(boxes: np.ndarray, names: Names, out: str | Path) -> Path:
    """Objects per class, a heat map of box centres, widths against heights; returns `out`.

    `boxes` [n, 5]: class, x, y, w, h (centre form, normalised to the image); n may be 0. Raises `ValueError` for
    another shape or values that are not finite.
    """
    rows = np.asarray(boxes, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != 5:
        raise ValueError(f"boxes: expected shape [n, 5], got {list(rows.shape)}")
    if not np.isfinite(rows).all():
        raise ValueError("boxes: expected finite numbers, got NaN or infinity")
    classes = rows[:, 0].astype(np.int64)
    count = max(len(names), int(classes.max()) + 1 if len(classes) else 0, 1)

    def paint(figure: Any) -> None:
        upper, lower = figure.subfigures(2, 1, height_ratios=(1.0, 1.25))
        _class_bars(upper.subplots(), np.bincount(classes, minlength=count), names)
        left, right = lower.subplots(1, 2)
        _centre_map(lower, left, rows)
        _size_scatter(right, rows)

    return save_figure(out, (11.0, 9.0), paint)


def _class_bars(axes: Any, histogram: np.ndarray, names: Names) -> None:
    size = len(histogram)
    colors = [tuple(channel / 255 for channel in class_color(k)) for k in range(size)]
    bars = axes.bar(range(size), histogram, color=colors, width=0.8 if size > 12 else 0.6)
    many = size > 6
    font = max(4.5, min(10.0, 560.0 / size))
    labels = [plain(class_name(names, k)) for k in range(size)]
    step = -(-size // (2 * _NAMED_BARS))
    axes.set_xticks(range(0, size, step), labels[::step], rotation=90 if many else 0, fontsize=font, ha="center")
    if size <= _NAMED_BARS // 2:
        axes.bar_label(bars, fontsize=9, padding=2)
    axes.set_xlim(-0.7, size - 0.3)
    axes.set_ylim(top=max(1.0, 1.12 * histogram.max()))
    axes.grid(False, axis="x")
    axes.set(title=f"Objects per class ({int(histogram.sum()):,} in all)", ylabel="objects")


def _centre_map(figure: Any, axes: Any, rows: np.ndarray) -> None:
    axes.set(title="Box centres", xlabel="x / image width", ylabel="y / image height", aspect="equal")
    axes.grid(False)
    if not len(rows):
        axes.set(xlim=(0, 1), ylim=(1, 0))
        write_empty(axes, "no boxes")
        return
    bins = int(np.clip(np.sqrt(len(rows) / 3), 5, _MAX_HEAT_BINS))
    heat, _, _ = np.histogram2d(rows[:, 2], rows[:, 1], bins=bins, range=((0, 1), (0, 1)))
    image = axes.imshow(heat, extent=(0, 1, 1, 0), cmap="viridis", interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, shrink=0.85, pad=0.02)
    bar.set_label("boxes in a cell")
    bar.outline.set_visible(False)


def _size_scatter(axes: Any, rows: np.ndarray) -> None:
    axes.set(title="Box sizes", xlabel="width / image width", ylabel="height / image height", aspect="equal")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    if not len(rows):
        write_empty(axes, "no boxes")
        return
    chosen = rows
    if len(rows) > _MAX_POINTS:  # more points cover each other and make the file slow to open
        chosen = rows[np.random.default_rng(0).choice(len(rows), _MAX_POINTS, replace=False)]
    palette = np.array([class_color(k) for k in range(int(rows[:, 0].max()) + 1)]) / 255
    alpha = float(np.clip(600 / len(chosen), 0.2, 0.8))
    axes.scatter(
        chosen[:, 3], chosen[:, 4], s=9, c=palette[chosen[:, 0].astype(int)], alpha=alpha, linewidths=0, rasterized=True
    )
    median = np.median(rows[:, 3:], axis=0)
    axes.plot(*median, marker="+", markersize=11, markeredgewidth=2, color=INK, linestyle="none")
    axes.annotate(
        f"median {median[0]:.2f} × {median[1]:.2f}", median, xytext=(7, 5), textcoords="offset points", fontsize=9
    )
