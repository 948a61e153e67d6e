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
from yolov9_fast.nn.gelan import GELAN
from yolov9_fast.nn.graph_blocks import register_own_blocks
from yolov9_fast.nn.heads import DFL, DDetect, DualDDetect, Head
from yolov9_fast.nn.output import DetectionOutput
from yolov9_fast.nn.registry import BlockSpec, block_names, find_block, load_block, register_block
from yolov9_fast.nn.yolov7 import SPPCSPC, AnchorDetect, MPDown

register_own_blocks()

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
    "BlockSpec",
    "CBFuse",
    "CBLinear",
    "Concat",
    "Conv",
    "DDetect",
    "DetectionOutput",
    "DualDDetect",
    "Head",
    "MPDown",
    "RepBottleneck",
    "RepCSP",
    "RepConv",
    "Silence",
    "Upsample",
    "block_names",
    "find_block",
    "load_block",
    "register_block",
]
