"""Stacks of PlainNet, ResNet, CSPNet, ELAN and GELAN with random weights, of any depth and width (Figures 2 and 6).

The paper names the networks and their depths, and neither blocks, initialisation nor resolution; here:

- One stem, a 3×3 convolution without activation, then everything at its resolution, `width` channels between blocks.
- Depth is the number of convolution layers on the longest path after the stem. A RepConv is one layer.
- Blocks are those of `nn.blocks` in their published proportions: half the width inside. What does not fill a block of
  the usual size becomes smaller blocks of the same kind, and only where none fits plain 3×3 convolutions, all in front.
- Weights are as PyTorch draws them. Three normalisations, because the paper names none: `batch`, BatchNorm over the
  statistics of what goes through (training mode); `initial`, BatchNorm as it is before any training, mean 0 and
  variance 1 (a fresh network in evaluation mode); `none`, a bias in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from yolov9_fast.errors import UserError
from yolov9_fast.nn import CSPELAN, ELAN, Conv, RepConv, RepCSP
from yolov9_fast.ops._backend import backend

NORMALISATIONS = ("batch", "initial", "none")
ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU}


class ResidualBlock(nn.Module):
    """ResNet's basic block, SiLU(x + BN(conv 3×3(Conv 3×3(x)))): the activation follows the addition."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1 = Conv(channels, channels, 3)
        self.cv2 = Conv(channels, channels, 3, activation=False)
        self.act: nn.Module = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(x + self.cv2(self.cv1(x)))
        return out


class BlockForm(NamedTuple):
    """A block: convolution layers on its longest and on its shortest path, and what makes it for a width."""

    depth: int
    shortest: int
    build: Callable[[int], nn.Module]


def _gelan(csp_depth: int, elan_depth: int) -> BlockForm:
    """1×1, per stage RepCSP (1×1, two layers per bottleneck, 1×1) and 3×3, then 1×1."""
    depth = 2 + elan_depth * (3 + 2 * csp_depth)
    return BlockForm(depth, 2, lambda width: CSPELAN(width, width, width, width // 2, csp_depth, elan_depth))


def _elan(elan_depth: int) -> BlockForm:
    return BlockForm(2 + elan_depth, 2, lambda width: ELAN(width, width, width, width // 2, elan_depth))


def _csp(csp_depth: int) -> BlockForm:
    return BlockForm(2 + 2 * csp_depth, 2, lambda width: RepCSP(width, width, csp_depth))


PLAIN = BlockForm(1, 1, lambda width: Conv(width, width, 3))

FORMS: dict[str, tuple[BlockForm, ...]] = {
    "plainnet": (PLAIN,),
    "resnet": (BlockForm(2, 0, ResidualBlock),),
    "cspnet": (_csp(1), _csp(2)),
    "elan": (_elan(2), _elan(3), _elan(1)),
    "gelan": (_gelan(1, 2), _gelan(0, 2), _gelan(1, 1), _gelan(0, 1)),
}
"""Each architecture's block as published, then the smaller and larger ones that fill up a depth."""

TITLES = {"plainnet": "PlainNet", "resnet": "ResNet", "cspnet": "CSPNet", "elan": "ELAN", "gelan": "GELAN"}
ARCHITECTURES = tuple(FORMS)


def plan(architecture: str, depth: int) -> list[BlockForm]:
    """The blocks, first to last, whose depths add up to `depth`: as many as can be of the published form.

    Raises:
        UserError: no such architecture, or a negative depth.
    """
    if architecture not in FORMS:
        raise UserError(f"no architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}")
    if depth < 0:
        raise UserError(f"depth: expected at least 0, got {depth}")
    for plain_layers in range(depth + 1):
        found = _fill(depth - plain_layers, FORMS[architecture])
        if found is not None:
            return [PLAIN] * plain_layers + found[::-1]
    raise AssertionError("plain layers alone make any depth")


def _fill(depth: int, forms: Sequence[BlockForm]) -> list[BlockForm] | None:
    """Forms whose depths add up to `depth`, as many as possible of the first; None where there are none."""
    if not depth:
        return []
    if not forms:
        return None
    for count in range(depth // forms[0].depth, -1, -1):
        rest = _fill(depth - count * forms[0].depth, forms[1:])
        if rest is not None:
            return [forms[0]] * count + rest
    return None


class Stack(nn.Module):
    """A stem and blocks. `forward` maps images [B, 3, H, W] in [0, 1] to features [B, width, H/s, W/s]."""

    def __init__(self, architecture: str, depth: int, width: int, stem_stride: int = 1) -> None:
        super().__init__()
        self.architecture, self.depth, self.width = architecture, depth, width
        self.stem = nn.Conv2d(3, width, 3, stem_stride, 1)
        self.blocks = nn.Sequential(*(form.build(width) for form in plan(architecture, depth)))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.blocks(self.stem(images))
        return out

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The output without gradients, by the blocks' definition, in the type of the stack's weights."""
        with backend("eager"):
            return self.forward(images.to(self.stem.weight))


def build_stack(
    architecture: str,
    depth: int,
    width: int = 32,
    *,
    seed: int = 0,
    normalisation: str = "batch",
    activation: str = "silu",
    stem_stride: int = 1,
) -> Stack:
    """A stack with random weights, in the mode that its normalisation needs; the same arguments give the same weights.

    Args:
        architecture: plainnet, resnet, cspnet, elan or gelan.
        depth: convolution layers on the longest path after the stem, 0 or more.
        width: channels between blocks; a multiple of 4, because blocks halve it twice.
        seed: of the weights; the caller's generator is left as it was.
        normalisation: batch, initial or none, as above.
        activation: silu, as in all of the paper's networks, or relu.
        stem_stride: pixels of the image per feature, on each side.

    Raises:
        UserError: an argument that makes no network.
    """
    if width < 4 or width % 4:
        raise UserError(f"width: expected a positive multiple of 4, got {width}")
    if normalisation not in NORMALISATIONS:
        raise UserError(f"no normalisation {normalisation!r}; known are {', '.join(NORMALISATIONS)}")
    if activation not in ACTIVATIONS:
        raise UserError(f"no activation {activation!r}; known are {', '.join(ACTIVATIONS)}")
    if stem_stride < 1:
        raise UserError(f"stem_stride: expected at least 1, got {stem_stride}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stack = Stack(architecture, depth, width, stem_stride)
        if normalisation == "none":
            _replace_normalisation_by_bias(stack)
    for module in stack.modules():
        if isinstance(module, Conv | RepConv | ResidualBlock) and isinstance(module.act, nn.SiLU):
            module.act = ACTIVATIONS[activation]()
    return stack.train(normalisation == "batch")


def _replace_normalisation_by_bias(stack: Stack) -> None:
    for module in stack.modules():
        if isinstance(module, Conv):
            module.bn = nn.Identity()
            old = module.conv
            bound = old.weight[0].numel() ** -0.5
            # The bias that nn.Conv2d draws by default.
            old.bias = nn.Parameter(torch.empty(old.out_channels).uniform_(-bound, bound))
