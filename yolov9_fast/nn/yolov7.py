"""What YOLOv7 (arXiv 2207.02696) has beyond the blocks of GELAN: MP down-sampling, SPPCSPC, and its anchor-based head.

Its other blocks are GELAN's. The backbone's ELAN is `GELAN` over plain convolutions, the neck's ELAN-H is `ELAN` with
four stages: two 1×1 convolutions of one input are one convolution split in halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yolov9_fast.errors import UserError
from yolov9_fast.nn.blocks import Conv
from yolov9_fast.nn.heads import Head, HeadOptions, Shapes
from yolov9_fast.nn.output import DetectionOutput
from yolov9_fast.nn.parts import Parts, widths
from yolov9_fast.nn.plan import Planning, Slot, Step, planned
from yolov9_fast.nn.steps import chain
from yolov9_fast.ops._boxes import STRIDES
from yolov9_fast.ops._spp import spp_with_input

ANCHORS_PER_LEVEL = 3


def _max_pool(x: Tensor) -> Tensor:
    """2×2; odd sizes round up, as those of a strided convolution do."""
    return F.max_pool2d(x, 2, ceil_mode=True)


@dataclass(frozen=True)
class _MPDownStep:
    first: Step
    second: Step
    channels: tuple[int, ...] | None
    width: None = None

    def __call__(self, x: Tensor, residual: Tensor | None = None, slot: Slot | None = None) -> Tensor:
        parts = Parts(self.channels)
        first = self.first(_max_pool(x), None, parts.slot(0))
        y = parts.joined(first, self.second(x, None, parts.slot(1)))
        return y if residual is None else y + residual


def _mp_down(block: MPDown, planning: Planning) -> _MPDownStep:
    first, second = planning.step(block.cv1), chain((block.cv2, block.cv3), planning)
    assert second is not None
    return _MPDownStep(first, second, widths(first, second))


@dataclass(frozen=True)
class _SPPCSPCStep:
    units: tuple[Step, ...]

    @property
    def width(self) -> int | None:
        return self.units[-1].width

    def __call__(self, x: Tensor, residual: Tensor | None = None, slot: Slot | None = None) -> Tensor:
        cv1, cv2, cv3, cv4, cv5, cv6, cv7 = self.units
        pools, both = Parts(None if cv4.width is None else (cv4.width,) * 4), Parts(widths(cv6, cv2))
        y = cv4(cv3(cv1(x)), None, pools.slot(0))
        y = cv5(pools.joined(*spp_with_input(y, pools.slots(y, 1, 2, 3))))
        y = cv6(y, None, both.slot(0))
        return cv7(both.joined(y, cv2(x, None, both.slot(1))), residual, slot)


def _sppcspc(block: SPPCSPC, planning: Planning) -> _SPPCSPCStep:
    units = (block.cv1, block.cv2, block.cv3, block.cv4, block.cv5, block.cv6, block.cv7)
    return _SPPCSPCStep(tuple(map(planning.step, units)))


class MPDown(nn.Module):
    """Down-sampling by 2 in two branches of half the output: max pool 2×2, Conv 1×1; Conv 1×1, Conv 3×3 stride 2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        if out_channels % 2:
            raise ValueError(f"out_channels: expected an even number, got {out_channels}")
        half = out_channels // 2
        self.cv1 = Conv(in_channels, half)
        self.cv2 = Conv(in_channels, half)
        self.cv3 = Conv(half, half, 3, 2)

    @planned(_mp_down)
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.cv1(_max_pool(x)), self.cv3(self.cv2(x))), 1)


