"""The operators: public functions of the same names as their modules (`ops.box_iou(...)`, `from yolov9_fast.ops.box_iou import ...`)."""

from yolov9_fast.ops.box_iou import box_iou

__all__ = ["box_iou"]
