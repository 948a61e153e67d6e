"""Inputs, a float64 truth and the error rule for the tests of bn_silu and rep_bn_silu."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import yolov9_fast as yf
from yolov9_fast.ops import Norm

MOMENTUM, EPS = 0.03, 1e-3
LAYOUTS = ("channels_last", "contiguous", "rows_slice", "planes_slice", "strided")


def laid_out(values: Tensor, layout: str) -> Tensor:
    """`values` in memory as named: dense, a channel slice of a wider map full of NaN, or in no layout at all."""
    n, c, h, w = values.shape
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "contiguous":
        return values.contiguous()
    if layout == "strided":
        wide = values.new_full((n, c, h, 2 * w), float("nan"))[..., ::2]
        return wide.copy_(values)
    wide = values.new_full((n, c + 7, h, w), float("nan"))
    if layout == "rows_slice":
        wide = wide.contiguous(memory_format=torch.channels_last)
    return wide[:, 3 : 3 + c].copy_(values)


@dataclass
class Case:
    """What one call takes; `inputs` holds one map for bn_silu, two for rep_bn_silu."""

    inputs: list[Tensor]
    norms: list[Norm]
    dz: Tensor
    residual: Tensor | None = None
    training: bool = True
    activation: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Case:
        def convert(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(dtype)

        norms = [Norm(*map(convert, norm)) for norm in self.norms]
        inputs = [x.to(dtype) for x in self.inputs]
        return Case(inputs, norms, self.dz.to(dtype), convert(self.residual), self.training, self.activation)


def make_case(
    branches: int,
    shape: tuple[int, int, int, int] = (2, 5, 4, 3),
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
    residual: bool = False,
    training: bool = True,
    activation: bool = True,
    affine: bool = True,
    running: bool = True,
    mean: float = 0.5,
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    g = torch.Generator().manual_seed(seed)
    vectors = torch.float64 if dtype == torch.float64 else torch.float32

    def image(shift: float = 0.0) -> Tensor:
        return laid_out((torch.randn(shape, generator=g, dtype=torch.float64) + shift).to(device, dtype), layout)

    def vector(low: float) -> Tensor:
        return (low + torch.rand(shape[1], generator=g, dtype=torch.float64)).to(device, vectors)

    norms = [
        Norm(
            vector(0.5) if affine else None,
            vector(-0.5) if affine else None,
            vector(0.0) if running else None,
            vector(0.5) if running else None,
        )
        for _ in range(branches)
    ]
    inputs = [image(mean) for _ in range(branches)]
    return Case(inputs, norms, image(), image() if residual else None, training, activation)


def call(inputs: list[Tensor], norms: list[Norm], **options: Any) -> Tensor:
    if len(inputs) == 1:
        return yf.ops.bn_silu(inputs[0], *norms[0], **options)
    return yf.ops.rep_bn_silu(inputs[0], norms[0], inputs[1], norms[1], **options)


def truth(case: Case) -> dict[str, Tensor]:
    """Everything in float64, from the mathematics by autograd alone, apart from the package."""
    case = case.to(torch.float64)
    leaves: dict[str, Tensor] = {}
    y = torch.zeros_like(case.dz)
    results = {}
    for number, (x, norm) in enumerate(zip(case.inputs, case.norms, strict=True)):
        x = leaves[f"dx{number}"] = x.detach().clone().requires_grad_()
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        if case.training and norm.running_mean is not None and norm.running_var is not None:
            count = x.numel() // x.shape[1]
            unbiased = variance.detach() * count / (count - 1)
            results[f"running_mean{number}"] = (1 - MOMENTUM) * norm.running_mean + MOMENTUM * mean.detach()
            results[f"running_var{number}"] = (1 - MOMENTUM) * norm.running_var + MOMENTUM * unbiased
        if not case.training:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            mean, variance = norm.running_mean, norm.running_var
        term = (x - mean.view(1, -1, 1, 1)) / (variance.view(1, -1, 1, 1) + EPS).sqrt()
        if norm.weight is not None and norm.bias is not None:
            weight = leaves[f"dweight{number}"] = norm.weight.clone().requires_grad_()
            bias = leaves[f"dbias{number}"] = norm.bias.clone().requires_grad_()
            term = term * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
        y = y + term
    z = y / (1 + (-y).exp()) if case.activation else y
    if case.residual is not None:
        leaves["dresidual"] = case.residual.detach().clone().requires_grad_()
        z = z + leaves["dresidual"]
    gradients = torch.autograd.grad(z, list(leaves.values()), case.dz)
    return results | {"z": z.detach()} | dict(zip(leaves, gradients, strict=True))


def run(case: Case, backend: str, out: Tensor | None = None) -> dict[str, Tensor]:
    """The same names as `truth`, by the public operator on one backend."""
    leaves: dict[str, Tensor] = {}
    norms, inputs = [], []
    for number, (x, norm) in enumerate(zip(case.inputs, case.norms, strict=True)):
        inputs.append(x.detach().requires_grad_())
        leaves[f"dx{number}"] = inputs[-1]
        weight = bias = None
        if norm.weight is not None and norm.bias is not None:
            weight = leaves[f"dweight{number}"] = norm.weight.clone().requires_grad_()
            bias = leaves[f"dbias{number}"] = norm.bias.clone().requires_grad_()
        running = [None if vector is None else vector.clone() for vector in norm[2:]]
        norms.append(Norm(weight, bias, *running))
    residual = None
    if case.residual is not None:
        residual = leaves["dresidual"] = case.residual.detach().requires_grad_()
    with yf.backend(backend):
        z = call(
            inputs,
            norms,
            training=case.training,
            momentum=MOMENTUM,
            eps=EPS,
            residual=residual,
            out=out,
            activation=case.activation,
        )
        gradients = torch.autograd.grad(z, list(leaves.values()), case.dz)
    results = {"z": z.detach()} | dict(zip(leaves, gradients, strict=True))
    for number, norm in enumerate(norms):
        if case.training and norm.running_mean is not None and norm.running_var is not None:
            results |= {f"running_mean{number}": norm.running_mean, f"running_var{number}": norm.running_var}
    return results


def error(result: Tensor, true: Tensor, least_scale: float = 1e-30) -> float:
    """Root mean square, relative to the truth's or to `least_scale`, the greater."""
    if true.numel() == 0:
        return 0.0
    return float((result.double() - true).square().mean().sqrt() / true.square().mean().sqrt().clamp_min(least_scale))


FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float64: 1e-13}
"""A few roundings of the type itself: below it, that eager's own error is luckily small proves nothing."""


def assert_no_worse_than_eager(case: Case, backend: str, out: Tensor | None = None) -> None:
    true, eager, ours = truth(case), run(case, "eager"), run(case, backend, out)
    assert ours.keys() == true.keys()
    # Sums whose terms cancel keep the rounding errors of the terms.
    gradient = float(case.dz.double().square().mean().sqrt())
    of_sums = gradient * (case.dz.numel() / case.dz.shape[1]) ** 0.5
    for name, expected in true.items():
        dtype = case.dz.dtype if ours[name].dtype == case.dz.dtype else torch.float32
        scale = of_sums if name[:3] in ("dwe", "dbi") else gradient if name[0] == "d" else 1e-30
        errors = [error(result[name], expected, scale) for result in (ours, eager)]
        assert ours[name].dtype == eager[name].dtype, name
        assert errors[0] <= max(2 * errors[1], FLOOR[dtype]), (name, *errors)
