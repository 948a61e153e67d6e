"""The operators in models, losses and NMS of other code: each by one call, and each call can be undone."""

from __future__ import annotations

from yolov9_fast._accelerate.loss import LossReport, accelerate_loss, restore_loss
from yolov9_fast._accelerate.model import Report, accelerate, restore
from yolov9_fast._accelerate.nms import NMSFunctions, accelerate_nms
from yolov9_fast._accelerate.step import CapturedStep, capture_step

__all__ = [
    "CapturedStep",
    "LossReport",
    "NMSFunctions",
    "Report",
    "accelerate",
    "accelerate_loss",
    "accelerate_nms",
    "capture_step",
    "restore",
    "restore_loss",
]
