"""BatchNorm, SiLU and an optional residual in one pass: silu(γ x̂ + β) + residual; formulas in `ops/_batch_norm.py`.

Eager PyTorch moves 13 tensors through memory for forward and backward, the kernels 8, and they save the input and two
vectors where eager saves the normalised tensor too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov9_fast._layout import empty_map
from yolov9_fast.ops import _batch_norm as bn
from yolov9_fast.ops._batch_norm import Branch
from yolov9_fast.ops._checks import check_like, check_map, check_out, check_vectors
from yolov9_fast.ops._concat import placed, returned
from yolov9_fast.ops._operator import AutogradFunction, Compiled, Kernel, Operator, Python, once_differentiable
from yolov9_fast.ops._supports import not_for_triton, not_on
from yolov9_fast.ops._sync_statistics import COMBINE, means_of, synchronised


def bn_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    activation: bool = True,
    group: Any = None,
) -> Tensor:
    """`silu(F.batch_norm(x, ...)) + residual` [N, C, H, W], of x's dtype; differentiable once.

    Args:
        x: float32, bfloat16, float16 or float64, channels_last, contiguous, or a channel slice of either (no copy);
            any other strides too (with one).
        weight, bias: γ and β [C], None for 1 and 0.
        running_mean, running_var: [C]. With `training` they are updated in place (the unbiased variance) or None;
            without, they are the statistics, and gradients flow as for frozen BatchNorm.
        training: normalise by the statistics of this batch. One value per channel raises `ValueError`, as in torch.
        momentum: weight of the new statistics; for a cumulative average (`momentum=None` of a module) pass 1 / count.
        eps: added to the variance.
        residual: added after the activation; x's shape, taken in x's dtype.
        out: written to and returned, as a slice of a concatenation buffer; x's shape and dtype. Where several slices
            of one buffer are written in eager mode, each needs its own version counter (`ops/_concat.py` sees to it).
        activation: False leaves out the SiLU.
        group: a process group, as `dist.group.WORLD`: statistics of the batches of all its processes (SyncBN).

    Raises `ValueError` or `TypeError` that names the argument.
    """
    check_map("x", x)
    check_vectors(x, bn.VECTORS, (weight, bias, running_mean, running_var))
    bn.check_statistics(x, training, running_mean, running_var, group is None)
    if residual is not None:
        check_like("residual", residual, x.shape, x.device)
        residual = residual if residual.dtype == x.dtype else residual.to(x.dtype)
    if out is not None:
        check_out("out", out, x.shape, x)
    z: Tensor = OPERATOR(
        x, weight, bias, running_mean, running_var, training, momentum, eps, residual, out, activation, group
    )
    return z


def bias_silu(
    x: Tensor,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    activation: bool = True,
) -> Tensor:
    """silu(x + bias) + residual, for units whose BatchNorm is folded into the convolution: γ = rstd = 1, mean = 0.

    Written into `out`; without one, into x itself where autograd records nothing, else into a new tensor.
    """
    check_map("x", x)
    check_vectors(x, ("bias",), (bias,))
    recorded = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, bias, residual)
    )
    if out is None and not recorded:
        out = x.detach()
    mean, variance = bn.unit_statistics(x)
    # eps is 0: rstd is exactly 1.
    options: dict[str, Any] = {"training": False, "momentum": 0.0, "eps": 0.0}
    weight = None if bias is None else variance  # 1: kernels take both or neither, and would make it at each call
    return bn_silu(x, weight, bias, mean, variance, **options, residual=residual, out=out, activation=activation)


def bn_silu_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    activation: bool = True,
    group: Any = None,
) -> Tensor:
    """The definition by torch's own functions; with a group, by the formulas of `ops/_batch_norm.py`."""
    if training and group is not None:
        args = (x, weight, bias, running_mean, running_var, training, momentum, eps, residual, out, activation, group)
        return _run(OPERATOR.references, *args)
    z = bn.batch_norm_reference(x, weight, bias, running_mean, running_var, training, momentum, eps)
    z = F.silu(z) if activation else z
    return placed(z if residual is None else z + residual, out)


