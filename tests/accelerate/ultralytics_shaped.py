"""A small detector in the module structure of Ultralytics' YOLOv9, written anew from its names and formulas.

As the official one, with RepConv, RepBottleneck and RepCSP under these names, and max pools as direct children.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.accelerate import official_shaped as official
from tests.accelerate.official_shaped import ELAN1, AConv, ADown, Conv, DDetect


class RepConv(official.RepConvN):
    pass


class RepBottleneck(official.RepNBottleneck):
    def __init__(self, c1: int, c2: int, shortcut: bool = True) -> None:
        super().__init__(c1, c2, shortcut)
        self.cv1 = RepConv(c1, c2)


class RepCSP(official.RepNCSP):
    def __init__(self, c1: int, c2: int, n: int = 1) -> None:
        super().__init__(c1, c2, n)
        self.m = nn.Sequential(*(RepBottleneck(c2 // 2, c2 // 2) for _ in range(n)))


class RepNCSPELAN4(official.RepNCSPELAN4):
    def __init__(self, c1: int, c2: int, c3: int, c4: int, n: int = 1) -> None:
        super().__init__(c1, c2, c3, c4, n)
        self.cv2 = nn.Sequential(RepCSP(c3 // 2, c4, n), Conv(c4, c4, 3))
        self.cv3 = nn.Sequential(RepCSP(c4, c4, n), Conv(c4, c4, 3))


class SPPELAN(nn.Module):
    def __init__(self, c1: int, c2: int, c3: int) -> None:
        super().__init__()
        self.c = c3
        self.cv1 = Conv(c1, c3)
        self.cv2, self.cv3, self.cv4 = (nn.MaxPool2d(kernel_size=5, stride=1, padding=2) for _ in range(3))
        self.cv5 = Conv(4 * c3, c2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        parts.extend(pool(parts[-1]) for pool in (self.cv2, self.cv3, self.cv4))
        return self.cv5(torch.cat(parts, 1))


class DetectionModel(nn.Module):
    """A backbone and a head; input [B, 3, H, W], H and W multiples of 16."""

    def __init__(self, nc: int = 3) -> None:
        super().__init__()
        self.model = nn.Sequential(
            Conv(3, 8, 3, 2),
            ELAN1(8, 16, 16, 8),
            AConv(16, 24),
            RepNCSPELAN4(24, 24, 16, 12, 2),
            ADown(24, 32),
            SPPELAN(32, 32, 16),
            DDetect(nc, [24, 32]),
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        for layer in self.model[:4]:
            x = layer(x)
        return self.model[6]([x, self.model[5](self.model[4](x))])

    fuse = official.DetectionModel.fuse
