"""A small detector in the module structure of the published repository, written anew from its names and formulas.

cv1, cv2, …; one SiLU instance shared by all units; pools as modules with a child `m`; a `fuse()` that folds BatchNorm,
deletes it and rebinds `forward`; a model that walks its layers by their attributes `f` and `i`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv(nn.Module):
    default_act = nn.SiLU()

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, g: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(c2, eps=1e-3, momentum=0.03)
        self.act = self.default_act if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class RepConvN(nn.Module):
    default_act = nn.SiLU()

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.act = self.default_act
        self.bn = None
        self.conv1 = Conv(c1, c2, 3, act=False)
        self.conv2 = Conv(c1, c2, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv1(x) + self.conv2(x))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class RepNBottleneck(nn.Module):
    def __init__(self, c1: int, c2: int, shortcut: bool = True) -> None:
        super().__init__()
        self.cv1 = RepConvN(c1, c2)
        self.cv2 = Conv(c2, c2, 3)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class RepNCSP(nn.Module):
    def __init__(self, c1: int, c2: int, n: int = 1) -> None:
        super().__init__()
        hidden = c2 // 2
        self.cv1 = Conv(c1, hidden)
        self.cv2 = Conv(c1, hidden)
        self.cv3 = Conv(2 * hidden, c2)
        self.m = nn.Sequential(*(RepNBottleneck(hidden, hidden) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class RepNCSPELAN4(nn.Module):
    def __init__(self, c1: int, c2: int, c3: int, c4: int, n: int = 1) -> None:
        super().__init__()
        self.c = c3 // 2
        self.cv1 = Conv(c1, c3)
        self.cv2 = nn.Sequential(RepNCSP(c3 // 2, c4, n), Conv(c4, c4, 3))
        self.cv3 = nn.Sequential(RepNCSP(c4, c4, n), Conv(c4, c4, 3))
        self.cv4 = Conv(c3 + 2 * c4, c2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.cv1(x).chunk(2, 1)
        third = self.cv2(second)
        return self.cv4(torch.cat((first, second, third, self.cv3(third)), 1))


class ELAN1(nn.Module):
    def __init__(self, c1: int, c2: int, c3: int, c4: int) -> None:
        super().__init__()
        self.cv1 = Conv(c1, c3)
        self.cv2 = Conv(c3 // 2, c4, 3)
        self.cv3 = Conv(c4, c4, 3)
        self.cv4 = Conv(c3 + 2 * c4, c2)

    forward = RepNCSPELAN4.forward


class AConv(nn.Module):
    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.cv1 = Conv(c1, c2, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv1(F.avg_pool2d(x, 2, 1, 0, False, True))


class ADown(nn.Module):
    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.cv1 = Conv(c1 // 2, c2 // 2, 3, 2)
        self.cv2 = Conv(c1 // 2, c2 // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.avg_pool2d(x, 2, 1, 0, False, True).chunk(2, 1)
        return torch.cat((self.cv1(first), self.cv2(F.max_pool2d(second, 3, 2, 1))), 1)


class SP(nn.Module):
    def __init__(self, k: int = 5, s: int = 1) -> None:
        super().__init__()
        self.m = nn.MaxPool2d(k, s, k // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x)


class SPPELAN(nn.Module):
    def __init__(self, c1: int, c2: int, c3: int) -> None:
        super().__init__()
        self.cv1 = Conv(c1, c3)
        self.cv2, self.cv3, self.cv4 = SP(), SP(), SP()
        self.cv5 = Conv(4 * c3, c2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for pool in (self.cv2, self.cv3, self.cv4):
            parts.append(pool(parts[-1]))
        return self.cv5(torch.cat(parts, 1))


class CBLinear(nn.Module):
    def __init__(self, c1: int, c2s: Sequence[int]) -> None:
        super().__init__()
        self.c2s = list(c2s)
        self.conv = nn.Conv2d(c1, sum(c2s), 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.conv(x).split(self.c2s, 1)


class CBFuse(nn.Module):
    def __init__(self, idx: Sequence[int]) -> None:
        super().__init__()
        self.idx = idx

    def forward(self, xs: Sequence[Any]) -> Tensor:
        size = xs[-1].shape[2:]
        resized = [F.interpolate(x[self.idx[i]], size=size, mode="nearest") for i, x in enumerate(xs[:-1])]
        return torch.sum(torch.stack([*resized, xs[-1]]), 0)


class DDetect(nn.Module):
    def __init__(self, nc: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.cv2 = nn.ModuleList(
            nn.Sequential(Conv(c, 16, 3), Conv(16, 16, 3, g=4), nn.Conv2d(16, 16, 1, groups=4)) for c in channels
        )
        self.cv3 = nn.ModuleList(nn.Sequential(Conv(c, 16, 3), Conv(16, 16, 3), nn.Conv2d(16, nc, 1)) for c in channels)

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat((box(x), cls(x)), 1) for x, box, cls in zip(xs, self.cv2, self.cv3, strict=True)]


class DetectionModel(nn.Module):
    """Main branch, routed auxiliary features (CBLinear, CBFuse), one head over both; H and W multiples of 16."""

    def __init__(self, nc: int = 3) -> None:
        super().__init__()
        plan: list[tuple[Any, nn.Module]] = [
            (-1, Conv(3, 8, 3, 2)),
            (-1, ELAN1(8, 16, 16, 8)),
            (-1, AConv(16, 24)),
            (-1, RepNCSPELAN4(24, 24, 16, 12, 2)),
            (-1, ADown(24, 32)),
            (-1, SPPELAN(32, 32, 16)),
            (3, CBLinear(24, [8, 16])),
            (5, CBLinear(32, [8, 16])),
            (2, Conv(24, 16)),
            ([6, 7, -1], CBFuse([1, 1])),
            ([9, 3, 5], DDetect(nc, [16, 24, 32])),
        ]
        self.model = nn.Sequential(*(module for _, module in plan))
        for index, (source, module) in enumerate(plan):
            module.i, module.f = index, source

    def forward(self, x: Tensor) -> Any:
        outputs: list[Any] = []
        for module in self.model:
            source = module.f
            x = module(
                [outputs[s] for s in source] if isinstance(source, list) else (outputs[source] if outputs else x)
            )
            outputs.append(x)
        return x

    @torch.no_grad()
    def fuse(self) -> DetectionModel:
        """Fold as the published code does: RepConvN to one convolution, then every Conv; children are deleted."""
        for module in list(self.modules()):
            if isinstance(module, RepConvN) and hasattr(module, "conv1"):
                (w3, b3), (w1, b1) = _folded(module.conv1), _folded(module.conv2)
                conv = nn.Conv2d(w3.shape[1], w3.shape[0], 3, 1, 1)
                conv.weight.copy_(w3 + F.pad(w1, (1, 1, 1, 1)))
                conv.bias.copy_(b3 + b1)
                module.conv = conv.requires_grad_(False)
                del module.conv1, module.conv2
                module.forward = module.forward_fuse
        for module in self.modules():
            if isinstance(module, Conv) and hasattr(module, "bn"):
                weight, bias = _folded(module)
                old = module.conv
                conv = nn.Conv2d(
                    old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, groups=old.groups
                )
                conv.weight.copy_(weight)
                conv.bias.copy_(bias)
                module.conv = conv.requires_grad_(False)
                del module.bn
                module.forward = module.forward_fuse
        return self


def _folded(unit: Any) -> tuple[Tensor, Tensor]:
    scale = unit.bn.weight / (unit.bn.running_var + unit.bn.eps).sqrt()
    # By a view of the weights, which only contiguous ones have.
    folded = torch.mm(torch.diag(scale), unit.conv.weight.clone().view(unit.conv.out_channels, -1))
    return folded.view(unit.conv.weight.shape), unit.bn.bias - unit.bn.running_mean * scale