class SPPCSPC(nn.Module):
    """Cross-stage-partial pyramid pooling: max pools of 5, 9 and 13 on one branch, a 1×1 as the other.

    The pools are three successive ones of 5×5, which is the same. All convolutions are as wide as the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        width = out_channels
        self.cv1 = Conv(in_channels, width)
        self.cv2 = Conv(in_channels, width)
        self.cv3 = Conv(width, width, 3)
        self.cv4 = Conv(width, width)
        self.cv5 = Conv(4 * width, width)
        self.cv6 = Conv(width, width, 3)
        self.cv7 = Conv(2 * width, out_channels)

    @planned(_sppcspc)
    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv4(self.cv3(self.cv1(x)))]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        z: Tensor = self.cv7(torch.cat((self.cv6(self.cv5(torch.cat(parts, 1))), self.cv2(x)), 1))
        return z


class AnchorDetect(Head):
    """YOLOv7's head as deployed (its implicit knowledge folded in): for each anchor x, y, w, h, objectness, classes.

    It runs, but has no loss here: the assignment and the loss of this library are anchor-free.

    Args:
        channels: of the three inputs P3, P4, P5.
        num_classes: nc ≥ 1.
        anchors: for each level w, h of three anchors in pixels, six numbers.
        class_tower, box_groups: None; it has no towers.
    """

    graph_arguments = ("anchors",)

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        anchors: Sequence[Sequence[float]],
        class_tower: int | None = None,
        box_groups: int | None = None,
    ) -> None:
        super().__init__(num_classes)
        if class_tower is not None or box_groups is not None:
            raise ValueError("an anchor-based head has no class tower and no box groups; leave these options out")
        self.anchors = _checked_anchors(anchors)
        self.m = nn.ModuleList(nn.Conv2d(c, ANCHORS_PER_LEVEL * (5 + num_classes), 1) for c in channels)

    @classmethod
    def read_options(cls, shapes: Shapes, prefix: str) -> HeadOptions | None:
        outputs = shapes.get(f"{prefix}m.0.weight")
        return HeadOptions(max(outputs[0] // ANCHORS_PER_LEVEL - 5, 1), None, None) if outputs else None

    def forward(self, features: Sequence[Tensor]) -> DetectionOutput:
        """Raw maps [B, 3·(5 + nc), H/s, W/s], anchor-major."""
        if self.training:
            self.check_trainable()
        return DetectionOutput([convolution(x) for convolution, x in zip(self.m, features, strict=True)])

    def check_trainable(self) -> None:
        raise UserError(
            "an anchor-based head cannot be trained here: the losses are anchor-free. Train the anchor-free yolov7-af, "
            "or call eval() to run the network"
        )

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        """[B, 4 + nc, A]: xywh in pixels, objectness × class; anchors level by level, anchor-major, row-major.

        xy = (2σ − ½ + cell)·s and wh = (2σ)²·anchor, with the cell's corner in cells of s pixels.
        """
        levels = []
        for level, stride, anchors in zip(maps, self.strides, self.anchors, strict=True):
            batch, _, height, width = level.shape
            y = level if level.dtype == torch.float64 else level.float()
            y = y.reshape(batch, ANCHORS_PER_LEVEL, 5 + self.num_classes, height, width).sigmoid()
            columns = torch.arange(width, device=y.device, dtype=y.dtype).expand(height, width)
            rows = torch.arange(height, device=y.device, dtype=y.dtype)[:, None].expand(height, width)
            centres = (2 * y[:, :, :2] - 0.5 + torch.stack((columns, rows))) * stride
            # Filled by the device: a tensor of the numbers would be copied to it, which waits for a GPU.
            sizes = torch.stack([y.new_full((), size) for size in anchors]).view(1, ANCHORS_PER_LEVEL, 2, 1, 1)
            found = torch.cat((centres, (2 * y[:, :, 2:4]) ** 2 * sizes, y[:, :, 4:5] * y[:, :, 5:]), 2)
            levels.append(found.transpose(1, 2).flatten(2))
        return torch.cat(levels, 2)


def _checked_anchors(anchors: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    try:
        found = tuple(tuple(float(size) for size in level) for level in anchors)
    except (TypeError, ValueError):
        found = ()
    if [len(level) for level in found] != [2 * ANCHORS_PER_LEVEL] * len(STRIDES) or min(map(min, found)) <= 0:
        raise ValueError(f"anchors: expected w, h of three anchors in pixels for each of three levels, got {anchors!r}")
    return found
