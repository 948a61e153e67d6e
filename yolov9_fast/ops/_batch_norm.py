"""The formulas of BatchNorm and SiLU that `bn_silu` and `rep_bn_silu` share, in eager PyTorch.

With B inputs x_b (one, or the two of RepConv), statistics over the batch and both image axes, N·H·W values a channel:

    mean_b = Σ x_b / NHW      rstd_b = (Σ (x_b − mean_b)² / NHW + eps)^−½      x̂_b = (x_b − mean_b) rstd_b
    y = Σ_b (γ_b x̂_b + β_b)    z = y σ(y) + residual

Backward, from the x_b and two vectors each; everything else is recomputed:

    s = σ(y)      dy = dz s (1 + y (1 − s))      dresidual = dz
    dβ_b = Σ dy      dγ_b = Σ dy x̂_b
    dx_b = γ_b rstd_b (dy − dβ_b / NHW − x̂_b dγ_b / NHW)        statistics of this batch
    dx_b = γ_b rstd_b dy                                        given (frozen) statistics
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov9_fast._layout import empty_map, layout_of
from yolov9_fast.ops._checks import FLOATING, HALF, check_writable
from yolov9_fast.ops._recording import recorded


class Norm(NamedTuple):
    """Parameters and running statistics of one BatchNorm, each [C] or None: `Norm(bn.weight, bn.bias, ...)`."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None


class Branch(NamedTuple):
    """One normalised input: x [N, C, H, W]; the rest [C]."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    rstd: Tensor


VECTORS = ("weight", "bias", "running_mean", "running_var")


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Dtype of statistics, parameters and sums: float64 for float64 maps, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def parameter(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """γ or β in the dtype of the computation, contiguous; the gradient passes through a conversion."""
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    if vector is None or (vector.dtype == wanted and vector.is_contiguous()):
        return vector
    return vector.to(wanted).contiguous()


def empty_vector(x: Tensor) -> Tensor:
    """Uninitialised [C] in the dtype of the computation."""
    return x.new_empty(x.shape[1], dtype=computed_in(x.dtype))


def check_statistics(
    x: Tensor, training: bool, running_mean: Tensor | None, running_var: Tensor | None, one_process: bool
) -> None:
    """Raises `ValueError` where the statistics are incomplete, or of one value per channel; `TypeError` by dtype."""
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean, running_var: expected two tensors or None twice, got one")
    if not training and running_mean is None:
        raise ValueError("running_mean, running_var: expected tensors when training is False, got None")
    if running_mean is not None and running_var is not None and running_mean.dtype != running_var.dtype:
        raise TypeError(f"running_var: expected {running_mean.dtype} as running_mean, got {running_var.dtype}")
    for name, vector in (("running_mean", running_mean), ("running_var", running_var)) if training else ():
        if vector is not None and (vector.requires_grad or not vector.is_contiguous()):
            check_writable(name, vector)
    if training and one_process and x.numel() == x.shape[1]:
        # torch's own message: a variance of one value is undefined.
        raise ValueError(f"x: expected more than 1 value per channel when training, got input size {list(x.shape)}")


def batch_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """torch's batch_norm, which takes vectors of one dtype: γ and β in that of the statistics, or float32."""
    if x.dtype in HALF:
        dtype = torch.float32 if running_mean is None else running_mean.dtype
        if weight is not None and weight.dtype != dtype:
            weight = weight.to(dtype)
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)


