"""Reparameterisation: drop the auxiliary branch, fold BatchNorm and RepConv, and undo the folding for training.

Folding: W' = W·γ/√(σ² + ε), b' = β − μγ/√(σ² + ε); RepConv's 1×1 kernel is padded to 3×3 and added.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yolov9_fast.models.model import DetectionModel, conv_units, model_device, rep_convs
from yolov9_fast.models.module_options import norm_options, set_norm_options
from yolov9_fast.nn import Conv, RepConv
from yolov9_fast.nn.blocks import BN_EPS, BN_MOMENTUM


def to_deploy(model: DetectionModel) -> DetectionModel:
    """The model without its auxiliary branch (yolov9-X → gelan-X), weights copied; the argument is left as it is.

    Raises:
        RuntimeError: the main branch's outputs differ (they are compared on one random image).
    """
    graph, origin = model.graph.deploy()
    deployed = DetectionModel(graph, model.num_classes, class_tower=model.class_tower, box_groups=model.box_groups)
    if model.is_fused:
        _fuse_in_place(deployed)
    source = model.state_dict()
    wanted = deployed.state_dict()
    state = {key: source[deployed_key_origin(model, key, origin)] for key in wanted}
    deployed.load_state_dict(state)
    norms = norm_options(model)
    origins = {name: deployed_key_origin(model, f"{name}.", origin).rstrip(".") for name in norm_options(deployed)}
    set_norm_options(deployed, {name: norms[source_name] for name, source_name in origins.items()})
    deployed.names = dict(model.names)
    deployed.to(model_device(model)).train(model.training)
    _check_same(model, deployed, "to_deploy")
    return deployed


def deployed_key_origin(model: DetectionModel, key: str, origin: tuple[int, ...]) -> str:
    """State-dict key in the training graph for a key of its deployed graph (`origin` from `Graph.deploy`)."""
    _, index, rest = key.split(".", 2)
    if int(index) == len(origin) - 1:
        child, _, tail = rest.partition(".")
        rest = f"{model.head.deployed_children.get(child, child)}.{tail}"
    return f"model.{origin[int(index)]}.{rest}"


def fuse(model: DetectionModel) -> DetectionModel:
    """A copy with BatchNorm and RepConv folded into plain convolutions with bias, for inference.

    Raises:
        RuntimeError: the folded outputs differ from the model's beyond float32 rounding.
    """
    fused = copy.deepcopy(model)
    if model.is_fused:
        return fused
    _fuse_in_place(fused)
    _check_same(model, fused, "fuse")
    return fused


def unfuse(model: DetectionModel, images: Iterable[Tensor] | None = None) -> DetectionModel:
    """A copy with BatchNorm and RepConv put back, so that deployed weights can be trained again.

    In evaluation mode the outputs stay the same. In training mode BatchNorm normalises by the batch, so each must know
    the statistics of its convolution: with `images` they are measured, and the network keeps its function there too.
    Without, they start as mean 0 and variance 1, which training mode does not preserve.

    Args:
        model: fused; an unfused one is only copied (and calibrated where `images` is given).
        images: batches [B, 3, H, W] in [0, 1], a few dozen typical training images in all.
    """
    result = copy.deepcopy(model)
    if model.is_fused:
        for _, rep in list(rep_convs(result)):
            _unfuse_rep(rep)
        for _, unit in list(conv_units(result)):
            if not isinstance(unit.bn, nn.BatchNorm2d):
                _unfuse_unit(unit)
        _check_same(model, result, "unfuse")
    if images is not None:
        calibrate_batch_norm(result, images)
    return result


@torch.no_grad()
def calibrate_batch_norm(
    model: DetectionModel, images: Iterable[Tensor], *, only: Callable[[str], bool] | None = None
) -> int:
    """Set every BatchNorm's running statistics to those of `images` without changing the evaluation output.

    γ and β are changed along with mean and variance, so that γ(x − μ)/√(σ² + ε) + β stays the same function.

    Args:
        images: batches [B, 3, H, W] in [0, 1].
        only: which BatchNorm to set, by module name (None: all).

    Returns: the number of images seen.
    """
    sums: dict[nn.BatchNorm2d, list[Tensor]] = {}

    def measure(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        x = inputs[0].detach().float().transpose(0, 1).flatten(1)
        mean, variance = x.mean(1).double(), x.var(1, unbiased=False).double()
        total = sums.setdefault(module, [torch.zeros_like(mean) for _ in range(3)])
        total[0] += x.shape[1]
        total[1] += x.shape[1] * mean
        total[2] += x.shape[1] * (variance + mean * mean)

    norms = [m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and (only is None or only(n))]
    hooks = [m.register_forward_pre_hook(measure) for m in norms]
    training = model.training
    seen = 0
    try:
        model.eval()
        for batch in images:
            model.raw(batch.to(model_device(model)))
            seen += len(batch)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    for norm, (count, first, second) in sums.items():
        mean = first / count
        variance = (second / count - mean * mean).clamp_min(0)
        _restate(norm, mean, variance)
    return seen


def _restate(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Give `norm` new statistics and the γ, β that keep its function; a constant channel is left alone."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    old_scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    old_shift = norm.bias.double() - norm.running_mean.double() * old_scale
    usable = variance > norm.eps * 1e-2
    mean = torch.where(usable, mean, norm.running_mean.double())
    variance = torch.where(usable, variance, norm.running_var.double())
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_(old_scale * (variance + norm.eps).sqrt())
    norm.bias.copy_(old_shift + mean * old_scale)


def _folded(unit: Conv) -> tuple[Tensor, Tensor]:
    """Weight and bias of convolution and BatchNorm together, computed in float64."""
    norm = unit.bn
    assert isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = unit.conv.weight.double() * scale.view(-1, 1, 1, 1)
    bias = norm.bias.double() - norm.running_mean.double() * scale
    return weight.detach(), bias.detach()


def _convolution_like(conv: nn.Conv2d, *, bias: bool) -> nn.Conv2d:
    (kernel, _), (stride, _) = conv.kernel_size, conv.stride
    new = nn.Conv2d(conv.in_channels, conv.out_channels, kernel, stride, kernel // 2, groups=conv.groups, bias=bias)
    return new.to(conv.weight.device, conv.weight.dtype)


@torch.no_grad()
def _fuse_in_place(model: nn.Module) -> None:
    for _, rep in list(rep_convs(model)):
        if rep.conv is not None:
            continue
        assert rep.conv1 is not None
        assert rep.conv2 is not None
        (w3, b3), (w1, b1) = _folded(rep.conv1), _folded(rep.conv2)
        conv = _convolution_like(rep.conv1.conv, bias=True)
        conv.weight.copy_(w3 + F.pad(w1, (1, 1, 1, 1)))
        assert conv.bias is not None
        conv.bias.copy_(b3 + b1)
        rep.conv, rep.conv1, rep.conv2 = conv, None, None
    for _, unit in list(conv_units(model)):
        if isinstance(unit.bn, nn.BatchNorm2d | nn.SyncBatchNorm):
            weight, bias = _folded(unit)
            conv = _convolution_like(unit.conv, bias=True)
            conv.weight.copy_(weight)
            assert conv.bias is not None
            conv.bias.copy_(bias)
            unit.conv, unit.bn = conv, nn.Identity()


@torch.no_grad()
def _unfuse_unit(unit: Conv) -> None:
    """conv(x) + b → BN(conv(x)) with mean 0, variance 1, γ = √(1 + ε), β = b."""
    old = unit.conv
    assert old.bias is not None
    norm = nn.BatchNorm2d(old.out_channels, eps=BN_EPS, momentum=BN_MOMENTUM)
    norm.weight.fill_((1 + BN_EPS) ** 0.5)
    norm.to(old.weight.device, old.weight.dtype)
    norm.bias.copy_(old.bias)
    unit.conv = _convolution_like(old, bias=False)
    unit.conv.weight.copy_(old.weight)
    unit.bn = norm


@torch.no_grad()
def _unfuse_rep(rep: RepConv) -> None:
    """Share the centre tap between the 3×3 and the 1×1 branch, so that neither starts dead; the 3×3 keeps the bias."""
    old = rep.conv
    assert old is not None
    assert old.bias is not None
    conv1 = Conv(old.in_channels, old.out_channels, 3, activation=False).to(old.weight)
    conv2 = Conv(old.in_channels, old.out_channels, 1, activation=False).to(old.weight)
    centre = old.weight[:, :, 1:2, 1:2] / 2
    conv1.conv.weight.copy_(old.weight - F.pad(centre, (1, 1, 1, 1)))
    conv2.conv.weight.copy_(centre)
    for unit, bias in ((conv1, old.bias), (conv2, torch.zeros_like(old.bias))):
        assert isinstance(unit.bn, nn.BatchNorm2d)
        unit.bn.weight.fill_((1 + BN_EPS) ** 0.5)
        unit.bn.bias.copy_(bias)
    rep.conv, rep.conv1, rep.conv2 = None, conv1, conv2


@torch.no_grad()
def _check_same(before: DetectionModel, after: DetectionModel, what: str) -> None:
    """Compare the main branch's raw maps on one random image in evaluation mode."""
    weight = next(before.parameters())
    if weight.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 64, 64, generator=generator).to(weight.device, weight.dtype)
    maps = []
    for model in (before, after):
        training = model.training
        maps.append(model.eval().raw(image, auxiliary=False).main)
        model.train(training)
    tolerance = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 5e-2
    for a, b in zip(*maps, strict=True):
        scale = a.abs().max().clamp_min(1)
        error = float((a - b).abs().max() / scale)
        if not error <= tolerance and bool(torch.isfinite(a).all()):
            raise RuntimeError(
                f"{what}: outputs differ by {error:.2e} of their largest value (allowed {tolerance:.0e})"
            )
