"""The operators, as functions: `ops.NAME` is the function of the module of the same name.

Each module is imported here, at once: importing it later would bind the module over the function.
"""

from yolov9_fast.ops.box_iou import box_iou

__all__ = ["box_iou"]
