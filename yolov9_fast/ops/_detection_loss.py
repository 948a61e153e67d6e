"""Loss of one branch given its assignment: BCE on classes, complete IoU on boxes, DFL on their sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov9_fast.ops import _library as library
from yolov9_fast.ops._assign import Assignment
from yolov9_fast.ops._backend import Implementation, Operator, not_on, register, select
from yolov9_fast.ops._boxes import REG_MAX, STRIDES, ciou
from yolov9_fast.ops._decode import (
    check_maps,
    flatten_maps,
    map_anchor_points,
    rows_in_step,
    split_maps,
    why_not_maps,
)

_FOCAL_ALPHA = 0.25


class LossOptions(NamedTuple):
    """What `detection_loss` takes beside tensors."""

    strides: tuple[int, ...] = STRIDES
    class_pos_weight: float = 1.0
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0
    gains: tuple[float, float, float] = (1.0, 1.0, 1.0)


def detection_loss(
    maps: Sequence[Tensor],
    assignment: Assignment,
    gt_labels: Tensor,
    gt_boxes: Tensor,
    normaliser: Tensor,
    *,
    strides: Sequence[int] = STRIDES,
    class_pos_weight: float = 1.0,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    gains: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Tensor:
    """Box, class and DFL loss of one branch; gradients flow to `maps` alone. Computed in float32.

    The compiled forms compute the gradient together with the value, as it is for the sum of the three: put what scales
    them into `gains`, and backward has nothing left to do. Any other gradient of the result costs a second pass.

    With w the assignment's weight and S the normaliser: box = Σ w (1 − CIoU) / S over assigned anchors, both boxes in
    units of the stride; cls = Σ BCE(logit, target) / S over all anchors and classes, the target being w at the class
    of an assigned anchor and 0 elsewhere; dfl = Σ w · mean over sides of the cross entropy of the two bins around the
    target's distance, clamped to [0, 14.99] (Li et al., 2020).

    Args:
        maps: raw maps [B, 64 + nc, H/s, W/s] as for `decode`.
        assignment: gt_index [B, A] and weight [B, A] of `assign`.
        gt_labels: [B, N] class of each ground truth.
        gt_boxes: [B, N, 4] x1, y1, x2, y2 in pixels.
        normaliser: S > 0, one element.
        class_pos_weight: factor on the positive part of the BCE.
        label_smoothing: ε: the target of an assigned anchor becomes w (1 − ε/2) at its class and w ε/2 elsewhere.
        focal_gamma: γ > 0 multiplies the BCE by focal loss' (1 − p_t)^γ and its α = 0.25.
        gains: factors of box, cls and dfl.

    Returns:
        [3]: box, cls, dfl, each times its gain.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_maps(maps, strides)
    anchors = sum(level.shape[2] * level.shape[3] for level in maps)
    expected = (maps[0].shape[0], anchors)
    if assignment.gt_index.shape != expected or assignment.weight.shape != expected:
        raise ValueError(f"assignment: expected {expected} to fit maps, got {tuple(assignment.gt_index.shape)}")
    if gt_boxes.dim() != 3 or gt_labels.shape != gt_boxes.shape[:2] or gt_boxes.shape[2] != 4:
        raise ValueError(
            f"gt_boxes: expected [B, N, 4] with gt_labels [B, N], got {tuple(gt_boxes.shape)}, {tuple(gt_labels.shape)}"
        )
    if normaliser.numel() != 1:
        raise ValueError(f"normaliser: expected one element, got {tuple(normaliser.shape)}")
    if len(gains) != 3:
        raise ValueError(f"gains: expected three (box, cls, dfl), got {len(gains)}")
    box, cls, dfl = gains
    options = LossOptions(tuple(strides), class_pos_weight, label_smoothing, focal_gamma, (box, cls, dfl))
    args = (maps, assignment, gt_labels, gt_boxes, normaliser.detach().reshape(()), options)
    result: Tensor = select(OPERATOR, *args)(*args)
    return result


