"""Boxes drawn into images, and plots of training runs; OpenCV and matplotlib are imported at first use."""

from yolov9_fast.viz.color import class_color
from yolov9_fast.viz.draw import draw_detections, draw_targets
from yolov9_fast.viz.labels import plot_labels
from yolov9_fast.viz.plots import (
    plot_confusion_matrix,
    plot_f1_curve,
    plot_p_curve,
    plot_pr_curve,
    plot_r_curve,
    plot_results,
)

__all__ = [
    "class_color",
    "draw_detections",
    "draw_targets",
    "plot_confusion_matrix",
    "plot_f1_curve",
    "plot_labels",
    "plot_p_curve",
    "plot_pr_curve",
    "plot_r_curve",
    "plot_results",
]
