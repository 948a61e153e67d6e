"""What YOLOv7 (arXiv 2207.02696) has beyond the blocks of GELAN: MP down-sampling, SPPCSPC, and its anchor-based head.

Its other blocks are GELAN's. The backbone's ELAN is `GELAN` over plain convolutions, the neck's ELAN-H is `ELAN` with
four stages: two 1×1 convolutions of one input are one convolution split in halves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yolov9_fast.errors import UserError
from yolov9_fast.nn import functional as fast
from yolov9_fast.nn.blocks import Conv
from yolov9_fast.nn.heads import STRIDES
from yolov9_fast.nn.output import DetectionOutput
from yolov9_fast.ops._spp import spp_with_input

ANCHORS_PER_LEVEL = 3


class MPDown(nn.Module):
    """Down-sampling by 2 in two branches of half the output: max pool 2×2, Conv 1×1; Conv 1×1, Conv 3×3 stride 2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        if out_channels % 2:
            raise ValueError(f"the output of MPDown must be even, got {out_channels}")
        half = out_channels // 2
        self.cv1 = Conv(in_channels, half)
        self.cv2 = Conv(in_channels, half)
        self.cv3 = Conv(half, half, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(x, 2, ceil_mode=True)  # odd sizes round up, as the strided convolution's do
        if not fast.fused(x):
            return torch.cat((self.cv1(pooled), self.cv3(self.cv2(x))), 1)
        slots = fast.Slots((self.cv1.conv.out_channels, self.cv3.conv.out_channels))
        first = fast.last_unit(self.cv1, pooled, slot=slots(0))
        return slots.join((first, fast.last_unit(self.cv3, self.cv2(x), slot=slots(1))))


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

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv3(self.cv1(x))
        if not fast.fused(x):
            parts = [self.cv4(y)]
            for _ in range(3):
                parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
            return self.cv7(torch.cat((self.cv6(self.cv5(torch.cat(parts, 1))), self.cv2(x)), 1))
        width = self.cv4.conv.out_channels
        pools = fast.Slots((width,) * 4)
        y = fast.last_unit(self.cv4, y, slot=pools(0))
        y = self.cv5(pools.join(spp_with_input(y, out=[pools(number).open(y) for number in (1, 2, 3)])))
        both = fast.Slots((width, width))
        y = fast.last_unit(self.cv6, y, slot=both(0))
        return self.cv7(both.join((y, fast.last_unit(self.cv2, x, slot=both(1)))))


class AnchorDetect(nn.Module):
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
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if class_tower is not None or box_groups is not None:
            raise ValueError("an anchor-based head has no class tower and no box groups; leave these options out")
        self.anchors = _checked_anchors(anchors)
        self.num_classes = num_classes
        self.class_tower = None
        self.box_groups = None
        self.strides = STRIDES
        self.m = nn.ModuleList(nn.Conv2d(c, ANCHORS_PER_LEVEL * (5 + num_classes), 1) for c in channels)

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
            sizes = torch.tensor(anchors, device=y.device, dtype=y.dtype).view(1, ANCHORS_PER_LEVEL, 2, 1, 1)
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
