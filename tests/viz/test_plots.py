"""Plots show the given numbers, also when some are missing."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yolov9_fast.errors import DataError, UserError
from yolov9_fast.metrics import PrCurves
from yolov9_fast.viz import (
    class_color,
    plot_confusion_matrix,
    plot_f1_curve,
    plot_labels,
    plot_p_curve,
    plot_pr_curve,
    plot_r_curve,
    plot_results,
)
from yolov9_fast.viz import figure as figure_module

HEADER = (
    "epoch,train/box,train/cls,train/dfl,val/box,val/cls,val/dfl,metrics/ap,metrics/ap50,metrics/ap75,"
    "metrics/precision,metrics/recall,lr/bias,lr/weight,lr/bn,seconds"
)


def curves(classes: int) -> PrCurves:
    confidence = np.linspace(0, 1, 1001)
    recall = np.repeat(1 - confidence[None], classes, axis=0)
    precision = np.repeat(0.5 + confidence[None] / 2, classes, axis=0)
    f1 = 2 * precision * recall / (precision + recall)
    at_recall = np.linspace(0.3, 0.9, classes)[:, None] * np.ones((classes, 101))
    names = tuple(f"class {k}" for k in range(classes))
    return PrCurves(
        tuple(range(classes)), names, np.linspace(0, 1, 101), at_recall, at_recall.mean(1), confidence, precision,
        recall, f1,
    )  # fmt: skip


def lines(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_results_show_every_column_by_epoch(tmp_path: Path, figures: list[Any]) -> None:
    rows = "\n".join(f"{e}," + ",".join(f"{(k + e) / 40:.4f}" for k in range(15)) for e in range(1, 6))
    (tmp_path / "results.csv").write_text(f"{HEADER}\n{rows}\n")
    out = plot_results(tmp_path / "results.csv", tmp_path / "results.png")
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    box, _cls, _dfl, ap, pr, lr = figures[0].axes
    assert list(lines(box)) == ["training", "validation"]
    np.testing.assert_allclose(lines(box)["training"].get_xydata(), [(e, e / 40) for e in range(1, 6)])
    np.testing.assert_allclose(lines(box)["validation"].get_ydata(), [(3 + e) / 40 for e in range(1, 6)])
    assert list(lines(ap)) == ["AP", "AP50", "AP75"]
    assert list(lines(pr)) == ["precision", "recall"]
    assert list(lines(lr)) == ["biases", "weights", "norms"]
    assert all(axes.get_title(loc="left") and axes.get_xlabel() == "epoch" for axes in figures[0].axes)
    assert ap.get_title(loc="right") == "best AP 0.275 in epoch 5"


@pytest.mark.parametrize(
    "text",
    [
        "epoch,train/box\n1,2.5\n",
        "epoch,train/box,val/box,metrics/ap\n1,2.5,nan,nan\n2,inf,,\n",
        " epoch , train/box \n 1 , 2.5 \n\n",
        "train/box\n2.5\n",
        "epoch,something/else\n1,2\n",
        "epoch,train/box,val/box\n1,2.5\n",
    ],
)
def test_missing_columns_rows_and_numbers_are_skipped(tmp_path: Path, figures: list[Any], text: str) -> None:
    (tmp_path / "results.csv").write_text(text)
    plot_results(tmp_path / "results.csv", tmp_path / "results.png")
    box, *_, lr = figures[0].axes
    assert len(figures[0].axes) == 6
    assert [t.get_text() for t in lr.texts] == ["not recorded"]
    if "train/box" in text:
        np.testing.assert_allclose(lines(box)["training"].get_xydata(), [(1, 2.5)])


def test_a_further_loss_term_has_a_panel(tmp_path: Path, figures: list[Any]) -> None:
    (tmp_path / "results.csv").write_text("epoch,train/box,train/entropy,val/entropy\n1,2.5,-1.5,0.5\n")
    plot_results(tmp_path / "results.csv", tmp_path / "results.png")
    assert len(figures[0].axes) == 9
    term, *unused = figures[0].axes[6:]
    assert term.get_title(loc="left") == "entropy"
    np.testing.assert_allclose(lines(term)["training"].get_xydata(), [(1, -1.5)])
    assert term.get_ylim()[0] < -1.5
    assert not any(axes.axison for axes in unused)


@pytest.mark.parametrize("text", ["", "epoch,train/box\n"])
def test_results_without_rows_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(DataError, match=r"results\.csv"):
        plot_results(tmp_path / "results.csv", tmp_path / "results.png")
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(DataError, match="got a pipe"):
        plot_results(tmp_path / "pipe.csv", tmp_path / "results.png")
    (tmp_path / "field.csv").write_text("epoch\n" + "1" * 200_000)
    with pytest.raises(DataError, match="expected a table: field larger"):
        plot_results(tmp_path / "field.csv", tmp_path / "results.png")
    with pytest.raises(DataError, match="absent"):
        plot_results(tmp_path / "absent.csv", tmp_path / "results.png")


def test_few_classes_have_a_line_each_in_their_colour_and_a_mean(tmp_path: Path, figures: list[Any]) -> None:
    plot_pr_curve(curves(3), tmp_path / "pr.png")
    (axes,) = figures[0].axes
    drawn = lines(axes)
    assert list(drawn) == ["class 0  0.300", "class 1  0.600", "class 2  0.900", "mean of 3 classes  AP50 0.600"]
    np.testing.assert_allclose(drawn["mean of 3 classes  AP50 0.600"].get_ydata(), 0.6)
    assert drawn["class 1  0.600"].get_color() == tuple(channel / 255 for channel in class_color(1))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("recall", "precision")


def test_many_classes_share_one_entry_in_the_legend(tmp_path: Path, figures: list[Any]) -> None:
    plot_pr_curve(curves(80), tmp_path / "pr.png")
    (axes,) = figures[0].axes
    assert list(lines(axes)) == ["mean of 80 classes  AP50 0.600", "single classes"]
    assert len(axes.get_lines()) == 82


@pytest.mark.parametrize(
    ("plot", "name"), [(plot_f1_curve, "F1"), (plot_p_curve, "Precision"), (plot_r_curve, "Recall")]
)
def test_confidence_curves_mark_the_highest_mean_f1(tmp_path: Path, figures: list[Any], plot: Any, name: str) -> None:
    made = curves(2)
    plot(made, tmp_path / "curve.png")
    (axes,) = figures[0].axes
    (marked,) = (line for label, line in lines(axes).items() if label.startswith(name))
    values = {"F1": made.f1, "Precision": made.precision, "Recall": made.recall}[name]
    assert marked.get_xydata()[0].tolist() == [made.best_confidence, values[:, made.best_index].mean()]
    assert made.best_confidence == made.confidence[made.f1[0].argmax()]


@pytest.mark.parametrize("plot", [plot_pr_curve, plot_f1_curve, plot_p_curve, plot_r_curve])
def test_curves_without_objects_have_a_note(tmp_path: Path, figures: list[Any], plot: Any) -> None:
    plot(curves(0), tmp_path / "curve.png")
    assert [t.get_text() for t in figures[0].axes[0].texts] == ["no objects to find"]


def test_shares_of_a_confusion_matrix_add_up_to_one_in_each_column(tmp_path: Path, figures: list[Any]) -> None:
    matrix = np.array([[6, 1, 3], [0, 3, 1], [2, 0, 0]])
    plot_confusion_matrix(matrix, ["cat", "dog"], tmp_path / "confusion.png")
    axes = figures[0].axes[0]
    shown = axes.images[0].get_array()
    np.testing.assert_allclose(shown.filled(0), [[0.75, 0.25, 0.75], [0, 0.75, 0.25], [0.25, 0, 0]])
    assert shown.mask.tolist() == (matrix == 0).tolist()
    assert [t.get_text() for t in axes.get_xticklabels()] == ["cat", "dog", "background"]
    cells = {(t.get_position()): t.get_text() for t in axes.texts}
    assert cells[(0, 0)] == "0.75"
    assert cells[(1, 0)] == "0.25"
    assert len(cells) == 6
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("true class", "predicted class")


def test_counts_of_a_confusion_matrix_can_be_shown(tmp_path: Path, figures: list[Any]) -> None:
    plot_confusion_matrix(np.array([[6, 1], [0, 0]]), {0: "cat"}, tmp_path / "confusion.png", normalize=False)
    assert sorted(t.get_text() for t in figures[0].axes[0].texts) == ["1", "6"]


@pytest.mark.slow
def test_a_large_confusion_matrix_names_all_classes_and_writes_no_cells(tmp_path: Path, figures: list[Any]) -> None:
    plot_confusion_matrix(np.eye(81), [f"class {k}" for k in range(80)], tmp_path / "confusion.png")
    axes = figures[0].axes[0]
    assert len(axes.get_yticklabels()) == 81
    assert not axes.texts


def test_an_empty_confusion_matrix_is_drawn_and_one_that_is_not_square_refused(
    tmp_path: Path, figures: list[Any]
) -> None:
    plot_confusion_matrix(np.zeros((3, 3)), ["cat", "dog"], tmp_path / "confusion.png")
    assert figures[0].axes[0].images[0].get_array().mask.all()
    with pytest.raises(ValueError, match="matrix"):
        plot_confusion_matrix(np.zeros((3, 4)), ["cat", "dog"], tmp_path / "crooked.png")
    assert not (tmp_path / "crooked.png").exists()


def test_labels_are_counted_placed_and_measured(tmp_path: Path, figures: list[Any]) -> None:
    boxes = np.array([[0, 0.1, 0.9, 0.2, 0.3], [0, 0.1, 0.9, 0.4, 0.5], [2, 0.5, 0.5, 0.6, 0.1]])
    plot_labels(boxes, {0: "cat", 1: "dog", 2: "cow"}, tmp_path / "labels.png")
    bars, centres, sizes = figures[0].axes[:3]
    assert [bar.get_height() for bar in bars.patches] == [2, 0, 1]
    assert [t.get_text() for t in bars.get_xticklabels()] == ["cat", "dog", "cow"]
    heat = np.asarray(centres.images[0].get_array())
    assert heat.shape == (5, 5)
    assert heat.sum() == 3
    assert heat[4, 0] == 2
    assert heat[2, 2] == 1
    np.testing.assert_allclose(sizes.collections[0].get_offsets(), boxes[:, 3:])


def test_labels_of_an_empty_set_and_of_80_classes_are_drawn(tmp_path: Path, figures: list[Any]) -> None:
    plot_labels(np.zeros((0, 5)), {}, tmp_path / "none.png")
    many = np.column_stack([np.arange(80) % 80, np.full((80, 4), 0.5)])
    plot_labels(many, [f"class {k}" for k in range(80)], tmp_path / "many.png")
    assert [t.get_text() for t in figures[0].axes[1].texts] == ["no boxes"]
    assert len(figures[1].axes[0].patches) == 80


def test_bad_labels_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[n, 5\]"):
        plot_labels(np.zeros((3, 4)), {}, tmp_path / "labels.png")
    with pytest.raises(ValueError, match="NaN"):
        plot_labels(np.full((1, 5), np.nan), {}, tmp_path / "labels.png")


def test_a_plot_that_cannot_be_written_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"confusion\.png"):
        plot_confusion_matrix(np.eye(2), ["cat"], tmp_path / "blocked" / "confusion.png")


def test_plots_leave_no_other_file_and_choose_the_format_by_suffix(tmp_path: Path) -> None:
    plot_confusion_matrix(np.eye(2), ["cat"], tmp_path / "confusion.svg")
    assert [p.name for p in tmp_path.iterdir()] == ["confusion.svg"]
    assert b"<svg" in (tmp_path / "confusion.svg").read_bytes()


@pytest.mark.slow
def test_importing_the_package_loads_neither_opencv_nor_matplotlib_nor_pycocotools() -> None:
    code = (
        "import sys, yolov9_fast.viz, yolov9_fast.metrics;"
        "print([m for m in ('cv2', 'matplotlib', 'pycocotools') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


def test_peaks_of_a_loss_may_exceed_the_panel() -> None:
    from yolov9_fast.viz.plots import _loss_limit

    descending = np.linspace(6.0, 2.0, 30)
    spiked = descending.copy()
    spiked[8] = 4000.0
    assert _loss_limit([descending]) == 6.0
    assert 6.0 <= _loss_limit([descending, spiked]) < 20.0


NAMES = ("price_$5_$10", "_hidden", "a\\$b", "two\nlines\x1b[31m", "half \udc80", "x" * 3000)


def named(names: tuple[str, ...]) -> PrCurves:
    return dataclasses.replace(curves(len(names)), names=names)


def texts(figure: Any) -> list[str]:
    """The strings as they are drawn: what matplotlib does to dollar signs is done."""
    from matplotlib.text import Text

    result = []
    for text in figure.findobj(Text):
        drawn, mathematics = text._preprocess_math(text.get_text())
        assert not mathematics
        result.append(drawn)
    return result


def test_legends_show_class_names_as_given(tmp_path: Path, figures: list[Any]) -> None:
    plot_pr_curve(named(NAMES), tmp_path / "a.png")
    plot_f1_curve(named(NAMES), tmp_path / "b.png")
    for figure, suffix in ((figures[0], "  0.300"), (figures[1], "")):
        shown = [text.partition("  ")[0] for text in texts(figure)]
        for name in ("price_$5_$10", "_hidden", "a\\$b", r"two\nlines\x1b[31m", r"half \udc80"):
            assert name in shown, suffix


def test_axes_show_class_names_as_given(tmp_path: Path, figures: list[Any]) -> None:
    plot_confusion_matrix(np.eye(len(NAMES) + 1), NAMES, tmp_path / "c.png")
    plot_labels(np.array([[1, 0.5, 0.5, 0.2, 0.2]]), NAMES, tmp_path / "l.png")
    for figure in figures:
        assert {"price_$5_$10", "_hidden", "a\\$b", r"two\nlines\x1b[31m", r"half \udc80"} <= set(texts(figure))
        assert max(map(len, texts(figure))) < 100


def test_characters_without_a_font_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "\U000f1234"  # a private character, which no font should have
    for k in range(2):
        plot_pr_curve(named((name, "é")), tmp_path / f"{k}.png")
    assert [record.getMessage() for record in caplog.records] == [
        f"plots: no installed font has {name}; a Noto font of that script has"
    ]


def test_another_font_is_used_for_missing_characters(tmp_path: Path, figures: list[Any], monkeypatch: Any) -> None:
    known = figure_module._characters
    monkeypatch.setattr(
        figure_module,
        "_characters",
        lambda file: known(file) - {ord("Ω")} if Path(file).name == "DejaVuSans.ttf" else known(file),
    )
    figure_module._fonts_for.cache_clear()
    plot_pr_curve(named(("Ω",)), tmp_path / "a.png")
    first, second = figures
    label = next(text for text in second.axes[0].get_legend().get_texts())
    assert label.get_fontfamily()[0] == "DejaVu Sans"
    assert len(label.get_fontfamily()) > 1
    assert first is not second
    figure_module._fonts_for.cache_clear()
