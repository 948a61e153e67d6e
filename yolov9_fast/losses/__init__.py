"""Training losses of the detector."""

from yolov9_fast.losses.detection import DetectionLoss, Loss
from yolov9_fast.losses.targets import PaddedTargets, pad_targets

__all__ = ["DetectionLoss", "Loss", "PaddedTargets", "pad_targets"]
