"""Training losses of the detector."""

from yolov9_fast.losses.detection import DetectionLoss, Loss
from yolov9_fast.losses.targets import PaddedTargets, pad_targets
from yolov9_fast.losses.terms import LossTerm, parse_terms

__all__ = ["DetectionLoss", "Loss", "LossTerm", "PaddedTargets", "pad_targets", "parse_terms"]
