"""Training losses of the detector."""

from yolov9_fast.losses.detection import DetectionLoss, Loss

__all__ = ["DetectionLoss", "Loss"]