def detection_loss_reference(
    maps: Sequence[Tensor],
    assignment: Assignment,
    gt_labels: Tensor,
    gt_boxes: Tensor,
    normaliser: Tensor,
    options: LossOptions,
) -> Tensor:
    """`detection_loss` in eager PyTorch."""
    strides, class_pos_weight, label_smoothing, focal_gamma, gains = options
    with torch.autocast(maps[0].device.type, enabled=False):
        raw = flatten_maps(maps)
        all_bins, logits = split_maps(raw)
        image, anchor = torch.nonzero(assignment.gt_index >= 0, as_tuple=True)
        truth = assignment.gt_index[image, anchor]
        weight = assignment.weight[image, anchor].to(raw.dtype)
        label = gt_labels[image, truth].long()

        target = torch.zeros_like(logits)
        if label_smoothing:
            spread = weight * (0.5 * label_smoothing)
            target[image, :, anchor] = spread[:, None].expand(-1, logits.shape[1])
        target[image, label, anchor] = weight * (1 - 0.5 * label_smoothing)
        cls = class_loss(logits, target, class_pos_weight, focal_gamma)

        points, stride = map_anchor_points(maps, strides, raw.dtype)
        point = points[anchor]
        wanted = gt_boxes[image, truth].to(raw.dtype) / stride[anchor]
        bins = all_bins.permute(0, 2, 1)[image, anchor].view(-1, 4, REG_MAX)
        values = torch.arange(REG_MAX, device=raw.device, dtype=raw.dtype)
        sides = (bins.softmax(-1) * values).sum(-1)
        boxes = torch.cat((point - sides[:, :2], point + sides[:, 2:]), 1)
        box = ((1 - ciou(boxes, wanted)) * weight).sum()

        distance = torch.cat((point - wanted[:, :2], wanted[:, 2:] - point), 1)
        dfl = (dfl_loss(bins, distance) * weight).sum()
        items = torch.stack((box, cls, dfl)) / normaliser
        return items if gains == (1, 1, 1) else items * items.new_tensor(gains)


def class_loss(logits: Tensor, target: Tensor, class_pos_weight: float = 1.0, focal_gamma: float = 0.0) -> Tensor:
    """Sum of the binary cross entropies with logits, focal for `focal_gamma` > 0."""
    positive = None if class_pos_weight == 1 else logits.new_tensor(class_pos_weight)
    if focal_gamma == 0:
        return F.binary_cross_entropy_with_logits(logits, target, pos_weight=positive, reduction="sum")
    loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=positive, reduction="none")
    probability = logits.sigmoid()
    missed = target * (1 - probability) + (1 - target) * probability
    balance = target * _FOCAL_ALPHA + (1 - target) * (1 - _FOCAL_ALPHA)
    return (loss * balance * missed**focal_gamma).sum()


def dfl_loss(bins: Tensor, distance: Tensor) -> Tensor:
    """Distribution focal loss of [F, 4, 16] logits against [F, 4] distances in stride units: [F], mean of the sides."""
    distance = distance.clamp(0, REG_MAX - 1 - 0.01)
    lower = distance.floor()
    fraction = distance - lower
    log_probability = bins.log_softmax(-1)
    index = lower.long()[..., None]
    below = log_probability.gather(-1, index)[..., 0]
    above = log_probability.gather(-1, index + 1)[..., 0]
    return -((1 - fraction) * below + fraction * above).mean(-1)


class _Compiled(torch.autograd.Function):
    """The compiled operator with its gradient, which the forward has computed already for ones coming in."""

    @staticmethod
    def forward(ctx: Any, options: LossOptions, in_forward: bool, given: Tensor, *rest: Tensor) -> Tensor:
        gt_index, weight, gt_labels, gt_boxes, normaliser, *maps = (given, *rest)
        fixed = (gt_index, weight, gt_labels, gt_boxes, normaliser)
        items, gradients = _forward(maps, *fixed, *_raw(options), in_forward)
        ctx.save_for_backward(*fixed, *maps)
        ctx.options = options
        ctx.gradients = gradients if in_forward else None
        return items

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Without this, whoever asks for a second derivative would get a first one that counts as a constant.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "detection_loss: the compiled form has no second derivative (create_graph=True); "
                'use yolov9_fast.set_backend("eager", op="detection_loss")'
            )
        fixed, maps = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        upstream = upstream.contiguous()
        # Handed over once: whoever gets them owns them, and a second backward starts from the maps again.
        gradients, ctx.gradients = ctx.gradients, None
        raw = _raw(ctx.options)
        if gradients is None or (upstream.is_cpu and not bool((upstream == 1).all())):
            gradients = _backward(upstream, maps, *fixed, *raw)
        elif upstream.is_cuda:
            _unless_ones(upstream, maps, *fixed, *raw, gradients)
        return (None,) * 7 + tuple(gradients)


def _raw(options: LossOptions) -> tuple[Any, ...]:
    return (*options[:4], options.gains)


def _compiled(
    maps: Sequence[Tensor],
    assignment: Assignment,
    gt_labels: Tensor,
    gt_boxes: Tensor,
    normaliser: Tensor,
    options: LossOptions,
) -> Tensor:
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    maps = [rows_in_step(level) for level in maps]
    gradient = torch.is_grad_enabled() and any(level.requires_grad for level in maps)
    # float16 trains under a loss scale: the gradient of ones would underflow before it is scaled. A traced graph keeps
    # the maps alone, and its backward starts from them.
    in_forward = gradient and maps[0].dtype != torch.float16 and not torch.compiler.is_compiling()
    fixed = (
        assignment.gt_index.contiguous(),
        assignment.weight.detach().to(dtype).contiguous(),
        gt_labels.long().contiguous(),
        gt_boxes.detach().to(dtype).contiguous(),
        normaliser.to(dtype),
    )
    if not gradient:
        items, _ = _forward(maps, *fixed, *_raw(options), False)
        return items
    result: Tensor = _Compiled.apply(options, in_forward, *fixed, *maps)  # type: ignore[no-untyped-call]
    return result


