"""What `bn_silu` and `rep_bn_silu` share: checks, layouts, mathematics in eager PyTorch, statistics of all processes.

With B inputs x_b (one, or the two of RepConv), statistics over the batch and both image axes, N·H·W values a channel:

    mean_b = Σ x_b / NHW      rstd_b = (Σ (x_b − mean_b)² / NHW + eps)^−½      x̂_b = (x_b − mean_b) rstd_b
    y = Σ_b (γ_b x̂_b + β_b)    z = y σ(y) + residual

Backward, from the x_b and two vectors each, everything else recomputed:

    s = σ(y)      dy = dz s (1 + y (1 − s))      dresidual = dz
    dβ_b = Σ dy      dγ_b = Σ dy x̂_b
    dx_b = γ_b rstd_b (dy − dβ_b / NHW − x̂_b dγ_b / NHW)        statistics of this batch
    dx_b = γ_b rstd_b dy                                        given (frozen) statistics
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable as torch_once_differentiable

from yolov9_fast.ops import _library as library
from yolov9_fast.ops._interpreted import triton_launcher

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Statistics, parameters and sums: float64 for float64 maps, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def parameter(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """γ or β in the type of the computation; a parameter of another type gets its gradient through the conversion."""
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    return vector if vector is None or vector.dtype == wanted else vector.to(wanted)


# ---- checks


def check_map(op: str, name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {got}")
    if x.ndim != 4:
        raise ValueError(f"{op}: {name} must have shape [N, C, H, W], got {list(x.shape)}")


def check_vector(op: str, name: str, vector: Tensor | None, x: Tensor) -> None:
    if vector is not None and vector.shape != x.shape[1:2]:
        raise ValueError(f"{op}: {name} must have shape [{x.shape[1]}], got {list(vector.shape)}")


def check_like(op: str, name: str, given: Tensor, x: Tensor) -> None:
    if given.shape != x.shape:
        raise ValueError(f"{op}: {name} must have the input's shape {list(x.shape)}, got {list(given.shape)}")
    if given.device != x.device:
        raise ValueError(f"{op}: {name} must be on the input's device {x.device}, got {given.device}")


def check_out(op: str, out: Tensor, x: Tensor) -> None:
    check_like(op, "out", out, x)
    if out.dtype != x.dtype:
        raise TypeError(f"{op}: out must have the input's dtype {x.dtype}, got {out.dtype}")
    if out.requires_grad:
        raise ValueError(f"{op}: out must not require a gradient; it is only written to")


def check_statistics(
    op: str, x: Tensor, training: bool, running_mean: Tensor | None, running_var: Tensor | None, alone: bool
) -> None:
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}: running_mean and running_var must both be given or both be None")
    if not training and running_mean is None:
        raise ValueError(f"{op}: running_mean and running_var are needed when training is False, got None")
    if training and alone and x.numel() == x.shape[1]:
        # As torch: a variance of one value is none.
        raise ValueError(f"{op}: expected more than 1 value per channel when training, got input size {list(x.shape)}")


def why_not_kernel(x: Tensor, running: Tensor | None) -> str | None:
    """Why the kernels cannot take these arguments, whatever the device."""
    if x.dtype not in DTYPES:
        return f"it takes {', '.join(str(dtype) for dtype in DTYPES)}, got {x.dtype}"
    if running is not None and running.dtype != computed_in(x.dtype):
        return f"it needs running statistics in {computed_in(x.dtype)}, got {running.dtype}"
    return None


# ---- layouts


def has_rows(x: Tensor) -> bool:
    """Channels side by side, all pixels at one distance: channels_last and its channel slices (see feature_map.h)."""
    n, channels, h, w = x.shape
    batch, channel, line, pixel = x.stride()
    if channels > 1 and channel != 1:
        return False
    row = pixel if w > 1 else line if h > 1 else batch if n > 1 else channels
    return row >= channels and (h <= 1 or line == w * row) and (n <= 1 or batch == h * w * row)


def empty_dense(x: Tensor) -> Tensor:
    """Uninitialised, of x's shape, dense in x's layout: what the kernels return for gradients."""
    return torch.empty_like(x, memory_format=torch.channels_last if has_rows(x) else torch.contiguous_format)


def empty_output(x: Tensor) -> Tensor:
    """As `empty_dense`, sooner for a dense x: small maps take less time than a look at all strides here."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_like(x)
    return empty_dense(x)


