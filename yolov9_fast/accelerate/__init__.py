"""Drop-in: what makes code that someone else wrote use the operators."""

from yolov9_fast.accelerate.loss import LossReport, accelerate_loss, restore_loss

__all__ = ["LossReport", "accelerate_loss", "restore_loss"]
