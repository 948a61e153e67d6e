"""RepConv in training: out = silu(BN1(x1) + BN2(x2)) (+ residual) in one pass over both, and its gradients.

Passes over a tensor: forward 5 (statistics read x1, x2; apply reads both, writes out), backward 8 (sums read dz, x1,
x2; dx reads them again, writes dx1, dx2). Where a program holds all pixels of its channels in registers: 3 and 5. The
kernels are those of `bn_silu` with a second input.
"""

from torch import Tensor
from yolov9_fast.kernels import bn_silu
from yolov9_fast.kernels.replay import replayed


@replayed()
def rep_bn_silu_forward(
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
    """Training: both batch and running statistics, and `out`; returns mean1, rstd1, mean2, rstd2, float32 [C]."""
    one = (x1, weight1, bias1, running_mean1, running_var1)
    two = (x2, weight2, bias2, running_mean2, running_var2)
    mean1, rstd1, mean2, rstd2 = bn_silu.forward([one, two], momentum, eps, residual, out, silu)
    return mean1, rstd1, mean2, rstd2


@replayed()
def rep_bn_silu_apply(
    x1: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    mean1: Tensor,
    rstd1: Tensor,
    x2: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    mean2: Tensor,
    rstd2: Tensor,
    residual: Tensor | None,
    out: Tensor,
    silu: bool,
) -> None:
    """`out`, which may be x1 or x2 itself, from given statistics."""
    one, two = (x1, weight1, bias1, mean1, rstd1), (x2, weight2, bias2, mean2, rstd2)
    bn_silu.apply([one, two], residual, out, silu)


@replayed()
def rep_bn_silu_backward(
    dz: Tensor,
    x1: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    mean1: Tensor,
    rstd1: Tensor,
    x2: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    mean2: Tensor,
    rstd2: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx1, dx2, dweight1, dbias1, dweight2, dbias2 through the batch statistics; dbias1 equals dbias2."""
    one, two = (x1, weight1, bias1, mean1, rstd1), (x2, weight2, bias2, mean2, rstd2)
    (dx1, dx2), (dbias, dweight1, dweight2) = bn_silu.backward(dz, [one, two], silu)
    return dx1, dx2, dweight1, dbias, dweight2, dbias.clone()


@replayed()
def rep_bn_silu_backward_sums(
    dz: Tensor,
    x1: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    mean1: Tensor,
    rstd1: Tensor,
    x2: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    mean2: Tensor,
    rstd2: Tensor,
    silu: bool,
) -> Tensor:
    """Σ dy, Σ dy·x̂1 and Σ dy·x̂2 over all pixels: float32 [3, C]."""
    one, two = (x1, weight1, bias1, mean1, rstd1), (x2, weight2, bias2, mean2, rstd2)
    return bn_silu.backward_sums(dz, [one, two], silu)


@replayed()
def rep_bn_silu_backward_apply(
    dz: Tensor,
    x1: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    mean1: Tensor,
    rstd1: Tensor,
    x2: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    mean2: Tensor,
    rstd2: Tensor,
    mean_dy: Tensor,
    mean_dy_xhat1: Tensor,
    mean_dy_xhat2: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """dx1 and dx2 from given means of dy, dy·x̂1 and dy·x̂2 (zeros where the statistics are constants)."""
    one, two = (x1, weight1, bias1, mean1, rstd1), (x2, weight2, bias2, mean2, rstd2)
    dx1, dx2 = bn_silu.backward_apply(dz, [one, two], (mean_dy, mean_dy_xhat1, mean_dy_xhat2), silu)
    return dx1, dx2