# ---- kernels


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    out: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    mean, rstd = bn.normalise(x, running_mean, running_var, momentum, eps)
    bn.apply_reference([Branch(x, weight, bias, mean, rstd)], residual, out, silu)
    return mean, rstd


def _backward(
    dz: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    branches = [Branch(x, weight, bias, mean, rstd)]
    sums = bn.sums_reference(dz, branches, silu)
    means = sums / max(x.numel() // max(x.shape[1], 1), 1)
    (dx,) = bn.input_gradients_reference(dz, branches, means.unbind(), silu)
    return dx, sums[1].clone(), sums[0].clone()


def _apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    out: Tensor,
    silu: bool,
) -> None:
    bn.apply_reference([Branch(x, weight, bias, mean, rstd)], residual, out, silu)


def _backward_sums(
    dz: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, silu: bool
) -> Tensor:
    return bn.sums_reference(dz, [Branch(x, weight, bias, mean, rstd)], silu)


def _backward_apply(
    dz: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mean_dy: Tensor,
    mean_dy_xhat: Tensor,
    silu: bool,
) -> Tensor:
    return bn.input_gradients_reference(dz, [Branch(x, weight, bias, mean, rstd)], (mean_dy, mean_dy_xhat), silu)[0]


_PARAMETERS = "Tensor? weight, Tensor? bias"
_GIVEN = f"Tensor x, {_PARAMETERS}, Tensor mean, Tensor rstd"


class _Kernels(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    stats: Callable[..., Any]
    combine: Callable[..., Any]
    apply: Callable[..., Any]
    backward_sums: Callable[..., Any]
    backward_apply: Callable[..., Any]


KERNELS = _Kernels(
    forward=Kernel(
        f"bn_silu_forward(Tensor x, {_PARAMETERS}, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, "
        "float eps, Tensor? residual, Tensor(c!) out, bool silu) -> (Tensor mean, Tensor rstd)",
        _forward,
        lambda x, *others: (bn.empty_vector(x), bn.empty_vector(x)),
    ),
    backward=Kernel(
        f"bn_silu_backward(Tensor dz, {_GIVEN}, bool silu) -> (Tensor dx, Tensor dweight, Tensor dbias)",
        _backward,
        lambda dz, x, *others: (empty_map(x), bn.empty_vector(x), bn.empty_vector(x)),
    ),
    stats=Kernel(
        "bn_stats(Tensor x) -> (Tensor mean, Tensor m2)",
        bn.statistics,
        lambda x: (bn.empty_vector(x), bn.empty_vector(x)),
    ),
    combine=COMBINE,
    apply=Kernel(
        f"bn_silu_apply({_GIVEN}, Tensor? residual, Tensor(a!) out, bool silu) -> ()",
        _apply,
        lambda *others: None,
    ),
    backward_sums=Kernel(
        f"bn_silu_backward_sums(Tensor dz, {_GIVEN}, bool silu) -> Tensor",
        _backward_sums,
        lambda dz, x, *others: x.new_empty((2, x.shape[1]), dtype=bn.computed_in(x.dtype)),
    ),
    backward_apply=Kernel(
        f"bn_silu_backward_apply(Tensor dz, {_GIVEN}, Tensor mean_dy, Tensor mean_dy_xhat, bool silu) -> Tensor",
        _backward_apply,
        lambda dz, x, *others: empty_map(x),
    ),
)


# ---- gradient


class _OfBatch(AutogradFunction):
    """Statistics of this batch: saves x, the parameters and two vectors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        out: Tensor | None,
        silu: bool,
        kernels: _Kernels,
    ) -> Tensor:
        target = empty_map(x) if out is None else out
        mean, rstd = kernels.forward(x, weight, bias, running_mean, running_var, momentum, eps, residual, target, silu)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.silu, ctx.kernels = silu, kernels
        return target if out is None else returned(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        need = ctx.needs_input_grad
        residual = dz if need[3] else None
        if need[0]:
            dx, dweight, dbias = ctx.kernels.backward(dz, x, weight, bias, mean, rstd, ctx.silu)
        elif need[1] or need[2]:
            dbias, dweight = ctx.kernels.backward_sums(dz, x, weight, bias, mean, rstd, ctx.silu).unbind()
            dx = None
        else:
            return None, None, None, residual, None, None, None, None, None, None, None
        dweight, dbias = dweight if need[1] else None, dbias if need[2] else None
        return dx, dweight, dbias, residual, None, None, None, None, None, None, None


class _Given(AutogradFunction):
    """Statistics given: running ones (total and group None), or those of all processes, through which dx flows too."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        total: Tensor | None,
        group: Any,
        out: Tensor | None,
        silu: bool,
        kernels: _Kernels,
    ) -> Tensor:
        target = empty_map(x) if out is None else out
        kernels.apply(x, weight, bias, mean, rstd, residual, target, silu)
        ctx.save_for_backward(x, weight, bias, mean, rstd, total)
        ctx.silu, ctx.kernels, ctx.group = silu, kernels, group
        return target if out is None else returned(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd, total = ctx.saved_tensors
        given = (dz, x, weight, bias, mean, rstd)
        need = ctx.needs_input_grad
        dx = dweight = dbias = None
        if total is not None or need[1] or need[2]:
            sums = ctx.kernels.backward_sums(*given, ctx.silu)
            dbias, dweight = sums.unbind()
        else:
            sums = mean.new_zeros((2, mean.shape[0]))
        # Every process takes part in the reduction, also one whose x needs no gradient.
        means = means_of(sums, total, ctx.group)
        if need[0]:
            dx = ctx.kernels.backward_apply(*given, means[0], means[1], ctx.silu)
        residual = dz if need[3] else None
        dweight, dbias = dweight if need[1] else None, dbias if need[2] else None
        return dx, dweight, dbias, residual, None, None, None, None, None, None, None


def _run(
    kernels: _Kernels,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    out: Tensor | None,
    activation: bool,
    group: Any,
) -> Tensor:
    weight, bias = bn.parameter(weight, x.dtype), bn.parameter(bias, x.dtype)
    if training and group is None:
        z: Tensor = _OfBatch.apply(
            x, weight, bias, residual, running_mean, running_var, momentum, eps, out, activation, kernels
        )
        return z
    total = None
    if training:
        mean, rstd, total = synchronised(kernels, x, (running_mean, running_var), momentum, eps, group)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, rstd = running_mean, bn.rstd_of(running_var, eps)
    z = _Given.apply(x, weight, bias, residual, mean, rstd, total, group, out, activation, kernels)
    return z


# ---- backends


def _supports_cpu(
    x: Tensor, weight: Any, bias: Any, running_mean: Tensor | None, running_var: Tensor | None, *rest: Any
) -> str | None:
    return (None if x.is_cpu else not_on("cpu", x)) or bn.not_for_kernels(x, running_mean, running_var)


def _supports_triton(
    x: Tensor, weight: Any, bias: Any, running_mean: Tensor | None, running_var: Tensor | None, *rest: Any
) -> str | None:
    return not_for_triton("bn_silu", x) or bn.unreadable(rest[4]) or bn.not_for_kernels(x, running_mean, running_var)


def _triton() -> _Kernels:
    from yolov9_fast.kernels.batch_norm import bn_stats
    from yolov9_fast.kernels.bn_silu import (
        bn_silu_apply,
        bn_silu_backward,
        bn_silu_backward_apply,
        bn_silu_backward_sums,
        bn_silu_forward,
    )
    from yolov9_fast.kernels.sync_statistics import bn_combine

    return _Kernels(
        bn_silu_forward,
        bn_silu_backward,
        bn_stats,
        bn_combine,
        bn_silu_apply,
        bn_silu_backward_sums,
        bn_silu_backward_apply,
    )


OPERATOR = Operator(
    "bn_silu",
    "BatchNorm, SiLU and residual in one pass",
    reference=bn_silu_reference,
    kernels=KERNELS,
    run=_run,
    backends={"cpu": Compiled(_supports_cpu), "triton": Python(_triton, _supports_triton)},
)
