"""A small detector in the module structure of the MIT-licensed YOLO, written anew from its names and formulas.

conv1, conv2, … instead of cv1, cv2, …; `bottleneck` instead of `m`; AConv's unit is `conv`; pools are child modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv(nn.Module):
    def __init__(
        self, c1: int, c2: int, kernel: int, stride: int = 1, activation: bool = True, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(c2, eps=1e-3, momentum=3e-2)
        self.act = nn.SiLU(True) if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class RepConv(nn.Module):
    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.act = nn.SiLU(True)
        self.conv1 = Conv(c1, c2, 3, activation=False)
        self.conv2 = Conv(c1, c2, 1, activation=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv1(x) + self.conv2(x))


class RepNBottleneck(nn.Module):
    def __init__(self, c1: int, c2: int, residual: bool = True) -> None:
        super().__init__()
        self.conv1 = RepConv(c1, c2)
        self.conv2 = Conv(c2, c2, 3)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        return x + y if self.residual else y


class RepNCSP(nn.Module):
    def __init__(self, c1: int, c2: int, repeat: int = 1) -> None:
        super().__init__()
        neck = c2 // 2
        self.conv1 = Conv(c1, neck, 1)
        self.conv2 = Conv(c1, neck, 1)
        self.conv3 = Conv(2 * neck, c2, 1)
        self.bottleneck = nn.Sequential(*(RepNBottleneck(neck, neck) for _ in range(repeat)))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(torch.cat((self.bottleneck(self.conv1(x)), self.conv2(x)), 1))


class ELAN(nn.Module):
    def __init__(self, c1: int, c2: int, part: int, process: int | None = None) -> None:
        super().__init__()
        process = part // 2 if process is None else process
        self.conv1 = Conv(c1, part, 1)
        self.conv2 = Conv(part // 2, process, 3)
        self.conv3 = Conv(process, process, 3)
        self.conv4 = Conv(part + 2 * process, c2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.conv1(x).chunk(2, 1)
        third = self.conv2(second)
        return self.conv4(torch.cat((first, second, third, self.conv3(third)), 1))


class RepNCSPELAN(nn.Module):
    def __init__(self, c1: int, c2: int, part: int, process: int, repeat: int = 1) -> None:
        super().__init__()
        self.conv1 = Conv(c1, part, 1)
        self.conv2 = nn.Sequential(RepNCSP(part // 2, process, repeat), Conv(process, process, 3))
        self.conv3 = nn.Sequential(RepNCSP(process, process, repeat), Conv(process, process, 3))
        self.conv4 = Conv(part + 2 * process, c2, 1)

    forward = ELAN.forward


class AConv(nn.Module):
    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.avg_pool = nn.AvgPool2d(2, 1)
        self.conv = Conv(c1, c2, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.avg_pool(x))


class ADown(nn.Module):
    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.avg_pool = nn.AvgPool2d(2, 1)
        self.conv1 = Conv(c1 // 2, c2 // 2, 3, 2)
        self.max_pool = nn.MaxPool2d(3, 2, 1)
        self.conv2 = Conv(c1 // 2, c2 // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.avg_pool(x).chunk(2, 1)
        return torch.cat((self.conv1(first), self.conv2(self.max_pool(second))), 1)


class SPPELAN(nn.Module):
    def __init__(self, c1: int, c2: int, neck: int) -> None:
        super().__init__()
        self.conv1 = Conv(c1, neck, 1)
        self.pools = nn.ModuleList(nn.MaxPool2d(5, 1, 2) for _ in range(3))
        self.conv5 = Conv(4 * neck, c2, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.conv1(x)]
        for pool in self.pools:
            parts.append(pool(parts[-1]))
        return self.conv5(torch.cat(parts, 1))


class CBLinear(nn.Module):
    def __init__(self, c1: int, outs: Sequence[int]) -> None:
        super().__init__()
        self.outs = list(outs)
        self.conv = nn.Conv2d(c1, sum(outs), 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.conv(x).split(self.outs, 1)


class CBFuse(nn.Module):
    def __init__(self, index: Sequence[int]) -> None:
        super().__init__()
        self.idx = index

    def forward(self, xs: Sequence[Any]) -> Tensor:
        target = xs[-1]
        resized = [F.interpolate(x[i], target.shape[2:], mode="nearest") for x, i in zip(xs, self.idx, strict=False)]
        return torch.stack([*resized, target]).sum(0)


class YOLO(nn.Module):
    """Same plan as the official-shaped detector; input [B, 3, H, W], H and W multiples of 16."""

    def __init__(self, nc: int = 3) -> None:
        super().__init__()
        self.model = nn.ModuleList(
            [
                Conv(3, 8, 3, 2),
                ELAN(8, 16, 16, 8),
                AConv(16, 24),
                RepNCSPELAN(24, 24, 16, 12, 2),
                ADown(24, 32),
                SPPELAN(32, 32, 16),
                CBLinear(24, [8, 16]),
                CBLinear(32, [8, 16]),
                Conv(24, 16, 1),
                CBFuse([1, 1]),
                nn.ModuleList(nn.Conv2d(c, 16 + nc, 1) for c in (16, 24, 32)),
            ]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        layers = self.model
        y: list[Any] = []
        for layer in layers[:6]:
            x = layer(x)
            y.append(x)
        y += [layers[6](y[3]), layers[7](y[5]), layers[8](y[2])]
        y.append(layers[9](y[6:9]))
        return [conv(feature) for conv, feature in zip(layers[10], (y[9], y[3], y[5]), strict=True)]
