"""Drop-in: what makes code that someone else wrote use the operators."""

from yolov9_fast.accelerate.loss import LossReport, accelerate_loss, restore_loss

__all__ = ["LossReport", "accelerate_loss", "restore_loss"]
from yolov9_fast.accelerate.nms import NMSFunctions, accelerate_nms

__all__ = ["NMSFunctions", "accelerate_nms"]
