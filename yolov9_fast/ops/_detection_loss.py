"""Loss of one branch given its assignment: BCE on classes, complete IoU on boxes, DFL on their sides."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov9_fast._layout import empty_map
from yolov9_fast.ops._assign import Assignment
from yolov9_fast.ops._boxes import REG_MAX, STRIDES, ciou
from yolov9_fast.ops._checks import check_floating, check_integers, check_one_device
from yolov9_fast.ops._decode import (
    check_maps,
    flatten_maps,
    map_anchor_points,
    split_maps,
    why_not_maps,
    with_one_pixel_stride,
)
from yolov9_fast.ops._operator import AutogradFunction, Compiled, Kernel, Operator
from yolov9_fast.ops._recording import unless_recorded
from yolov9_fast.ops._supports import not_for_compiled

_FOCAL_ALPHA = 0.25


class LossOptions(NamedTuple):
    """The arguments of `detection_loss` that are not tensors, as its kernels take them."""

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
    """Box, class and DFL loss of one branch; differentiable with respect to `maps` only.

    Computed in float32, or float64 for float64 maps. Compiled kernels compute the gradient of the sum of the three in
    the forward. Put factors of the terms into `gains`: then the gradient of the result is all ones, and backward
    computes nothing. Any other one costs a second pass.

    With w the assignment's weight and S the normaliser: box = Σ w (1 − CIoU) / S over assigned anchors, both boxes in
    units of the stride; cls = Σ BCE(logit, target) / S over all anchors and classes, the target being w at the class
    of an assigned anchor and 0 elsewhere; dfl = Σ w · mean over sides of the cross entropy of the two bins next to the
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
        TypeError: tensors of other dtypes.
        ValueError: shapes that do not fit; on a CPU also ground truths or classes that do not exist.
    """
    check_maps(maps, strides)
    gt_index, weight = assignment
    check_integers("assignment.gt_index", gt_index)
    check_floating("assignment.weight", weight)
    check_integers("gt_labels", gt_labels)
    check_floating("gt_boxes", gt_boxes)
    check_floating("normaliser", normaliser)
    check_one_device(
        maps=maps[0], gt_index=gt_index, weight=weight, gt_labels=gt_labels, gt_boxes=gt_boxes, normaliser=normaliser
    )
    anchors = sum(level.shape[2] * level.shape[3] for level in maps)
    expected = [maps[0].shape[0], anchors]
    for name, tensor in zip(assignment._fields, assignment, strict=True):
        if list(tensor.shape) != expected:
            raise ValueError(f"assignment.{name}: expected {expected} to fit maps, got {list(tensor.shape)}")
    if (
        gt_boxes.dim() != 3
        or gt_boxes.shape[0] != expected[0]
        or gt_labels.shape != gt_boxes.shape[:2]
        or gt_boxes.shape[2] != 4
    ):
        raise ValueError(
            f"gt_boxes: expected [B, N, 4] with gt_labels [B, N], got {list(gt_boxes.shape)}, {list(gt_labels.shape)}"
        )
    if normaliser.numel() != 1:
        raise ValueError(f"normaliser: expected one element, got {list(normaliser.shape)}")
    if len(gains) != 3:
        raise ValueError(f"gains: expected three (box, cls, dfl), got {len(gains)}")
    if gt_index.is_cpu and not torch.compiler.is_compiling():
        _check_values(gt_index, gt_labels, maps[0].shape[1] - 4 * REG_MAX)
    box, cls, dfl = gains
    options = LossOptions(tuple(strides), class_pos_weight, label_smoothing, focal_gamma, (box, cls, dfl))
    result: Tensor = unless_recorded(OPERATOR)(
        maps, assignment, gt_labels, gt_boxes, normaliser.detach().reshape(()), options
    )
    return result


def _check_values(gt_index: Tensor, gt_labels: Tensor, classes: int) -> None:
    """Raises `ValueError` for indices of no ground truth and classes that do not exist; a GPU would have to wait."""
    if gt_index.numel() == 0:
        return
    count, highest = gt_labels.shape[1], int(gt_index.max())
    if highest >= count:
        raise ValueError(f"assignment.gt_index: expected indices below {count}, got {highest}")
    if highest < 0 or (int(gt_labels.min()) >= 0 and int(gt_labels.max()) < classes):
        return
    labels = gt_labels.gather(1, gt_index.clamp(min=0).long())[gt_index >= 0]
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise ValueError(f"gt_labels: expected classes in [0, {classes}), got {int(outside[0])}")


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
        gt = assignment.gt_index[image, anchor]
        weight = assignment.weight[image, anchor].to(raw.dtype)
        label = gt_labels[image, gt].long()

        target = torch.zeros_like(logits)
        if label_smoothing:
            spread = weight * (0.5 * label_smoothing)
            target[image, :, anchor] = spread[:, None].expand(-1, logits.shape[1])
        target[image, label, anchor] = weight * (1 - 0.5 * label_smoothing)
        cls = class_loss(logits, target, class_pos_weight, focal_gamma)

        points, stride = map_anchor_points(maps, strides, raw.dtype)
        point = points[anchor]
        target_boxes = gt_boxes[image, gt].to(raw.dtype) / stride[anchor]
        bins = all_bins.permute(0, 2, 1)[image, anchor].view(-1, 4, REG_MAX)
        values = torch.arange(REG_MAX, device=raw.device, dtype=raw.dtype)
        sides = (bins.softmax(-1) * values).sum(-1)
        boxes = torch.cat((point - sides[:, :2], point + sides[:, 2:]), 1)
        box = ((1 - ciou(boxes, target_boxes)) * weight).sum()

        distance = torch.cat((point - target_boxes[:, :2], target_boxes[:, 2:] - point), 1)
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
    index = lower.nan_to_num(0).long()[..., None]  # what is NaN stays so by its fraction
    below = log_probability.gather(-1, index)[..., 0]
    above = log_probability.gather(-1, index + 1)[..., 0]
    return -((1 - fraction) * below + fraction * above).mean(-1)


# ---- kernels


def _items(
    maps: Sequence[Tensor],
    gt_index: Tensor,
    weight: Tensor,
    gt_labels: Tensor,
    gt_boxes: Tensor,
    normaliser: Tensor,
    strides: Sequence[int],
    class_pos_weight: float,
    label_smoothing: float,
    focal_gamma: float,
    gains: Sequence[float],
) -> Tensor:
    """`detection_loss_reference` with the arguments of the kernels."""
    box, cls, dfl = gains
    options = LossOptions(tuple(strides), class_pos_weight, label_smoothing, focal_gamma, (box, cls, dfl))
    return detection_loss_reference(maps, Assignment(gt_index, weight), gt_labels, gt_boxes, normaliser, options)


def _items_and_gradients(
    maps: Sequence[Tensor], *arguments: Any, upstream: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The items and the gradients of `maps`, in their memory format, for `upstream`, by default ones."""
    with torch.enable_grad():
        leaves = [level.detach().requires_grad_() for level in maps]
        items = _items(leaves, *arguments)
    gradients = torch.autograd.grad(items, leaves, torch.ones_like(items) if upstream is None else upstream)
    return items.detach(), [empty_map(level).copy_(each) for level, each in zip(maps, gradients, strict=True)]


