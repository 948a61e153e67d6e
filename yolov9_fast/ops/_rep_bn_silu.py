"""RepConv in training in one pass: silu(BN1(x1) + BN2(x2)) + residual; formulas in `ops/_batch_norm.py`.

Eager PyTorch moves 26 tensors through memory for forward and backward, the kernels 13; they save both inputs and two
vectors each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov9_fast.ops import _batch_norm as bn
from yolov9_fast.ops import _library as library
from yolov9_fast.ops._backend import Implementation, Operator, not_on, register, select
from yolov9_fast.ops._batch_norm import Branch, Norm, Raw
from yolov9_fast.ops._bn_silu import STATS
from yolov9_fast.ops._interpreted import runs_triton, triton_missing


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
    bn.check_map("rep_bn_silu", "x1", x1)
    bn.check_map("rep_bn_silu", "x2", x2)
    bn.check_like("rep_bn_silu", "x2", x2, x1)
    if x1.dtype != x2.dtype:
        raise TypeError(f"rep_bn_silu: x2 must have the dtype of x1, {x1.dtype}, got {x2.dtype}")
    for number, norm in (("1", norm1), ("2", norm2)):
        for name, vector in zip(Norm._fields, norm, strict=True):
            bn.check_vector("rep_bn_silu", name + number, vector, x1)
        bn.check_statistics("rep_bn_silu", x1, training, norm[2], norm[3], group is None)
    if residual is not None:
        bn.check_like("rep_bn_silu", "residual", residual, x1)
        residual = residual if residual.dtype == x1.dtype else residual.to(x1.dtype)
    if out is not None:
        bn.check_out("rep_bn_silu", out, x1)
    run = select(OPERATOR, x1, norm1, norm2)
    return run(x1, norm1, x2, norm2, training, momentum, eps, residual, out, activation, group)  # type: ignore[no-any-return]


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
        return _run(_REFERENCE, x1, norm1, x2, norm2, training, momentum, eps, residual, out, activation, group)
    y = sum(
        F.batch_norm(x, norm[2], norm[3], norm[0], norm[1], training, momentum, eps)
        for x, norm in ((x1, norm1), (x2, norm2))
    )
    assert isinstance(y, Tensor)
    z = F.silu(y) if activation else y
    return bn.into(out, z if residual is None else z + residual)


# ---- raw operators


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
_forward_ops = bn.define(
    "rep_bn_silu_forward(Tensor x1, Tensor? weight1, Tensor? bias1, Tensor(a!)? running_mean1, Tensor(b!)? "
    "running_var1, Tensor x2, Tensor? weight2, Tensor? bias2, Tensor(c!)? running_mean2, Tensor(d!)? running_var2, "
    "float momentum, float eps, Tensor? residual, Tensor(e!) out, bool silu) "
    "-> (Tensor mean1, Tensor rstd1, Tensor mean2, Tensor rstd2)",
    lambda x1, *others: tuple(bn.fake_vector(x1) for _ in range(4)),
    _forward,
    "rep_bn_silu",
)
_backward_ops = bn.define(
    f"rep_bn_silu_backward(Tensor dz, {_GIVEN}, bool silu) -> (Tensor dx1, Tensor dx2, Tensor dweight1, Tensor dbias1, "
    "Tensor dweight2, Tensor dbias2)",
    lambda dz, x1, *others: (bn.empty_dense(x1), bn.empty_dense(x1), *(bn.fake_vector(x1) for _ in range(4))),
    _backward,
    "rep_bn_silu",
)
_apply_ops = bn.define(
    f"rep_bn_silu_apply({_GIVEN}, Tensor? residual, Tensor(a!) out, bool silu) -> ()",
    lambda *others: None,
    _apply,
    "rep_bn_silu",
)
_sums_ops = bn.define(
    f"rep_bn_silu_backward_sums(Tensor dz, {_GIVEN}, bool silu) -> Tensor",
    lambda dz, x1, *others: x1.new_empty((3, x1.shape[1]), dtype=bn.computed_in(x1.dtype)),
    _backward_sums,
    "rep_bn_silu",
)
_input_ops = bn.define(
    f"rep_bn_silu_backward_apply(Tensor dz, {_GIVEN}, Tensor mean_dy, Tensor mean_dy_xhat1, Tensor mean_dy_xhat2, "
    "bool silu) -> (Tensor dx1, Tensor dx2)",
    lambda dz, x1, *others: (bn.empty_dense(x1), bn.empty_dense(x1)),
    _backward_apply,
    "rep_bn_silu",
)
_COMPILED, _TRITON = (
    Raw(*ops) for ops in zip(_forward_ops, _backward_ops, STATS, _apply_ops, _sums_ops, _input_ops, strict=True)
)
_REFERENCE = Raw(_forward, _backward, bn.statistics, _apply, _backward_sums, _backward_apply)


# ---- autograd


class _OfBatch(torch.autograd.Function):
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
        raw: Raw,
    ) -> Tensor:
        target = bn.empty_output(x1) if out is None else out
        mean1, rstd1, mean2, rstd2 = raw.forward(
            x1, weight1, bias1, *running[:2], x2, weight2, bias2, *running[2:], momentum, eps, residual, target, silu
        )
        ctx.save_for_backward(x1, weight1, bias1, mean1, rstd1, x2, weight2, bias2, mean2, rstd2)
        ctx.silu, ctx.raw = silu, raw
        return target if out is None else bn.returned(out)

    @staticmethod
    @bn.once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        dx1, dx2, dweight1, dbias1, dweight2, dbias2 = ctx.raw.backward(dz, *ctx.saved_tensors, ctx.silu)
        gradients = (dx1, dweight1, dbias1, dx2, dweight2, dbias2, dz)
        return (*_needed(ctx, gradients), None, None, None, None, None, None)


class _Given(torch.autograd.Function):
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
        raw: Raw,
    ) -> Tensor:
        target = bn.empty_output(x1) if out is None else out
        given = (x1, weight1, bias1, mean1, rstd1, x2, weight2, bias2, mean2, rstd2)
        raw.apply(*given, residual, target, silu)
        ctx.save_for_backward(*given, total)
        ctx.silu, ctx.raw, ctx.group = silu, raw, group
        return target if out is None else bn.returned(out)

    @staticmethod
    @bn.once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        *given, total = ctx.saved_tensors
        sums = ctx.raw.backward_sums(dz, *given, ctx.silu)
        means = bn.means_of(sums, total, ctx.group)
        dx1, dx2 = ctx.raw.backward_apply(dz, *given, means[0], means[1], means[2], ctx.silu)
        # Each bias owns its gradient: autograd keeps what it is given, and later adds to it in place.
        gradients = (dx1, sums[1], sums[0], dx2, sums[2], sums[0].clone(), dz)
        return (*_needed(ctx, gradients), *(None,) * 9)


def _needed(ctx: Any, gradients: tuple[Tensor, ...]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad, strict=False)]


def _run(
    raw: Raw,
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
        return _OfBatch.apply(*first, *second, residual, running, momentum, eps, out, activation, raw)  # type: ignore[no-any-return]
    total, statistics = None, []
    for x, norm in ((x1, norm1), (x2, norm2)):
        if training:
            mean, rstd, total = bn.synchronised(x, raw, norm[2:], momentum, eps, group)
        else:
            assert norm[2] is not None
            assert norm[3] is not None
            mean, rstd = norm[2], (norm[3] + eps).rsqrt()
        statistics += [mean, rstd]
    return _Given.apply(*first, *second, residual, *statistics, total, group, out, activation, raw)  # type: ignore[no-any-return]


def _compiled(*args: Any) -> Tensor:
    return _run(_COMPILED, *args)


def _triton(*args: Any) -> Tensor:
    return _run(_TRITON, *args)


def _why_not_kernel(x: Tensor, norm1: Norm, norm2: Norm) -> str | None:
    return bn.why_not_kernel(x, norm1[2]) or bn.why_not_kernel(x, norm2[2])


OPERATOR = register(
    Operator(
        "rep_bn_silu",
        "RepConv in training: the sum of two BatchNorms, SiLU and residual in one pass",
        {
            "eager": Implementation(rep_bn_silu_reference),
            "cpu": Implementation(
                _compiled,
                library.missing("rep_bn_silu_forward", "cpu"),
                lambda x, norm1, norm2: (None if x.is_cpu else not_on("cpu", x)) or _why_not_kernel(x, norm1, norm2),
            ),
            "triton": Implementation(
                _triton,
                triton_missing(),
                lambda x, norm1, norm2: runs_triton("rep_bn_silu", x) or _why_not_kernel(x, norm1, norm2),
            ),
        },
        # The compiled kernels before interpreted Triton.
        ("cpu", "triton", "eager"),
    )
)
