"""The computational blocks of GELAN and PGI (YOLOv9, arXiv 2402.13616, sections 3 and 4 and appendix).

Every block takes and returns [B, C, H, W] (CBLinear returns a list of them). Child names are those of the official
checkpoints, so that state-dict keys agree. `forward` is the definition, in eager PyTorch; where the operators are not
set to "eager", `planned` runs the steps of `nn.steps` instead: fused, and without copies.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yolov9_fast.nn import steps
from yolov9_fast.nn.plan import planned

BN_EPS = 1e-3
BN_MOMENTUM = 0.03


class Conv(nn.Module):
    """Convolution without bias, BatchNorm, SiLU; padding k // 2.

    Args:
        in_channels, out_channels: channels.
        kernel, stride: square kernel and stride in pixels.
        groups: convolution groups.
        activation: False leaves out the SiLU (the branches of `RepConv`).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(out_channels, eps=BN_EPS, momentum=BN_MOMENTUM)
        self.act: nn.Module = nn.SiLU(inplace=True) if activation else nn.Identity()

    @planned(steps.unit)
    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.act(self.bn(self.conv(x)))
        return z


class RepConv(nn.Module):
    """RepConv without identity branch: SiLU(BN(conv 3×3) + BN(conv 1×1)); one 3×3 convolution `conv` once fused."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1: Conv | None = Conv(in_channels, out_channels, 3, activation=False)
        self.conv2: Conv | None = Conv(in_channels, out_channels, 1, activation=False)
        self.conv: nn.Conv2d | None = None
        self.act = nn.SiLU(inplace=True)

    @planned(steps.rep_unit)
    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            y: Tensor = self.conv(x)
        else:
            assert self.conv1 is not None
            assert self.conv2 is not None
            y = self.conv1(x) + self.conv2(x)
        z: Tensor = self.act(y)
        return z


class RepBottleneck(nn.Module):
    """x + Conv 3×3(RepConv(x)); the residual only where input and output channels agree."""

    def __init__(self, in_channels: int, out_channels: int, shortcut: bool = True) -> None:
        super().__init__()
        self.cv1 = RepConv(in_channels, out_channels)
        self.cv2 = Conv(out_channels, out_channels, 3)
        self.residual = shortcut and in_channels == out_channels

    @planned(steps.bottleneck)
    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        z: Tensor = x + y if self.residual else y
        return z


class RepCSP(nn.Module):
    """Cross-stage-partial block over `depth` RepBottlenecks at half the output width (RepNCSP)."""

    def __init__(self, in_channels: int, out_channels: int, depth: int = 1) -> None:
        super().__init__()
        hidden = out_channels // 2
        self.cv1 = Conv(in_channels, hidden)
        self.cv2 = Conv(in_channels, hidden)
        self.cv3 = Conv(2 * hidden, out_channels)
        self.m = nn.Sequential(*(RepBottleneck(hidden, hidden) for _ in range(depth)))

    @planned(steps.csp)
    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))
        return z


class ELANBase(nn.Module):
    """Split after `cv1`, a chain of stages on the second half, aggregation of everything by the last 1×1.

    Stages are named cv2, cv3, …; the aggregation takes the next number (cv4 for the published depth of 2).
    """

    def __init__(
        self, in_channels: int, out_channels: int, split_channels: int, stage_channels: int, stages: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        if split_channels % 2:
            raise ValueError(f"split_channels: expected an even number, got {split_channels}")
        self.elan_depth = len(stages)
        self.cv1 = Conv(in_channels, split_channels)
        for number, stage in enumerate(stages, start=2):
            setattr(self, f"cv{number}", stage)
        setattr(self, f"cv{self.elan_depth + 2}", Conv(split_channels + self.elan_depth * stage_channels, out_channels))

    @planned(steps.elan)
    def forward(self, x: Tensor) -> Tensor:
        first, second = self.cv1(x).chunk(2, 1)
        parts = [first, second]
        for number in range(2, self.elan_depth + 2):
            parts.append(getattr(self, f"cv{number}")(parts[-1]))
        z: Tensor = getattr(self, f"cv{self.elan_depth + 2}")(torch.cat(parts, 1))
        return z


class ELAN(ELANBase):
    """ELAN with plain 3×3 convolutions as stages (ELAN1): args out, split width c3, stage width c4."""

    def __init__(
        self, in_channels: int, out_channels: int, split_channels: int, stage_channels: int, elan_depth: int = 2
    ) -> None:
        widths = [split_channels // 2] + [stage_channels] * elan_depth
        stages = [Conv(a, b, 3) for a, b in itertools.pairwise(widths)]
        super().__init__(in_channels, out_channels, split_channels, stage_channels, stages)


class CSPELAN(ELANBase):
    """CSP-ELAN (RepNCSPELAN4): each stage is RepCSP of depth `csp_depth` followed by a 3×3 convolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        split_channels: int,
        stage_channels: int,
        csp_depth: int = 1,
        elan_depth: int = 2,
    ) -> None:
        widths = [split_channels // 2] + [stage_channels] * elan_depth
        stages = [nn.Sequential(RepCSP(a, b, csp_depth), Conv(b, b, 3)) for a, b in itertools.pairwise(widths)]
        super().__init__(in_channels, out_channels, split_channels, stage_channels, stages)


class AConv(nn.Module):
    """Down-sampling by 2: average pool 2×2 stride 1, then Conv 3×3 stride 2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.cv1 = Conv(in_channels, out_channels, 3, 2)

    @planned(steps.a_conv)
    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.cv1(F.avg_pool2d(x, 2, 1))
        return z


class ADown(nn.Module):
    """Down-sampling by 2 in two halves after an average pool 2×2 stride 1: Conv 3×3 stride 2; max pool, Conv 1×1."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.cv1 = Conv(in_channels // 2, out_channels // 2, 3, 2)
        self.cv2 = Conv(in_channels // 2, out_channels // 2)

    @planned(steps.a_down)
    def forward(self, x: Tensor) -> Tensor:
        first, second = F.avg_pool2d(x, 2, 1).chunk(2, 1)
        return torch.cat((self.cv1(first), self.cv2(F.max_pool2d(second, 3, 2, 1))), 1)


class SPPELAN(nn.Module):
    """SPP-ELAN: 1×1, three successive max pools 5×5 stride 1, 1×1 over all four."""

    def __init__(self, in_channels: int, out_channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.cv1 = Conv(in_channels, hidden_channels)
        self.cv5 = Conv(4 * hidden_channels, out_channels)

    @planned(steps.spp_elan)
    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        z: Tensor = self.cv5(torch.cat(parts, 1))
        return z


class CBLinear(nn.Module):
    """Routing of multi-level reversible information: one 1×1 convolution with bias, split along the channels."""

    def __init__(self, in_channels: int, out_channels: Sequence[int]) -> None:
        super().__init__()
        self.out_channels = list(out_channels)
        self.conv = nn.Conv2d(in_channels, sum(self.out_channels), 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.conv(x).split(self.out_channels, 1))


class CBFuse(nn.Module):
    """Sum of the chosen split of every CBLinear, nearest-resized to the last input, and the last input itself."""

    def __init__(self, indices: Sequence[int]) -> None:
        super().__init__()
        self.indices = list(indices)

    @planned(steps.cb_fuse)
    def forward(self, inputs: Sequence[list[Tensor] | Tensor]) -> Tensor:
        target = inputs[-1]
        assert isinstance(target, Tensor)
        resized = [
            F.interpolate(split[index], size=target.shape[2:], mode="nearest")
            for split, index in zip(inputs[:-1], self.indices, strict=True)
        ]
        z: Tensor = sum(resized[1:], resized[0]) + target if resized else target
        return z


class Concat(nn.Module):
    """Concatenation along the channels, in the listed order."""

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        return torch.cat(tuple(inputs), 1)


class Upsample(nn.Module):
    """Nearest-neighbour up-sampling by an integer factor."""

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=self.factor, mode="nearest")


class Silence(nn.Module):
    """Identity; makes the image itself addressable as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return x
