"""The blocks of the paper, by its names."""

from yolov9_fast.nn.blocks import (
    CSPELAN,
    ELAN,
    SPPELAN,
    AConv,
    ADown,
    CBFuse,
    CBLinear,
    Concat,
    Conv,
    RepBottleneck,
    RepConv,
    RepCSP,
    Silence,
    Upsample,
)
from yolov9_fast.nn.gelan import GELAN, block_names, load_block, register_block
from yolov9_fast.nn.heads import DFL, DDetect, DualDDetect
from yolov9_fast.nn.output import DetectionOutput
from yolov9_fast.nn.yolov7 import SPPCSPC, AnchorDetect, MPDown

__all__ = [
    "CSPELAN",
    "DFL",
    "ELAN",
    "GELAN",
    "SPPCSPC",
    "SPPELAN",
    "AConv",
    "ADown",
    "AnchorDetect",
    "CBFuse",
    "CBLinear",
    "Concat",
    "Conv",
    "DDetect",
    "DetectionOutput",
    "DualDDetect",
    "MPDown",
    "RepBottleneck",
    "RepCSP",
    "RepConv",
    "Silence",
    "Upsample",
    "block_names",
    "load_block",
    "register_block",
]
