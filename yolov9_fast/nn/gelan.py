"""GELAN: ELAN whose stages hold any computational block (paper, section 4.2 and figure 4c).

A computational block is a class (or function) called as `block(in_channels, out_channels, depth)`; it returns a module
that maps [B, in_channels, H, W] to [B, out_channels, H, W]. Known by name are those of the paper's table 2 and what
`register_block` adds; any other is named by import path, `package.module:Class`.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from yolov9_fast._lazy import import_module
from yolov9_fast.nn.blocks import Conv, ELANBase, RepConv, RepCSP

Block = Callable[[int, int, int], nn.Module]
_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_PROBE_SIZE = 8


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
        y = self.body(x)
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
_registered: dict[str, Block] = dict(PAPER_BLOCKS)


def block_names() -> list[str]:
    """Names that `GELAN` knows now."""
    return sorted(_registered)


def register_block(name: str) -> Callable[[Block], Block]:
    """Decorator that makes a computational block known by name.

    Raises:
        ValueError: a name that is no word, or that is taken by another block.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"name: expected letters, digits, _, . or -, got {name!r}")

    def register(block: Block) -> Block:
        known = _registered.get(name)
        if known is not None and _identity(known) != _identity(block):
            raise ValueError(f"block {name!r} is already registered as {_identity(known)}")
        _registered[name] = block
        return block

    return register


def _identity(block: Any) -> str:
    return f"{getattr(block, '__module__', '')}.{getattr(block, '__qualname__', repr(block))}"


def load_block(name: str) -> Block:
    """The block of a name or an import path; the module of a path is imported, from the working folder too.

    Raises:
        ValueError: an unknown name, a path that leads nowhere, or to something that cannot be called.
    """
    if _PATH.fullmatch(name):
        import_module(name.partition(":")[0])
    return find_block(name)


def find_block(name: str) -> Block:
    """The block of a name, or of an import path whose module is loaded already.

    Nothing is imported: a graph that comes inside a weights file must not be able to run code.

    Raises:
        ValueError: an unknown name, a module that is not loaded, or something that cannot be called.
    """
    if name in _registered:
        return _registered[name]
    if not _PATH.fullmatch(name):
        raise ValueError(f"unknown block {name!r}; known are {', '.join(block_names())}, or a path module:Class")
    module, _, attribute = name.partition(":")
    if module not in sys.modules:
        raise ValueError(f"block {name!r}: its module is not loaded; import {module} first (--import {module})")
    block = getattr(sys.modules[module], attribute, None)
    if not callable(block):
        raise ValueError(f"block {name!r}: {module} has no class or function {attribute}")
    return block


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
        make = find_block(block)
        widths = [split_channels // 2] + [stage_channels] * elan_depth
        stages = []
        for a, b in itertools.pairwise(widths):
            inner = make(a, b, depth)
            if block not in PAPER_BLOCKS:
                _check_block(inner, block, a, b)
            stages.append(nn.Sequential(inner, Conv(b, b, 3)))
        super().__init__(in_channels, out_channels, split_channels, stage_channels, stages)


@torch.no_grad()
def _check_block(module: Any, name: str, in_channels: int, out_channels: int) -> None:
    """Run a user's block once, so that a wrong one is named where the network is built."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"block {name!r} made a {type(module).__name__}, not a Module")
    training = module.training
    size = (1, in_channels, _PROBE_SIZE, _PROBE_SIZE)
    try:
        result = module.eval()(torch.zeros(size))
    except Exception as error:  # a user's block may fail in any way
        raise ValueError(f"block {name!r} fails on {list(size)}: {type(error).__name__}: {error}") from error
    finally:
        module.train(training)
    expected = (1, out_channels, _PROBE_SIZE, _PROBE_SIZE)
    got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
    if got != expected:
        raise ValueError(f"block {name!r} returns {got} for {size}, expected {expected}")
