"""The end of a training step in one pass over flat buffers: clipping, decay, optimiser, average, zeroed gradients.

    g ← factor · g                                factor: the loss scale's inverse times the clipping coefficient
    SGD (Nesterov):  g ← g + λ p;  m ← μ m + g;   p ← p − η (g + μ m)
    Adam:            g ← g + λ p;  m ← lerp(m, g, 1 − β₁);  v ← β₂ v + (1 − β₂) g²;  p ← p − η m̂ / (√v̂ + ε)
    AdamW:           p ← p (1 − η λ), then as Adam without λ
    average:         e ← lerp(e, p, w)
    afterwards       g ← 0

A NaN as factor skips the update: only the gradients are zeroed. All numbers come from a tensor on the device, so that a
recorded CUDA graph reads those of the present step. Formulas: torch.optim.SGD, Adam and AdamW. The CPU's kernels give
their results on a CPU bit for bit; Adam's square root, correctly rounded here, may differ in the last one from MKL's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from yolov9_fast.ops._checks import check_like, check_writable, described
from yolov9_fast.ops._operator import Compiled, Kernel, Operator, Python
from yolov9_fast.ops._supports import not_for_triton, not_on

_SGD, _ADAM = (3, 2), (5, 3)
"""How many numbers all groups share, and how many each has."""
_MOST_GROUPS = 4
"""Of the Triton kernels (`kernels/flat_update.py`)."""


def sgd_update(
    parameters: Tensor,
    gradients: Tensor,
    momenta: Tensor,
    averages: Tensor,
    numbers: Tensor,
    ends: Sequence[int],
    *,
    nesterov: bool = True,
) -> None:
    """A step of SGD with momentum on flat buffers, all written in place.

    Args:
        parameters, gradients, momenta, averages: float32 [N], contiguous, without overlap. Momenta begin as zeros.
        numbers: float32 [3 + 2·G] on the same device: factor of the gradients (NaN: skip the update), weight of the
            parameters in the average, momentum; then learning rate and weight decay of each group.
        ends: where each of the G groups ends; the last is N.
        nesterov: momentum as Nesterov's.

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or device, or that cannot be written to; ends that do
            not ascend to N.
    """
    _check((parameters, gradients, momenta, averages), ("parameters", "gradients", "momenta", "averages"))
    _check_numbers(numbers, ends, parameters, *_SGD)
    SGD(parameters, gradients, momenta, averages, numbers, list(ends), nesterov)


def adam_update(
    parameters: Tensor,
    gradients: Tensor,
    first: Tensor,
    second: Tensor,
    averages: Tensor,
    numbers: Tensor,
    ends: Sequence[int],
    *,
    epsilon: float = 1e-8,
    decoupled: bool = True,
) -> None:
    """A step of AdamW (`decoupled`) or Adam on flat buffers, all written in place.

    Args:
        parameters, gradients, averages: as of `sgd_update`; first, second: the moments, the same, from zeros.
        numbers: float32 [5 + 3·G]: factor of the gradients (NaN: skip), weight of the parameters in the average,
            1 − β₁, β₂, 1 − β₂; then for each group its step size η / (1 − β₁ᵗ), its decay (Adam: λ; AdamW: what the
            weights are multiplied by, 1 − η λ), and √(1 − β₂ᵗ).
        ends: as of `sgd_update`.
        epsilon: ε, added to √v̂.

    Raises:
        TypeError, ValueError: as `sgd_update`.
    """
    _check((parameters, gradients, first, second, averages), ("parameters", "gradients", "first", "second", "averages"))
    _check_numbers(numbers, ends, parameters, *_ADAM)
    ADAM(parameters, gradients, first, second, averages, numbers, list(ends), epsilon, decoupled)


def _check(tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    for name, tensor in zip(names, tensors, strict=True):
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32:
            raise TypeError(f"{name}: expected a tensor of float32, got {described(tensor)}")
        if tensor.ndim != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected a contiguous tensor [N], got {list(tensor.shape)}, {list(tensor.stride())}"
            )
        check_like(name, tensor, tensors[0].shape, tensors[0].device)
        check_writable(name, tensor)


def _check_numbers(numbers: Tensor, ends: Sequence[int], parameters: Tensor, shared: int, each: int) -> None:
    if not isinstance(numbers, Tensor) or numbers.dtype != torch.float32:
        raise TypeError(f"numbers: expected a tensor of float32, got {described(numbers)}")
    if not isinstance(ends, list | tuple) or not all(type(end) is int for end in ends):
        raise TypeError(f"ends: expected a list of integers, got {described(ends)}")
    if not ends or list(ends) != sorted(ends) or ends[0] < 0 or ends[-1] != len(parameters):
        raise ValueError(f"ends: expected ascending ends of groups up to {len(parameters)}, got {list(ends)}")
    check_like("numbers", numbers, [shared + each * len(ends)], parameters.device)
    if not numbers.is_contiguous():
        raise ValueError(f"numbers: expected a contiguous tensor, got strides {list(numbers.stride())}")


# ---- references


def _groups(ends: Sequence[int], numbers: Tensor, shared: int, each: int) -> list[tuple[slice, Tensor]]:
    starts = [0, *ends[:-1]]
    rows = numbers[shared:].view(len(ends), each)
    return [(slice(start, end), row) for start, end, row in zip(starts, ends, rows, strict=True)]


def _finish(parameters: Tensor, averages: Tensor, gradients: Tensor, numbers: Tensor, before: list[Tensor]) -> None:
    """Average and zeros; if the factor is NaN, everything written is as it was `before`."""
    averages.lerp_(parameters, numbers[1])
    gradients.zero_()
    written, kept = before[::2], before[1::2]
    for tensor, old in zip(written, kept, strict=True):
        torch.where(numbers[0].isnan(), old, tensor, out=tensor)


@torch.no_grad()
def sgd_update_reference(
    parameters: Tensor,
    gradients: Tensor,
    momenta: Tensor,
    averages: Tensor,
    numbers: Tensor,
    ends: list[int],
    nesterov: bool,
) -> None:
    """The definition, in eager PyTorch; does not wait for the device."""
    before = [t for tensor in (parameters, momenta, averages) for t in (tensor, tensor.clone())]
    factor, _, momentum = numbers[:3]
    gradients *= factor
    for part, (rate, decay) in _groups(ends, numbers, *_SGD):
        g, p, m = gradients[part], parameters[part], momenta[part]
        torch.addcmul(g, p, decay, out=g)
        m.mul_(momentum).add_(g)
        step = torch.addcmul(g, m, momentum) if nesterov else m
        p.addcmul_(step, -rate)
    _finish(parameters, averages, gradients, numbers, before)


@torch.no_grad()
def adam_update_reference(
    parameters: Tensor,
    gradients: Tensor,
    first: Tensor,
    second: Tensor,
    averages: Tensor,
    numbers: Tensor,
    ends: list[int],
    epsilon: float,
    decoupled: bool,
) -> None:
    """The definition, in eager PyTorch; does not wait for the device."""
    before = [t for tensor in (parameters, first, second, averages) for t in (tensor, tensor.clone())]
    factor, _, weight1, beta2, weight2 = numbers[:5]
    gradients *= factor
    for part, (size, decay, root) in _groups(ends, numbers, *_ADAM):
        g, p, m, v = gradients[part], parameters[part], first[part], second[part]
        if decoupled:
            p *= decay
        else:
            torch.addcmul(g, p, decay, out=g)
        m.lerp_(g, weight1)
        v.mul_(beta2).addcmul_(g * weight2, g)
        p -= size * (m / (v.sqrt() / root + epsilon))
    _finish(parameters, averages, gradients, numbers, before)


# ---- kernels


def _no_result(*args: Any) -> None:
    """Fake of a kernel that returns nothing."""


class _Kernels(NamedTuple):
    update: Callable[..., None]


_BUFFERS = "Tensor(a!) parameters, Tensor(b!) gradients"
SGD_KERNELS = _Kernels(
    Kernel(
        f"sgd_update({_BUFFERS}, Tensor(c!) momenta, Tensor(d!) averages, Tensor numbers, int[] ends, "
        "bool nesterov) -> ()",
        sgd_update_reference,
        _no_result,
    )
)
ADAM_KERNELS = _Kernels(
    Kernel(
        f"adam_update({_BUFFERS}, Tensor(c!) first, Tensor(d!) second, Tensor(e!) averages, Tensor numbers, "
        "int[] ends, float epsilon, bool decoupled) -> ()",
        adam_update_reference,
        _no_result,
    )
)


# ---- backends


def _supports_cpu(parameters: Tensor, *args: Any) -> str | None:
    return not_on("cpu", parameters)


def _not_for_triton(op: str, parameters: Tensor, ends: Sequence[int]) -> str | None:
    if len(ends) > _MOST_GROUPS:
        return f"it takes at most {_MOST_GROUPS} groups, got {len(ends)}"
    return not_for_triton(op, parameters)


def _triton_sgd() -> _Kernels:
    from yolov9_fast.kernels.flat_update import sgd_update

    return _Kernels(sgd_update)


def _triton_adam() -> _Kernels:
    from yolov9_fast.kernels.flat_update import adam_update

    return _Kernels(adam_update)


SGD = Operator(
    "sgd_update",
    "clipping, SGD, moving average and zeroed gradients of all weights in one pass",
    reference=sgd_update_reference,
    kernels=SGD_KERNELS,
    backends={
        "cpu": Compiled(_supports_cpu),
        "triton": Python(_triton_sgd, lambda *args: _not_for_triton("sgd_update", args[0], args[5])),
    },
)
ADAM = Operator(
    "adam_update",
    "clipping, Adam or AdamW, moving average and zeroed gradients of all weights in one pass",
    reference=adam_update_reference,
    kernels=ADAM_KERNELS,
    backends={
        "cpu": Compiled(_supports_cpu),
        "triton": Python(_triton_adam, lambda *args: _not_for_triton("adam_update", args[0], args[6])),
    },
)