def forward_reference(maps: Sequence[Tensor], *arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """Kernel `detection_loss_forward`: the items, and with `gradient` the gradients of `maps` for ones."""
    *others, gradient = arguments
    return _items_and_gradients(maps, *others) if gradient else (_items(maps, *others), [])


def backward_reference(upstream: Tensor, maps: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    """Kernel `detection_loss_backward`: the gradients of `maps` for `upstream` [3]."""
    return _items_and_gradients(maps, *arguments, upstream=upstream)[1]


def unless_ones_reference(upstream: Tensor, maps: Sequence[Tensor], *arguments: Any) -> None:
    """Kernel `detection_loss_unless_ones`: overwrites `gradients`, those for ones, unless `upstream` is all ones.

    A kernel decides on the device, so that the host need not wait for it.
    """
    *others, gradients = arguments
    if not bool((upstream == 1).all()):
        for gradient, new in zip(gradients, backward_reference(upstream, maps, *others), strict=True):
            gradient.copy_(new)


def _fake_forward(
    maps: Sequence[Tensor],
    gt_index: Tensor,
    weight: Tensor,
    gt_labels: Tensor,
    gt_boxes: Tensor,
    normaliser: Tensor,
    *options: Any,
) -> tuple[Tensor, list[Tensor]]:
    *_, gradient = options
    return normaliser.new_empty(3), [empty_map(level) for level in maps] if gradient else []


def _fake_backward(upstream: Tensor, maps: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    return [empty_map(level) for level in maps]


def _fake_unless_ones(upstream: Tensor, maps: Sequence[Tensor], *arguments: Any) -> None:
    pass


class _Kernels(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    unless_ones: Callable[..., Any]


_ARGUMENTS = (
    "Tensor[] maps, Tensor gt_index, Tensor weight, Tensor gt_labels, Tensor gt_boxes, Tensor normaliser, "
    "int[] strides, float class_pos_weight, float label_smoothing, float focal_gamma, float[] gains"
)
KERNELS = _Kernels(
    Kernel(
        f"detection_loss_forward({_ARGUMENTS}, bool gradient) -> (Tensor, Tensor[])", forward_reference, _fake_forward
    ),
    Kernel(f"detection_loss_backward(Tensor upstream, {_ARGUMENTS}) -> Tensor[]", backward_reference, _fake_backward),
    Kernel(
        f"detection_loss_unless_ones(Tensor upstream, {_ARGUMENTS}, Tensor(a!)[] gradients) -> ()",
        unless_ones_reference,
        _fake_unless_ones,
    ),
)


# ---- gradient


def _run(
    kernels: _Kernels,
    maps: Sequence[Tensor],
    assignment: Assignment,
    gt_labels: Tensor,
    gt_boxes: Tensor,
    normaliser: Tensor,
    options: LossOptions,
) -> Tensor:
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    maps = [with_one_pixel_stride(level) for level in maps]
    fixed = (
        assignment.gt_index.contiguous(),
        assignment.weight.detach().to(dtype).contiguous(),
        gt_labels.long().contiguous(),
        gt_boxes.detach().to(dtype).contiguous(),
        normaliser.to(dtype),
    )
    result: Tensor
    if torch.is_grad_enabled() and any(level.requires_grad for level in maps):
        result = _DetectionLoss.apply(kernels, options, *fixed, *maps)
    else:
        result, _ = kernels.forward(maps, *fixed, *options, False)
    return result


class _DetectionLoss(AutogradFunction):
    @staticmethod
    def forward(ctx: Any, kernels: _Kernels, options: LossOptions, *tensors: Tensor) -> Tensor:
        fixed, maps = tensors[:5], tensors[5:]
        # float16 trains with a loss scale: the gradient for ones would underflow before it is scaled. A traced graph
        # saves only the maps, and its backward starts from them.
        in_forward = maps[0].dtype != torch.float16 and not torch.compiler.is_compiling()
        items, gradients = kernels.forward(maps, *fixed, *options, in_forward)
        ctx.save_for_backward(*tensors)
        ctx.kernels = kernels
        ctx.options = options
        ctx.gradients = gradients if in_forward else None
        result: Tensor = items
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Otherwise a second derivative would silently miss that the gradient depends on the maps.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "detection_loss: compiled kernels have no second derivative (create_graph=True); "
                'use yolov9_fast.set_backend("eager", op="detection_loss")'
            )
        fixed, maps = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        upstream = upstream.contiguous()
        # Returned once: the caller owns them then, and a second backward starts from the maps.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None or (upstream.is_cpu and not _all_ones(upstream)):
            gradients = ctx.kernels.backward(upstream, maps, *fixed, *ctx.options)
        elif upstream.is_cuda:
            ctx.kernels.unless_ones(upstream, maps, *fixed, *ctx.options, gradients)
        return (None,) * 7 + tuple(gradients)


def _all_ones(values: Tensor) -> bool:
    return bool((values == 1).all())


# ---- backends


def _supports(
    device: str,
    maps: Sequence[Tensor],
    assignment: Assignment,
    gt_labels: Tensor,
    gt_boxes: Tensor,
    normaliser: Tensor,
    options: LossOptions,
) -> str | None:
    return why_not_maps(device, maps) or not_for_compiled(device, *assignment, gt_labels, gt_boxes, normaliser)


OPERATOR = Operator(
    "detection_loss",
    "BCE, CIoU and DFL of one branch",
    reference=detection_loss_reference,
    kernels=KERNELS,
    run=_run,
    backends={device: Compiled(functools.partial(_supports, device)) for device in ("cpu", "cuda")},
)
