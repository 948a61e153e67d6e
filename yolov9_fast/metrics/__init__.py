"""Metrics of detections: COCO average precision, precision and recall curves, confusion matrix."""

from yolov9_fast.metrics.coco import ClassMetrics, CocoMetrics, detections_to_coco, evaluate_coco, save_detections
from yolov9_fast.metrics.confusion import ConfusionMatrix
from yolov9_fast.metrics.curves import PrCurves

__all__ = [
    "ClassMetrics",
    "CocoMetrics",
    "ConfusionMatrix",
    "PrCurves",
    "detections_to_coco",
    "evaluate_coco",
    "save_detections",
]
