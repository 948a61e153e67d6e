"""The library's own blocks, registered for graphs."""

from __future__ import annotations

from typing import Any

from yolov9_fast.nn import blocks, gelan, heads, yolov7
from yolov9_fast.nn.registry import Role, register_block


def _first_argument(_: list[Any], arguments: tuple[Any, ...]) -> Any:
    first = arguments[0]
    return list(first) if isinstance(first, tuple | list) else first


def _last_input(inputs: list[Any], _: tuple[Any, ...]) -> Any:
    return inputs[-1]


_SIZED: dict[Role, tuple[Any, ...]] = {
    "layer": (blocks.Conv, blocks.RepConv, blocks.AConv, blocks.ADown, yolov7.MPDown),
    "elan": (blocks.ELAN, blocks.CSPELAN, gelan.GELAN),
    "pyramid": (blocks.SPPELAN, yolov7.SPPCSPC),
    "route": (blocks.CBLinear,),
}
"""Blocks whose first argument is their output's channels."""


def register_own_blocks() -> None:
    """Register every block and head of this package under its class's name, and GELAN's stages."""
    for role, makes in _SIZED.items():
        for make in makes:
            register_block(make.__name__, role=role, out_channels=_first_argument)(make)
    for name, stage in gelan.PAPER_BLOCKS.items():
        register_block(name, out_channels=_first_argument)(stage)
    register_block("Upsample", role="upsample", takes_channels=False, out_channels=_last_input)(blocks.Upsample)
    register_block("Silence", role="identity", takes_channels=False, out_channels=_last_input)(blocks.Silence)
    register_block("CBFuse", inputs="many", role="layer", takes_channels=False, out_channels=_last_input)(blocks.CBFuse)
    register_block(
        "Concat", inputs="many", role="concat", takes_channels=False, out_channels=lambda inputs, _: sum(inputs)
    )(blocks.Concat)
    for head in (heads.DDetect, heads.DualDDetect, yolov7.AnchorDetect):
        register_block(head.__name__, inputs="many", role="head")(head)
