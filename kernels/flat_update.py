"""The end of a training step in one launch over flat buffers: clipping, decay, optimiser, average, zeroed gradients."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from yolov9_fast.kernels.launch import address, jit, kernel

_BLOCK = 512
MOST_GROUPS = 4


@jit
def lerp(start: tl.tensor, end: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """start + weight (end − start), from the end that is nearer, as torch's."""
    near = tl.abs(weight) < 0.5
    return tl.where(near, start, end) + tl.where(near, weight, weight - 1) * (end - start)


@jit
def group_of(i: tl.tensor, end0: tl.tensor, end1: tl.tensor, end2: tl.tensor) -> tl.tensor:
    """Which group the elements are in."""
    return (i >= end0).to(tl.int32) + (i >= end1).to(tl.int32) + (i >= end2).to(tl.int32)


# Reads 16 bytes per weight and writes 16. Grid: blocks of weights.
@kernel()
def sgd_update_kernel(
    parameters_ptr: tl.tensor,
    gradients_ptr: tl.tensor,
    momenta_ptr: tl.tensor,
    averages_ptr: tl.tensor,
    numbers_ptr: tl.tensor,
    count: tl.tensor,
    end0: tl.tensor,
    end1: tl.tensor,
    end2: tl.tensor,
    NESTEROV: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    count = count * VEC
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    factor = tl.load(numbers_ptr) + tl.zeros((BLOCK,), tl.float32)
    kept = inside & (factor == factor)
    weight = tl.load(numbers_ptr + 1)
    momentum = tl.load(numbers_ptr + 2)
    group = numbers_ptr + 3 + 2 * group_of(i, end0, end1, end2)
    rate = tl.load(group, mask=inside, other=0.0)
    decay = tl.load(group + 1, mask=inside, other=0.0)
    p = tl.load(parameters_ptr + i, mask=kept, other=0.0)
    g = tl.load(gradients_ptr + i, mask=kept, other=0.0) * factor + p * decay
    m = tl.load(momenta_ptr + i, mask=kept, other=0.0) * momentum + g
    step = g + m * momentum if NESTEROV else m
    p -= step * rate
    e = lerp(tl.load(averages_ptr + i, mask=kept, other=0.0), p, weight)
    tl.store(parameters_ptr + i, p, mask=kept)
    tl.store(momenta_ptr + i, m, mask=kept)
    tl.store(averages_ptr + i, e, mask=kept)
    tl.store(gradients_ptr + i, tl.zeros_like(g), mask=inside)


# Reads 20 bytes per weight and writes 20. Grid: blocks of weights.
@kernel()
def adam_update_kernel(
    parameters_ptr: tl.tensor,
    gradients_ptr: tl.tensor,
    first_ptr: tl.tensor,
    second_ptr: tl.tensor,
    averages_ptr: tl.tensor,
    numbers_ptr: tl.tensor,
    count: tl.tensor,
    end0: tl.tensor,
    end1: tl.tensor,
    end2: tl.tensor,
    epsilon: tl.tensor,
    DECOUPLED: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    count = count * VEC
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    factor = tl.load(numbers_ptr) + tl.zeros((BLOCK,), tl.float32)
    kept = inside & (factor == factor)
    weight = tl.load(numbers_ptr + 1)
    weight1 = tl.load(numbers_ptr + 2)
    beta2 = tl.load(numbers_ptr + 3)
    weight2 = tl.load(numbers_ptr + 4)
    group = numbers_ptr + 5 + 3 * group_of(i, end0, end1, end2)
    size = tl.load(group, mask=inside, other=0.0)
    decay = tl.load(group + 1, mask=inside, other=0.0)
    root = tl.load(group + 2, mask=inside, other=1.0)
    p = tl.load(parameters_ptr + i, mask=kept, other=0.0)
    g = tl.load(gradients_ptr + i, mask=kept, other=0.0) * factor
    if DECOUPLED:
        p *= decay
    else:
        g += p * decay
    m = lerp(tl.load(first_ptr + i, mask=kept, other=0.0), g, weight1)
    v = tl.load(second_ptr + i, mask=kept, other=0.0) * beta2 + weight2 * g * g
    p -= tl.div_rn(size * m, tl.div_rn(tl.sqrt_rn(v), root) + tl.cast(epsilon, tl.float32))
    e = lerp(tl.load(averages_ptr + i, mask=kept, other=0.0), p, weight)
    tl.store(parameters_ptr + i, p, mask=kept)
    tl.store(first_ptr + i, m, mask=kept)
    tl.store(second_ptr + i, v, mask=kept)
    tl.store(averages_ptr + i, e, mask=kept)
    tl.store(gradients_ptr + i, tl.zeros_like(g), mask=inside)


def _extent(ends: Sequence[int], *buffers: Tensor) -> tuple[tuple[int], list[int], int]:
    """The grid; the number of weights in vectors, and where the first three groups end; the size of the vectors."""
    count = len(buffers[0])
    vector = 4 if count % 4 == 0 and all(address(buffer) % 16 == 0 for buffer in buffers) else 1
    bounds = [*ends[:-1], *[count] * (MOST_GROUPS - len(ends))]
    return (triton.cdiv(count, _BLOCK),), [count // vector, *bounds], vector


def sgd_update(
    parameters: Tensor,
    gradients: Tensor,
    momenta: Tensor,
    averages: Tensor,
    numbers: Tensor,
    ends: Sequence[int],
    nesterov: bool,
) -> None:
    """Kernel `sgd_update` of `ops/_flat_update.py`."""
    buffers = parameters, gradients, momenta, averages
    grid, extent, vector = _extent(ends, *buffers)
    sgd_update_kernel(grid, *buffers, numbers, *extent, warps=4, NESTEROV=nesterov, VEC=vector, BLOCK=_BLOCK)


def adam_update(
    parameters: Tensor,
    gradients: Tensor,
    first: Tensor,
    second: Tensor,
    averages: Tensor,
    numbers: Tensor,
    ends: Sequence[int],
    epsilon: float,
    decoupled: bool,
) -> None:
    """Kernel `adam_update` of `ops/_flat_update.py`."""
    buffers = parameters, gradients, first, second, averages
    grid, extent, vector = _extent(ends, *buffers)
    adam_update_kernel(
        grid, *buffers, numbers, *extent, float(epsilon), warps=4, DECOUPLED=decoupled, VEC=vector, BLOCK=_BLOCK
    )