def returned(out: Tensor) -> Tensor:
    """The alias of a written `out` that an `autograd.Function` returns as its output.

    `mark_dirty` would make autograd rebase the slot's history, and loses the gradient under torch.compile. The version
    is counted up by hand instead, so that a second write to a slot that backward still needs is an error.
    """
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out.view_as(out)


class _Into(torch.autograd.Function):
    """Copies a value into `out`; the gradient of `out` is that of the value."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, out: Tensor) -> Tensor:
        out.copy_(value)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def into(out: Tensor | None, value: Tensor) -> Tensor:
    """`value`, written into `out` if there is one."""
    return value if out is None else _Into.apply(value, out)


# ---- the mathematics


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
        gradients.append(empty_dense(branches[0].x).copy_(dx))
    return gradients


# ---- autograd


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator of that name, whose work is only needed where a graph of the backward is recorded."""
    refusing_a_second = torch_once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, dz: Tensor) -> Any:
        return refusing_a_second(ctx, dz) if torch.is_grad_enabled() else backward(ctx, dz)

    return wrapper


# ---- registration


class Raw(NamedTuple):
    """One backend's kernels of an operator."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    stats: Callable[..., Any]
    apply: Callable[..., Any]
    backward_sums: Callable[..., Any]
    backward_apply: Callable[..., Any]


def define(schema: str, fake: Callable[..., Any], reference: Callable[..., Any], module: str) -> tuple[Any, Any]:
    """Register `schema` for the compiled kernels and, with `_triton` to its name, for `kernels/MODULE.py`."""
    name = schema.split("(", 1)[0]
    compiled = library.define(schema, fake=fake, reference=reference)
    triton = library.define(
        schema.replace(name, f"{name}_triton", 1), fake=fake, reference=triton_launcher(module, name)
    )
    # The overload itself: finding it again at each call costs more than some of these kernels.
    return compiled.default, triton.default  # type: ignore[attr-defined]


def fake_vector(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=computed_in(x.dtype))


# ---- statistics of all processes


def global_statistics(mean: Tensor, m2: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and M2 [C] over all processes of `group` and the number of values a channel, in float64.

    Every process adds the gathered (count, mean, M2) up in the order of the ranks, so all get the same bits.
    """
    local = torch.cat((mean.new_tensor([count], dtype=torch.float64), mean.double(), m2.double()))
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group=group)
    table = torch.stack(gathered)
    counts = table[:, :1]
    means, squares = table[:, 1:].chunk(2, 1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total.clamp_min(1)
    return mean, (squares + counts * (means - mean).square()).sum(0), total


def synchronised(
    x: Tensor, raw: Raw, norm: tuple[Tensor | None, Tensor | None], momentum: float, eps: float, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and rstd [C] of the batches of all processes, and the count; updates running mean and variance."""
    dtype = computed_in(x.dtype)
    with torch.no_grad():
        mean, m2 = raw.stats(x)
        mean, m2, total = global_statistics(mean, m2, x.numel() // x.shape[1], group)
        if norm[0] is not None and norm[1] is not None:
            norm[0].lerp_(mean.to(norm[0].dtype), momentum)
            norm[1].lerp_((m2 / (total - 1).clamp_min(1)).to(norm[1].dtype), momentum)
        return mean.to(dtype), (m2 / total.clamp_min(1) + eps).rsqrt().to(dtype), total


def means_of(sums: Tensor, total: Tensor | None, group: Any) -> Tensor:
    """What `backward_apply` takes: the sums' means over all processes; zeros for given statistics (no group)."""
    if total is None:
        return torch.zeros_like(sums)
    sums = sums.clone()
    dist.all_reduce(sums, group=group)
    return (sums / total).to(sums.dtype)
