"""RepConv in training in one pass: silu(BN1(x1) + BN2(x2)) + residual; formulas in `ops/_batch_norm.py`.

Eager PyTorch moves 26 tensors through memory for forward and backward, the kernels 13; they save both inputs and two
vectors each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from yolov9_fast._layout import empty_map
from yolov9_fast.ops import _batch_norm as bn
from yolov9_fast.ops import _bn_silu
from yolov9_fast.ops._batch_norm import Branch, Norm
from yolov9_fast.ops._checks import check_like, check_map, check_out, check_vectors
from yolov9_fast.ops._concat import placed, returned
from yolov9_fast.ops._operator import AutogradFunction, Compiled, Kernel, Operator, Python, once_differentiable
from yolov9_fast.ops._supports import not_for_triton, not_on
from yolov9_fast.ops._sync_statistics import means_of, synchronised


def rep_bn_silu(
    x1: Tensor,
    norm1: Norm,
    x2: Tensor,
    norm2: Norm,
    *,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    activation: bool = True,
    group: Any = None,
) -> Tensor:
    """`silu(F.batch_norm(x1, ...) + F.batch_norm(x2, ...)) + residual` [N, C, H, W]; differentiable once.

    x1 and x2 have one shape, dtype and device; `norm1`, `norm2` are `Norm(weight, bias, running_mean, running_var)`,
    each [C] or None; momentum and eps serve both. All else as in `bn_silu`. Raises `ValueError` or `TypeError` that
    names the argument.
    """
    check_map("x1", x1)
    check_map("x2", x2)
    check_like("x2", x2, x1.shape, x1.device)
    if x1.dtype != x2.dtype:
        raise TypeError(f"x2: expected {x1.dtype} as x1, got {x2.dtype}")
    for number, norm in (("1", norm1), ("2", norm2)):
        check_vectors(x1, bn.VECTORS, norm, f"norm{number}.")
        bn.check_statistics(x1, training, norm[2], norm[3], group is None)
    if residual is not None:
        check_like("residual", residual, x1.shape, x1.device)
        residual = residual if residual.dtype == x1.dtype else residual.to(x1.dtype)
    if out is not None:
        check_out("out", out, x1.shape, x1)
    z: Tensor = OPERATOR(x1, norm1, x2, norm2, training, momentum, eps, residual, out, activation, group)
    return z


def rep_bn_silu_reference(
    x1: Tensor,
    norm1: Norm,
    x2: Tensor,
    norm2: Norm,
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
        args = (x1, norm1, x2, norm2, training, momentum, eps, residual, out, activation, group)
        return _run(OPERATOR.references, *args)
    y = sum(bn.batch_norm_reference(x, *norm, training, momentum, eps) for x, norm in ((x1, norm1), (x2, norm2)))
    assert isinstance(y, Tensor)
    z = F.silu(y) if activation else y
    return placed(z if residual is None else z + residual, out)


# ---- kernels


def _branches(given: tuple[Any, ...]) -> list[Branch]:
    return [Branch(*given[:5]), Branch(*given[5:10])]


def _forward(
    x1: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    running_mean1: Tensor | None,
    running_var1: Tensor | None,
    x2: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    running_mean2: Tensor | None,
    running_var2: Tensor | None,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    out: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first = bn.normalise(x1, running_mean1, running_var1, momentum, eps)
    second = bn.normalise(x2, running_mean2, running_var2, momentum, eps)
    branches = [Branch(x1, weight1, bias1, *first), Branch(x2, weight2, bias2, *second)]
    bn.apply_reference(branches, residual, out, silu)
    return (*first, *second)


def _backward(dz: Tensor, *given: Any) -> tuple[Tensor, ...]:
    branches, x, silu = _branches(given), given[0], given[10]
    sums = bn.sums_reference(dz, branches, silu)
    means = sums / max(x.numel() // max(x.shape[1], 1), 1)
    dx1, dx2 = bn.input_gradients_reference(dz, branches, means.unbind(), silu)
    return dx1, dx2, sums[1].clone(), sums[0].clone(), sums[2].clone(), sums[0].clone()


def _apply(*given: Any) -> None:
    bn.apply_reference(_branches(given), *given[10:])


def _backward_sums(dz: Tensor, *given: Any) -> Tensor:
    return bn.sums_reference(dz, _branches(given), given[10])


def _backward_apply(dz: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    dx1, dx2 = bn.input_gradients_reference(dz, _branches(given), given[10:13], given[13])
    return dx1, dx2


def _numbered(text: str) -> str:
    """The arguments of both inputs, from those of one."""
    return ", ".join(text.replace("@", number) for number in "12")


_GIVEN = _numbered("Tensor x@, Tensor? weight@, Tensor? bias@, Tensor mean@, Tensor rstd@")


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
        "rep_bn_silu_forward(Tensor x1, Tensor? weight1, Tensor? bias1, Tensor(a!)? running_mean1, Tensor(b!)? "
        "running_var1, Tensor x2, Tensor? weight2, Tensor? bias2, Tensor(c!)? running_mean2, Tensor(d!)? running_var2, "
        "float momentum, float eps, Tensor? residual, Tensor(e!) out, bool silu) "
        "-> (Tensor mean1, Tensor rstd1, Tensor mean2, Tensor rstd2)",
        _forward,
        lambda x1, *others: tuple(bn.empty_vector(x1) for _ in range(4)),
    ),
    backward=Kernel(
        f"rep_bn_silu_backward(Tensor dz, {_GIVEN}, bool silu) -> (Tensor dx1, Tensor dx2, Tensor dweight1, "
        "Tensor dbias1, Tensor dweight2, Tensor dbias2)",
        _backward,
        lambda dz, x1, *others: (empty_map(x1), empty_map(x1), *(bn.empty_vector(x1) for _ in range(4))),
    ),
    stats=_bn_silu.KERNELS.stats,
    combine=_bn_silu.KERNELS.combine,
    apply=Kernel(
        f"rep_bn_silu_apply({_GIVEN}, Tensor? residual, Tensor(a!) out, bool silu) -> ()",
        _apply,
        lambda *others: None,
    ),
    backward_sums=Kernel(
        f"rep_bn_silu_backward_sums(Tensor dz, {_GIVEN}, bool silu) -> Tensor",
        _backward_sums,
        lambda dz, x1, *others: x1.new_empty((3, x1.shape[1]), dtype=bn.computed_in(x1.dtype)),
    ),
    backward_apply=Kernel(
        f"rep_bn_silu_backward_apply(Tensor dz, {_GIVEN}, Tensor mean_dy, Tensor mean_dy_xhat1, Tensor mean_dy_xhat2, "
        "bool silu) -> (Tensor dx1, Tensor dx2)",
        _backward_apply,
        lambda dz, x1, *others: (empty_map(x1), empty_map(x1)),
    ),
)


# ---- gradient


class _OfBatch(AutogradFunction):
    """Statistics of this batch."""

    @staticmethod
    def forward(
        ctx: Any,
        x1: Tensor,
        weight1: Tensor | None,
        bias1: Tensor | None,
        x2: Tensor,
        weight2: Tensor | None,
        bias2: Tensor | None,
        residual: Tensor | None,
        running: tuple[Tensor | None, ...],
        momentum: float,
        eps: float,
        out: Tensor | None,
        silu: bool,
        kernels: _Kernels,
    ) -> Tensor:
        target = empty_map(x1) if out is None else out
        mean1, rstd1, mean2, rstd2 = kernels.forward(
            x1, weight1, bias1, *running[:2], x2, weight2, bias2, *running[2:], momentum, eps, residual, target, silu
        )
        ctx.save_for_backward(x1, weight1, bias1, mean1, rstd1, x2, weight2, bias2, mean2, rstd2)
        ctx.silu, ctx.kernels = silu, kernels
        return target if out is None else returned(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        dx1, dx2, dweight1, dbias1, dweight2, dbias2 = ctx.kernels.backward(dz, *ctx.saved_tensors, ctx.silu)
        gradients = (dx1, dweight1, dbias1, dx2, dweight2, dbias2, dz)
        return (*_needed(ctx, gradients), None, None, None, None, None, None)


class _Given(AutogradFunction):
    """Statistics given: running ones (total and group None), or those of all processes, through which dx flows too."""

    @staticmethod
    def forward(
        ctx: Any,
        x1: Tensor,
        weight1: Tensor | None,
        bias1: Tensor | None,
        x2: Tensor,
        weight2: Tensor | None,
        bias2: Tensor | None,
        residual: Tensor | None,
        mean1: Tensor,
        rstd1: Tensor,
        mean2: Tensor,
        rstd2: Tensor,
        total: Tensor | None,
        group: Any,
        out: Tensor | None,
        silu: bool,
        kernels: _Kernels,
    ) -> Tensor:
        target = empty_map(x1) if out is None else out
        given = (x1, weight1, bias1, mean1, rstd1, x2, weight2, bias2, mean2, rstd2)
        kernels.apply(*given, residual, target, silu)
        ctx.save_for_backward(*given, total)
        ctx.silu, ctx.kernels, ctx.group = silu, kernels, group
        return target if out is None else returned(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        *given, total = ctx.saved_tensors
        sums = ctx.kernels.backward_sums(dz, *given, ctx.silu)
        means = means_of(sums, total, ctx.group)
        dx1, dx2 = ctx.kernels.backward_apply(dz, *given, means[0], means[1], means[2], ctx.silu)
        # Each bias owns its gradient: autograd keeps what it is given, and later adds to it in place.
        gradients = (dx1, sums[1], sums[0], dx2, sums[2], sums[0].clone(), dz)
        return (*_needed(ctx, gradients), *(None,) * 9)


def _needed(ctx: Any, gradients: tuple[Tensor, ...]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad, strict=False)]


def _run(
    kernels: _Kernels,
    x1: Tensor,
    norm1: Norm,
    x2: Tensor,
    norm2: Norm,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    out: Tensor | None,
    activation: bool,
    group: Any,
) -> Tensor:
    dtype = x1.dtype
    first = (x1, bn.parameter(norm1[0], dtype), bn.parameter(norm1[1], dtype))
    second = (x2, bn.parameter(norm2[0], dtype), bn.parameter(norm2[1], dtype))
    if training and group is None:
        running = (norm1[2], norm1[3], norm2[2], norm2[3])
        z: Tensor = _OfBatch.apply(*first, *second, residual, running, momentum, eps, out, activation, kernels)
        return z
    total, statistics = None, []
    for x, norm in ((x1, norm1), (x2, norm2)):
        if training:
            mean, rstd, total = synchronised(kernels, x, norm[2:], momentum, eps, group)
        else:
            assert norm[2] is not None
            assert norm[3] is not None
            mean, rstd = norm[2], (norm[3] + eps).rsqrt()
        statistics += [mean, rstd]
    z = _Given.apply(*first, *second, residual, *statistics, total, group, out, activation, kernels)
    return z


# ---- backends


def _supports_cpu(x1: Tensor, norm1: Norm, x2: Tensor, norm2: Norm, *rest: Any) -> str | None:
    return (None if x1.is_cpu else not_on("cpu", x1)) or _not_for_kernels(x1, norm1, norm2)


def _supports_triton(x1: Tensor, norm1: Norm, x2: Tensor, norm2: Norm, *rest: Any) -> str | None:
    return not_for_triton("rep_bn_silu", x1) or bn.unreadable(rest[4]) or _not_for_kernels(x1, norm1, norm2)


def _not_for_kernels(x: Tensor, norm1: Norm, norm2: Norm) -> str | None:
    return bn.not_for_kernels(x, *norm1[2:], *norm2[2:])


def _triton() -> _Kernels:
    from yolov9_fast.kernels.batch_norm import bn_stats
    from yolov9_fast.kernels.rep_bn_silu import (
        rep_bn_silu_apply,
        rep_bn_silu_backward,
        rep_bn_silu_backward_apply,
        rep_bn_silu_backward_sums,
        rep_bn_silu_forward,
    )
    from yolov9_fast.kernels.sync_statistics import bn_combine

    return _Kernels(
        rep_bn_silu_forward,
        rep_bn_silu_backward,
        bn_stats,
        bn_combine,
        rep_bn_silu_apply,
        rep_bn_silu_backward_sums,
        rep_bn_silu_backward_apply,
    )


OPERATOR = Operator(
    "rep_bn_silu",
    "RepConv in training: the sum of two BatchNorms, SiLU and residual in one pass",
    reference=rep_bn_silu_reference,
    kernels=KERNELS,
    run=_run,
    backends={"cpu": Compiled(_supports_cpu), "triton": Python(_triton, _supports_triton)},
)