def unit_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean 0 and variance 1 for the channels of `x`, [C] each; nobody may write to them.

    Made once per width, dtype and device, because each would cost a launch per unit and call on a GPU.
    """
    key = (x.shape[1], computed_in(x.dtype), x.device)
    plain = type(x) is Tensor and not torch.compiler.is_compiling()  # fake tensors belong to their mode
    known = _units.get(key) if plain else None
    if known is None:
        with torch.inference_mode(False):  # they may be saved for a backward later
            known = torch.zeros(key[0], dtype=key[1], device=key[2]), torch.ones(key[0], dtype=key[1], device=key[2])
        # What is made while a CUDA graph is captured, or inside a transform, belongs to that.
        if plain and not recorded() and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            _units[key] = known
    return known


_NONE = (None, None)
_units: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}


def rstd_of(running_var: Tensor, eps: float) -> Tensor:
    """1 / sqrt(running_var + eps)."""
    key = (running_var.shape[0], running_var.dtype, running_var.device)
    if eps == 0.0 and running_var is _units.get(key, _NONE)[1]:
        return running_var  # 1
    return (running_var + eps).rsqrt()


def not_for_kernels(x: Tensor, *statistics: Tensor | None) -> str | None:
    """For `supports`: why the kernels cannot take these dtypes and running statistics, on any device."""
    if x.dtype not in FLOATING:
        return f"it takes {', '.join(str(dtype) for dtype in FLOATING)}, got {x.dtype}"
    wanted = computed_in(x.dtype)
    for running in statistics:
        if running is not None and running.dtype != wanted:
            return f"it needs running statistics in {wanted}, got {running.dtype}"
        if running is not None and not running.is_contiguous():
            return "it needs contiguous running statistics"
    return None


def unreadable(out: Tensor | None) -> str | None:
    """For `supports`: why kernels that write in place cannot write to `out`."""
    return None if out is None or layout_of(out) is not None else "out must be channels_last or contiguous"


def _column(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and Σ (x − mean)² [C] over batch and pixels; zeros of an empty batch."""
    values = x.to(computed_in(x.dtype))
    if x.numel() == 0:
        zeros = values.new_zeros(x.shape[1])
        return zeros, zeros.clone()
    mean = values.mean((0, 2, 3))
    return mean, (values - _column(mean)).square().sum((0, 2, 3))


def normalise(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Mean and rstd [C] of this batch; updates the running statistics, the variance there being the unbiased one."""
    mean, m2 = statistics(x)
    count = x.numel() // max(x.shape[1], 1)
    if count and running_mean is not None and running_var is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(m2 / max(count - 1, 1), momentum)
    return mean, (m2 / max(count, 1) + eps).rsqrt()


def _normalised(branch: Branch) -> Tensor:
    return (branch.x.to(branch.mean.dtype) - _column(branch.mean)) * _column(branch.rstd)


def _sum_of_norms(branches: Sequence[Branch]) -> Tensor:
    y = torch.zeros((), dtype=branches[0].mean.dtype, device=branches[0].x.device)
    for branch in branches:
        y = y + (_normalised(branch) if branch.weight is None else _normalised(branch) * _column(branch.weight))
        y = y if branch.bias is None else y + _column(branch.bias)
    return y


def apply_reference(branches: Sequence[Branch], residual: Tensor | None, out: Tensor, silu: bool) -> None:
    y = _sum_of_norms(branches)
    z = y * torch.sigmoid(y) if silu else y
    out.copy_(z if residual is None else z + residual)


def _gradient_of_y(dz: Tensor, branches: Sequence[Branch], silu: bool) -> Tensor:
    dz = dz.to(branches[0].mean.dtype)
    if not silu:
        return dz
    y = _sum_of_norms(branches)
    s = torch.sigmoid(y)
    return dz * s * (1 + y * (1 - s))


def sums_reference(dz: Tensor, branches: Sequence[Branch], silu: bool) -> Tensor:
    """[1 + B, C]: Σ dy, then Σ dy x̂ of each input."""
    dy = _gradient_of_y(dz, branches, silu)
    return torch.stack([dy.sum((0, 2, 3)), *((dy * _normalised(branch)).sum((0, 2, 3)) for branch in branches)])


def input_gradients_reference(
    dz: Tensor, branches: Sequence[Branch], means: Sequence[Tensor], silu: bool
) -> list[Tensor]:
    """dx of each input; means: of dy, then of dy x̂ of each input, [C]."""
    dy = _gradient_of_y(dz, branches, silu)
    gradients = []
    for branch, mean_dy_xhat in zip(branches, means[1:], strict=True):
        scale = branch.rstd if branch.weight is None else branch.rstd * branch.weight
        dx = (dy - _column(means[0]) - _normalised(branch) * _column(mean_dy_xhat)) * _column(scale)
        gradients.append(empty_map(branches[0].x).copy_(dx))
    return gradients
