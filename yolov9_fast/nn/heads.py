"""Detection heads: decoupled, anchor-free, box sides as distributions over 16 bins (DFL), one group per side.

Children are named as in the official checkpoints: cv2 (box tower), cv3 (class tower), dfl for one branch; in
`DualDDetect` these are the auxiliary branch, and cv4, cv5, dfl2 the main one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from yolov9_fast.nn.blocks import Conv
from yolov9_fast.nn.output import DetectionOutput
from yolov9_fast.ops._boxes import REG_MAX, STRIDES
from yolov9_fast.ops._decode import decode

Shapes = Mapping[str, tuple[int, ...]]
"""State-dict key → shape."""


class DFL(nn.Module):
    """The bins' values 0..15 as a frozen 1×1 weight; only its state-dict entry is used, `ops.decode` computes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(REG_MAX, 1, 1, bias=False).requires_grad_(False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.arange(REG_MAX, dtype=torch.float32).view(1, REG_MAX, 1, 1))


def box_tower_width(first_channels: int, groups: int = 4) -> int:
    """Width of the box tower: max(c // 4, 64) of the first level's channels c, made divisible by the groups."""
    width = max(first_channels // 4, 4 * REG_MAX, 16)
    return math.ceil(width / groups) * groups


def class_tower_width(first_channels: int, num_classes: int) -> int:
    """The published width of the class tower: max(c, min(2·nc, 128)) of the first level's channels c."""
    return max(first_channels, min(2 * num_classes, 128))


def _box_tower(channels: int, width: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        Conv(channels, width, 3), Conv(width, width, 3, groups=groups), nn.Conv2d(width, 4 * REG_MAX, 1, groups=groups)
    )


def _class_tower(channels: int, width: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(Conv(channels, width, 3), Conv(width, width, 3), nn.Conv2d(width, num_classes, 1))


class HeadOptions(NamedTuple):
    """Options that a head's weights were built with; None where the head has no such option."""

    num_classes: int
    class_tower: int | None
    box_groups: int | None


class Head(nn.Module):
    """The last layer of a graph: features of strides 8, 16 and 32 in, `DetectionOutput` out.

    A head of your own derives from this class, or from `DDetect`, and is registered with `role="head"`,
    `inputs="many"`. It is called as `head(channels, num_classes=nc, **options)` with the options that are given.

    Attributes:
        graph_arguments: options that a graph's layer may list, in order; the caller's own options win over them.
        num_inputs: how many features it reads.
        auxiliary_form: name of the head that adds an auxiliary branch to this one; None: there is none.
        deployed_form: name of the head that is left without the auxiliary branch; None: it has no such branch.
        deployed_children: child of the deployed form → child of this head with the same weights.
    """

    graph_arguments: ClassVar[tuple[str, ...]] = ()
    num_inputs: ClassVar[int] = 3
    auxiliary_form: ClassVar[str | None] = None
    deployed_form: ClassVar[str | None] = None
    deployed_children: ClassVar[Mapping[str, str]] = {}

    def __init__(self, num_classes: int, class_tower: int | None = None, box_groups: int | None = None) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
        self.num_classes = num_classes
        self.class_tower = class_tower
        self.box_groups = box_groups
        self.strides = STRIDES

    @classmethod
    def read_options(cls, shapes: Shapes, prefix: str) -> HeadOptions | None:
        """Options of the head whose weights have these shapes; None where they are another head's.

        Only foreign files need it, which do not describe their network.

        Args:
            shapes: of a state dict.
            prefix: of the head's keys, such as "model.22.".
        """
        return None

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        """The main branch's raw maps as boxes and scores, [B, 4 + nc, A]: xywh in pixels, scores in 0..1."""
        raise NotImplementedError

    def check_trainable(self) -> None:
        """Raise `UserError` where the library's losses cannot train this head."""


class _DistributionHead(Head):
    """A head of box and class towers, whose boxes are distributions over bins."""

    graph_arguments = ("box_groups",)
    main_names: ClassVar[tuple[str, str]]
    box_groups: int

    def __init__(self, num_classes: int, class_tower: int, box_groups: int) -> None:
        if not isinstance(box_groups, int) or box_groups < 1 or (4 * REG_MAX) % box_groups:
            raise ValueError(f"box_groups: expected a divisor of {4 * REG_MAX}, got {box_groups}")
        super().__init__(num_classes, class_tower, box_groups)

    @classmethod
    def read_options(cls, shapes: Shapes, prefix: str) -> HeadOptions | None:
        towers = {key.removeprefix(prefix).partition(".")[0] for key in shapes if key.startswith(prefix)}
        if ("cv5" in towers) != (cls.deployed_form is not None) or "m" in towers:
            return None
        boxes, classes = (f"{prefix}{name}.0" for name in cls.main_names)
        num_classes = shapes.get(f"{classes}.2.weight")
        tower = shapes.get(f"{classes}.0.conv.weight")
        grouped = shapes.get(f"{boxes}.1.conv.weight", ())
        groups = 4
        if len(grouped) == 4 and grouped[1] and not grouped[0] % grouped[1]:
            groups = grouped[0] // grouped[1]
        return HeadOptions(
            num_classes[0] if num_classes else 80,
            tower[0] if tower else None,
            groups if 4 * REG_MAX % groups == 0 else 4,
        )

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        return decode(maps, self.strides)

    def _add_branch(self, names: tuple[str, str], channels: Sequence[int], class_width: int) -> None:
        box_width = box_tower_width(channels[0], self.box_groups)
        boxes = nn.ModuleList(_box_tower(c, box_width, self.box_groups) for c in channels)
        classes = nn.ModuleList(_class_tower(c, class_width, self.num_classes) for c in channels)
        for box, cls, stride in zip(boxes, classes, self.strides, strict=True):
            assert isinstance(box, nn.Sequential)
            assert isinstance(cls, nn.Sequential)
            assert isinstance(box[-1], nn.Conv2d)
            assert isinstance(cls[-1], nn.Conv2d)
            assert box[-1].bias is not None
            assert cls[-1].bias is not None
            nn.init.constant_(box[-1].bias, 1.0)
            # The prior: about 5 objects in a picture of 640 px, spread over classes and cells.
            nn.init.constant_(cls[-1].bias, math.log(5 / self.num_classes / (640 / stride) ** 2))
        setattr(self, names[0], boxes)
        setattr(self, names[1], classes)

    def _branch(self, names: tuple[str, str], features: Sequence[Tensor]) -> list[Tensor]:
        boxes, classes = getattr(self, names[0]), getattr(self, names[1])
        return [torch.cat((boxes[i](x), classes[i](x)), 1) for i, x in enumerate(features)]


class DDetect(_DistributionHead):
    """Head of a deployed network: inputs P3, P4, P5.

    Args:
        channels: of the three inputs.
        num_classes: nc ≥ 1.
        class_tower: width of the class branch; None takes the published rule.
        box_groups: groups of the box branch: 4 as published, 1 dense.
    """

    auxiliary_form = "DualDDetect"
    main_names = ("cv2", "cv3")

    def __init__(
        self, channels: Sequence[int], num_classes: int, class_tower: int | None = None, box_groups: int = 4
    ) -> None:
        width = class_tower or class_tower_width(channels[0], num_classes)
        super().__init__(num_classes, width, box_groups)
        self._add_branch(self.main_names, channels, width)
        self.dfl = DFL()

    def forward(self, features: Sequence[Tensor]) -> DetectionOutput:
        return DetectionOutput(self._branch(self.main_names, features))


class DualDDetect(_DistributionHead):
    """Training head of PGI: inputs A3, A4, A5 of the auxiliary branch, then P3, P4, P5 of the main branch.

    `class_tower` is the width of the main branch, and of the auxiliary one where both start from the same width; else
    the auxiliary branch is at least as wide as its own features.
    """

    num_inputs = 6
    deployed_form = "DDetect"
    deployed_children: ClassVar[Mapping[str, str]] = {"cv2": "cv4", "cv3": "cv5", "dfl": "dfl2"}
    auxiliary_names = ("cv2", "cv3")
    main_names = ("cv4", "cv5")

    def __init__(
        self, channels: Sequence[int], num_classes: int, class_tower: int | None = None, box_groups: int = 4
    ) -> None:
        auxiliary, main = channels[:3], channels[3:]
        width = class_tower or class_tower_width(main[0], num_classes)
        super().__init__(num_classes, width, box_groups)
        auxiliary_tower = class_tower_width(auxiliary[0], num_classes)
        if class_tower is not None:
            auxiliary_tower = class_tower if auxiliary[0] == main[0] else max(auxiliary[0], class_tower)
        self._add_branch(self.auxiliary_names, auxiliary, auxiliary_tower)
        self._add_branch(self.main_names, main, width)
        self.dfl = DFL()
        self.dfl2 = DFL()

    def forward(self, features: Sequence[Tensor]) -> DetectionOutput:
        """Both branches for six inputs; the main branch alone for three (P3, P4, P5)."""
        if len(features) == 3:
            return DetectionOutput(self._branch(self.main_names, features))
        return DetectionOutput(
            main=self._branch(self.main_names, features[3:]),
            auxiliary=self._branch(self.auxiliary_names, features[:3]),
        )
