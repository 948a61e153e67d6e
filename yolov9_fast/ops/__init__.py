"""The operators: `ops.NAME` is a function with a reference in eager PyTorch and implementations for several backends.

`register_backend` and `register_implementation` add backends and implementations from outside the package.
"""

from yolov9_fast.ops._adown_pool import adown_pool
from yolov9_fast.ops._assign import Assignment, assign
from yolov9_fast.ops._augment import augment
from yolov9_fast.ops._backend import (
    BackendUnavailable,
    UnknownBackend,
    backend,
    get_backend,
    register_backend,
    set_backend,
)
from yolov9_fast.ops._batch_norm import Norm
from yolov9_fast.ops._bn_silu import bias_silu, bn_silu
from yolov9_fast.ops._box_iou import box_iou
from yolov9_fast.ops._cbfuse import cbfuse
from yolov9_fast.ops._concat import ConcatBuffer, concat, split_view, tap
from yolov9_fast.ops._conv1x1 import conv1x1, conv1x1_pair
from yolov9_fast.ops._convs import convs
from yolov9_fast.ops._decode import AssignmentInputs, decode, decode_for_assignment
from yolov9_fast.ops._detection_loss import detection_loss
from yolov9_fast.ops._flat_update import adam_update, sgd_update
from yolov9_fast.ops._nms import Detections, nms
from yolov9_fast.ops._nms_boxes import KeptBoxes, nms_boxes
from yolov9_fast.ops._operator import (
    Operator,
    implementation,
    list_backends,
    list_operators,
    reference,
    register_implementation,
    register_operator,
    unregister_backend,
    unregister_implementation,
    unregister_operator,
)
from yolov9_fast.ops._rep_bn_silu import rep_bn_silu
from yolov9_fast.ops._spp import spp, spp_with_input
from yolov9_fast.ops._supports import needs_gradient, not_on

__all__ = [
    "Assignment",
    "AssignmentInputs",
    "BackendUnavailable",
    "ConcatBuffer",
    "Detections",
    "KeptBoxes",
    "Norm",
    "Operator",
    "UnknownBackend",
    "adam_update",
    "adown_pool",
    "assign",
    "augment",
    "backend",
    "bias_silu",
    "bn_silu",
    "box_iou",
    "cbfuse",
    "concat",
    "conv1x1",
    "conv1x1_pair",
    "convs",
    "decode",
    "decode_for_assignment",
    "detection_loss",
    "get_backend",
    "implementation",
    "list_backends",
    "list_operators",
    "needs_gradient",
    "nms",
    "nms_boxes",
    "not_on",
    "reference",
    "register_backend",
    "register_implementation",
    "register_operator",
    "rep_bn_silu",
    "set_backend",
    "sgd_update",
    "split_view",
    "spp",
    "spp_with_input",
    "tap",
    "unregister_backend",
    "unregister_implementation",
    "unregister_operator",
]