def _supports(device: str) -> Any:
    def supports(
        maps: Sequence[Tensor],
        assignment: Assignment,
        gt_labels: Tensor,
        gt_boxes: Tensor,
        normaliser: Tensor,
        options: LossOptions,
    ) -> str | None:
        return why_not_maps(device, maps) or not_on(device, *assignment, gt_labels, gt_boxes, normaliser)

    return supports


_FIXED = "Tensor gt_index, Tensor weight, Tensor gt_labels, Tensor gt_boxes, Tensor normaliser"
_OPTIONS = "int[] strides, float class_pos_weight, float label_smoothing, float focal_gamma, float[] gains"


def _as_options(
    strides: Sequence[int], class_pos_weight: float, label_smoothing: float, focal_gamma: float, gains: Sequence[float]
) -> LossOptions:
    box, cls, dfl = gains
    return LossOptions(tuple(strides), class_pos_weight, label_smoothing, focal_gamma, (box, cls, dfl))


def _forward_reference(
    maps: Sequence[Tensor],
    gt_index: Tensor,
    weight: Tensor,
    labels: Tensor,
    boxes: Tensor,
    normaliser: Tensor,
    *rest: Any,
) -> tuple[Tensor, list[Tensor]]:
    *raw, gradient = rest
    call = (Assignment(gt_index, weight), labels, boxes, normaliser, _as_options(*raw))
    if not gradient:
        return detection_loss_reference(maps, *call), []
    with torch.enable_grad():
        leaves = [level.detach().requires_grad_() for level in maps]
        items = detection_loss_reference(leaves, *call)
        return items.detach(), _in_layout(torch.autograd.grad(items.sum(), leaves), maps)


def _backward_reference(
    upstream: Tensor,
    maps: Sequence[Tensor],
    gt_index: Tensor,
    weight: Tensor,
    labels: Tensor,
    boxes: Tensor,
    normaliser: Tensor,
    *raw: Any,
) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [level.detach().requires_grad_() for level in maps]
        call = (Assignment(gt_index, weight), labels, boxes, normaliser, _as_options(*raw))
        items = detection_loss_reference(leaves, *call)
        return _in_layout(torch.autograd.grad(items, leaves, upstream), maps)


def _in_layout(gradients: Sequence[Tensor], maps: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(level).copy_(gradient) for level, gradient in zip(maps, gradients, strict=True)]


def _unless_ones_reference(upstream: Tensor, maps: Sequence[Tensor], *rest: Any) -> None:
    *call, gradients = rest
    if not bool((upstream == 1).all()):
        for old, new in zip(gradients, _backward_reference(upstream, maps, *call), strict=True):
            old.copy_(new)


def _forward_fake(maps: Sequence[Tensor], *rest: Any) -> tuple[Tensor, list[Tensor]]:
    return rest[4].new_empty(3), [torch.empty_like(level) for level in maps] if rest[-1] else []


_forward = library.define(
    f"detection_loss_forward(Tensor[] maps, {_FIXED}, {_OPTIONS}, bool gradient) -> (Tensor, Tensor[])",
    fake=_forward_fake,
    reference=_forward_reference,
)
_backward = library.define(
    f"detection_loss_backward(Tensor upstream, Tensor[] maps, {_FIXED}, {_OPTIONS}) -> Tensor[]",
    fake=lambda upstream, maps, *rest: [torch.empty_like(level) for level in maps],
    reference=_backward_reference,
)
# Decides on the device whether the gradients computed for ones are what is wanted: nobody waits for the answer.
_unless_ones = library.define(
    f"detection_loss_unless_ones(Tensor upstream, Tensor[] maps, {_FIXED}, {_OPTIONS}, Tensor(a!)[] gradients) -> ()",
    fake=lambda *_: None,
    reference=_unless_ones_reference,
)

OPERATOR = register(
    Operator(
        "detection_loss",
        "BCE, CIoU and DFL of one branch",
        {
            "eager": Implementation(detection_loss_reference),
            "cpu": Implementation(_compiled, library.missing("detection_loss_forward", "cpu"), _supports("cpu")),
            "cuda": Implementation(_compiled, library.missing("detection_loss_forward", "cuda"), _supports("cuda")),
        },
    )
)
