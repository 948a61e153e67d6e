"""The operators, as functions: `ops.NAME` is the function of the module of the same name.

Each module is imported here, at once: importing it later would bind the module over the function.
"""

from yolov9_fast.ops._adown_pool import adown_pool
from yolov9_fast.ops._assign import Assignment, assign
from yolov9_fast.ops._batch_norm import Norm
from yolov9_fast.ops._bn_silu import bias_silu, bn_silu
from yolov9_fast.ops._box_iou import box_iou
from yolov9_fast.ops._cbfuse import cbfuse
from yolov9_fast.ops._concat import ConcatBuffer, concat, split_view, tap
from yolov9_fast.ops._conv1x1 import conv1x1, conv1x1_pair
from yolov9_fast.ops._decode import decode
from yolov9_fast.ops._detection_loss import detection_loss
from yolov9_fast.ops._nms import Detections, nms
from yolov9_fast.ops._nms_boxes import KeptBoxes, nms_boxes
from yolov9_fast.ops._rep_bn_silu import rep_bn_silu
from yolov9_fast.ops._spp import spp, spp_with_input

__all__ = [
    "Assignment",
    "ConcatBuffer",
    "Detections",
    "KeptBoxes",
    "Norm",
    "adown_pool",
    "assign",
    "bias_silu",
    "bn_silu",
    "box_iou",
    "cbfuse",
    "concat",
    "conv1x1",
    "conv1x1_pair",
    "decode",
    "detection_loss",
    "nms",
    "nms_boxes",
    "rep_bn_silu",
    "split_view",
    "spp",
    "spp_with_input",
    "tap",
]
