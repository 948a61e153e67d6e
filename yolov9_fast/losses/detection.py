"""Detection loss of YOLOv9: task-aligned targets for the main branch and, with PGI, for the auxiliary one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from yolov9_fast.losses.targets import PaddedTargets, pad_targets
from yolov9_fast.losses.terms import LossTerm, term_names
from yolov9_fast.nn.output import DetectionOutput
from yolov9_fast.ops._assign import Assignment, assign
from yolov9_fast.ops._boxes import REG_MAX, STRIDES
from yolov9_fast.ops._decode import check_maps, decode_for_assignment, map_anchor_points
from yolov9_fast.ops._detection_loss import detection_loss


class Loss(NamedTuple):
    """Loss of a batch, float32.

    `total`: 0-dimensional, with gradient, times the batch size. `items` [terms]: its terms in the order of
    `DetectionLoss.names`, after gains and weights, detached, not times the batch size.
    """

    total: Tensor
    items: Tensor

    @property
    def box(self) -> Tensor:
        """Box (CIoU) loss, 0-dimensional."""
        return self.items[0]

    @property
    def cls(self) -> Tensor:
        """Class (BCE) loss, 0-dimensional."""
        return self.items[1]

    @property
    def dfl(self) -> Tensor:
        """Distribution focal loss, 0-dimensional."""
        return self.items[2]


class DetectionLoss:
    """Box (CIoU), class (BCE) and DFL loss of a detector's raw maps; single, dual or lead-head guided.

    Without an auxiliary branch in the output the loss is that of the main branch. With one, each branch is assigned
    from its own predictions, or with `lead_head_guided` both from the main branch's. The auxiliary loss is multiplied
    by `auxiliary_weight`. The loss of a branch is divided by S, the sum of its assigned weights, clamped to at least 1.
    With `lead_head_guided` S is not clamped, but is 1 for a batch without positive weights (0/0 as published).

    Args:
        num_classes: nc ≥ 1.
        lead_head_guided: use the assignment of the main branch for both.
        auxiliary_weight: factor of the auxiliary branch's loss.
        box_gain, cls_gain, dfl_gain: factors of the parts.
        class_pos_weight, label_smoothing, focal_gamma: as in `ops.detection_loss`.
        topk, alpha, beta: as in `ops.assign`.
        assigner_rule: the published variant of the assignment, `rule` of `ops.assign`.
        max_objects: pad every image to this number of ground truths instead of the largest number in the batch: shapes
            are then the same in every step, and targets on a GPU are sorted without synchronisation.
        sync_normaliser: in training with several processes, S is the mean over them, and the minimum of 1 applies to
            their sum. The processes' totals then add up to the total of one process with all images; since DDP averages
            gradients, a trainer passes the number of processes as `scale`.
        terms: further terms, computed for each branch and divided by its S like the three of the paper.

    Attributes:
        names: of the terms, in the order of `Loss.items`: "box", "cls", "dfl", then those of `terms`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        lead_head_guided: bool = False,
        auxiliary_weight: float = 0.25,
        box_gain: float = 7.5,
        cls_gain: float = 0.5,
        dfl_gain: float = 1.5,
        class_pos_weight: float = 1.0,
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
        topk: int = 10,
        alpha: float = 0.5,
        beta: float = 6.0,
        strides: Sequence[int] = STRIDES,
        sync_normaliser: bool = True,
        assigner_rule: str = "yolov9",
        max_objects: int | None = None,
        terms: Sequence[LossTerm] = (),
    ) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing}")
        if max_objects is not None and max_objects < 0:
            raise ValueError(f"max_objects: expected at least 0, got {max_objects}")
        self.names = term_names(terms)
        self.terms = tuple(terms)
        self.num_classes = num_classes
        self.lead_head_guided = lead_head_guided
        self.auxiliary_weight = auxiliary_weight
        self.gains = (box_gain, cls_gain, dfl_gain)
        self.class_pos_weight = class_pos_weight
        self.label_smoothing = label_smoothing
        self.focal_gamma = focal_gamma
        self.topk = topk
        self.alpha = alpha
        self.beta = beta
        self.strides = tuple(strides)
        self.sync_normaliser = sync_normaliser
        self.assigner_rule = assigner_rule
        self.max_objects = max_objects

    def __call__(
        self,
        output: DetectionOutput,
        targets: Tensor | PaddedTargets,
        image_size: int | tuple[int, int],
        scale: int = 1,
    ) -> Loss:
        """Loss of a batch, in float32 for maps of any dtype and under autocast.

        Targets are best left on the CPU, where they are checked and sorted and then copied without synchronisation.
        Rows on a GPU synchronise with it, unless `max_objects` is given; then a row that does not fit makes the loss
        NaN.

        Args:
            output: raw maps [B, 64 + nc, H/s, W/s] per branch.
            targets: [n, 6] rows (image, class, x, y, w, h), normalised centre form; n may be 0. Or the result of
                `pad_targets`.
            image_size: (H, W) of the network's input in pixels, or one number for both.
            scale: factor of `Loss.total`, not of `Loss.items`. Multiplying the total itself would make the fused
                operator compute its gradient a second time.

        Raises:
            ValueError: maps, targets or image size that do not fit each other.
        """
        size = (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
        branches = [output.main] if output.auxiliary is None else [output.main, output.auxiliary]
        for maps in branches:
            self._check(maps, size)
        main = output.main
        with torch.autocast(main[0].device.type, enabled=False):
            dtype = torch.float64 if main[0].dtype == torch.float64 else torch.float32
            gt = self._pad(targets, main[0], size, dtype)
            assignments = self._assignments(branches, gt)
            normalisers = self._normalisers(assignments, gt)
            batch = main[0].shape[0] * scale
            factors = [batch * weight for weight in (1.0, self.auxiliary_weight)]
            parts = list(zip(branches, assignments, normalisers, factors, strict=False))
            items = torch.stack([self._standard_terms(*part, gt) for part in parts]).sum(0)
            total = items.sum()
            if self.terms:
                further = torch.stack([self._further_terms(*part, gt) for part in parts]).sum(0)
                total, items = total + further.sum(), torch.cat((items, further))
            return Loss(total, items.detach() / batch)

    @torch.no_grad()
    def evaluate(
        self, output: DetectionOutput, targets: Tensor | PaddedTargets, image_size: int | tuple[int, int]
    ) -> Loss:
        """The same without gradient and without communication between processes, for validation."""
        return self(output, targets, image_size)

    def _pad(
        self, targets: Tensor | PaddedTargets, like: Tensor, size: tuple[int, int], dtype: torch.dtype
    ) -> PaddedTargets:
        if not isinstance(targets, PaddedTargets):
            targets = pad_targets(targets, like.shape[0], self.num_classes, size, dtype, self.max_objects)
        elif targets.labels.shape[0] != like.shape[0]:
            raise ValueError(f"targets: expected {like.shape[0]} images, got {targets.labels.shape[0]}")
        return targets.to(like.device, dtype)

    def _standard_terms(
        self, maps: Sequence[Tensor], assignment: Assignment, normaliser: Tensor, factor: float, gt: PaddedTargets
    ) -> Tensor:
        """Box, cls and dfl of a branch, [3]."""
        # All factors are given to the operator: the gradient that comes back to it is then one.
        box, cls, dfl = (gain * factor for gain in self.gains)
        return detection_loss(
            maps,
            assignment,
            gt.labels,
            gt.boxes,
            normaliser,
            strides=self.strides,
            class_pos_weight=self.class_pos_weight,
            label_smoothing=self.label_smoothing,
            focal_gamma=self.focal_gamma,
            gains=(box, cls, dfl),
        )

    def _further_terms(
        self, maps: Sequence[Tensor], assignment: Assignment, normaliser: Tensor, factor: float, gt: PaddedTargets
    ) -> Tensor:
        """`terms` of a branch, [len(terms)]."""
        maps = [level.to(gt.boxes.dtype) for level in maps]
        return torch.stack([term(maps, assignment, gt) * (term.weight * factor) for term in self.terms]) / normaliser

    @torch.no_grad()
    def _assignments(self, branches: Sequence[Sequence[Tensor]], gt: PaddedTargets) -> list[Assignment]:
        if self.lead_head_guided:
            return [self._assign(branches[0], gt)] * len(branches)
        return [self._assign(maps, gt) for maps in branches]

    def _assign(self, maps: Sequence[Tensor], gt: PaddedTargets) -> Assignment:
        given = decode_for_assignment(maps, gt.labels, self.strides)
        options: dict[str, Any] = {}
        if self.assigner_rule != "yolov9":
            _, strides = map_anchor_points(maps, self.strides, given.points.dtype)
            options = {"rule": self.assigner_rule, "strides": strides}
        return assign(
            given.scores,
            given.boxes,
            given.points,
            given.columns,
            gt.boxes,
            gt.mask,
            topk=self.topk,
            alpha=self.alpha,
            beta=self.beta,
            **options,
        )

    def _normalisers(self, assignments: Sequence[Assignment], gt: PaddedTargets) -> Tensor:
        """S of each branch, [branches]."""
        own = assignments[:1] if self.lead_head_guided else assignments
        total = torch.stack([assignment.weight.sum() for assignment in own])
        world = 1
        if self.sync_normaliser and torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
            world = dist.get_world_size()
            if world > 1:
                dist.all_reduce(total)
        if self.lead_head_guided:
            total = torch.where(total > 0, total, torch.ones_like(total)).expand(len(assignments))
        else:
            total = total.clamp(min=1)
        if gt.fits is not None:
            total = total.masked_fill(~gt.fits, math.nan)
        return total / world

    def _check(self, maps: Sequence[Tensor], size: tuple[int, int]) -> None:
        check_maps(maps, self.strides)
        if maps[0].shape[1] != 4 * REG_MAX + self.num_classes:
            raise ValueError(
                f"output: expected {4 * REG_MAX} + {self.num_classes} channels for {self.num_classes} classes, "
                f"got {maps[0].shape[1]}"
            )
        for level, stride in zip(maps, self.strides, strict=True):
            if (level.shape[2] * stride, level.shape[3] * stride) != size:
                raise ValueError(
                    f"image_size: expected {stride} px times {tuple(level.shape[2:])}, the size of a map, got {size}"
                )
