"""GELAN: ELAN whose stages hold any computational block (paper, section 4.2 and figure 4c).

A computational block is a class (or function) called as `block(in_channels, out_channels, depth)`; it returns a module
that maps [B, in_channels, H, W] to [B, out_channels, H, W]. It is named as in `nn.registry`: "conv", "res", "dark",
"csp" of the paper's table 2, a block of `register_block`, or an import path `package.module:Class`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import Tensor, nn

from yolov9_fast.nn.blocks import Conv, ELANBase, RepConv, RepCSP
from yolov9_fast.nn.registry import PROBE_SIZE, BlockSpec, find_block

Block = Callable[[int, int, int], nn.Module]


class _Chain(nn.Sequential):
    """`depth` units in a chain; the first one changes the channels."""

    def __init__(self, unit: Callable[[int, int], nn.Module], in_channels: int, out_channels: int, depth: int) -> None:
        widths = [in_channels] + [out_channels] * depth
        super().__init__(*(unit(a, b) for a, b in itertools.pairwise(widths)))


class _Residual(nn.Module):
    """x + the chain of units in `body`, where input and output channels agree."""

    def __init__(self, in_channels: int, out_channels: int, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.residual = in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.residual else y


class ConvBlock(_Chain):
    """Plain 3×3 convolutions: the "Conv" of table 2."""

    def __init__(self, in_channels: int, out_channels: int, depth: int = 1) -> None:
        super().__init__(lambda a, b: Conv(a, b, 3), in_channels, out_channels, depth)


class ResBlock(_Chain):
    """Residual bottlenecks 1×1, RepConv 3×3, 1×1 at half the output width: the "Res" of table 2."""

    def __init__(self, in_channels: int, out_channels: int, depth: int = 1) -> None:
        def unit(a: int, b: int) -> nn.Module:
            return _Residual(a, b, Conv(a, b // 2), RepConv(b // 2, b // 2), Conv(b // 2, b))

        super().__init__(unit, in_channels, out_channels, depth)


class DarkBlock(_Chain):
    """Residual bottlenecks 1×1 at half the output width, 3×3: the "Dark" of table 2."""

    def __init__(self, in_channels: int, out_channels: int, depth: int = 1) -> None:
        def unit(a: int, b: int) -> nn.Module:
            return _Residual(a, b, Conv(a, b // 2), Conv(b // 2, b, 3))

        super().__init__(unit, in_channels, out_channels, depth)


PAPER_BLOCKS: dict[str, Block] = {"conv": ConvBlock, "res": ResBlock, "dark": DarkBlock, "csp": RepCSP}
"""The computational blocks of the paper's table 2."""


class GELAN(ELANBase):
    """ELAN over any computational block: each stage is `block` followed by a 3×3 convolution.

    `CSPELAN` is this with block "csp".

    Args:
        in_channels, out_channels: channels.
        split_channels: width after the first 1×1, halved by the split (even).
        stage_channels: width of every stage.
        block: name or import path of the computational block.
        depth: the block's own depth (table 3: D_CSP).
        elan_depth: number of stages (table 3: D_ELAN).

    Raises:
        ValueError: an unknown block, or one that does not return [B, out_channels, H, W].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        split_channels: int,
        stage_channels: int,
        block: str = "csp",
        depth: int = 1,
        elan_depth: int = 2,
    ) -> None:
        spec = find_block(block)
        widths = [split_channels // 2] + [stage_channels] * elan_depth
        stages = []
        for a, b in itertools.pairwise(widths):
            inner = spec.create([a], (b, depth))
            if spec.out_channels is None:
                _check_stage(spec, inner, a, b)
            stages.append(nn.Sequential(inner, Conv(b, b, 3)))
        super().__init__(in_channels, out_channels, split_channels, stage_channels, stages)


def _check_stage(spec: BlockSpec, module: nn.Module, in_channels: int, out_channels: int) -> None:
    """Run a user's block once, so that one of a wrong shape is named where the network is built."""
    size = PROBE_SIZE
    got = list(spec.run(module, [in_channels]).shape)
    if got != [1, out_channels, size, size]:
        raise ValueError(
            f"block {spec.name!r}: expected [1, {out_channels}, {size}, {size}] for an input "
            f"[1, {in_channels}, {size}, {size}], got {got}"
        )
