"""1×1 convolution as a matrix product over pixels of several maps, read in place, with gradients.

out[:, o] = Σ_k weight[o, k] · x[:, k] + bias[o], k over the channels of all inputs. Sums in float32. Gradient of the
inputs: the same product with the weight transposed and several outputs; of the weight: a product over pixels, in parts
that are added in a fixed order.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from yolov9_fast.kernels.batch_norm import column_sums
from yolov9_fast.kernels.config import WARPS, Product, product
from yolov9_fast.kernels.conv1x1_products import (
    conv1x1_input_gradient_kernel,
    conv1x1_kernel,
    conv1x1_weight_gradient_kernel,
)
from yolov9_fast.kernels.launch import View, data_of, dense_like, strides_of, views
from yolov9_fast.kernels.replay import replayed

MOST = 4
"""Maps read or written by one launch; CSP-ELAN has at most four. Of more, the last ones are concatenated first."""
SPLITS = 512
"""Programs of the weight's gradient: about four for each of 132 multiprocessors."""


def _precision() -> str:
    """What cuDNN's convolutions of float32 maps may round their inputs to: "tf32", or "ieee" for nothing."""
    found: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return found


def _in_tf32(view: View) -> bool:
    """As torch's convolutions of float32: those of a GPU as they are set to, those of the CPU never."""
    return view.data.device.type != "cpu" and _precision() == "tf32"


@replayed(_precision)
def conv1x1_forward(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """The 1×1 convolution of the concatenated inputs, into `out`."""
    *sources, target = views(*_at_most(list(inputs)), written=[out])
    matrix, row_major = _matrix(weight)
    vector = _vector([*sources, target], matrix, [view.channels for view in (*sources, target)])
    block = product(out.element_size(), target.channels, out.device, vector)
    tiles = triton.cdiv(target.pixels, block.pixels)
    slots: list[View | None] = [*sources, *[None] * MOST][:MOST]
    conv1x1_kernel(
        (target.images * tiles * triton.cdiv(target.channels, block.outputs),),
        *data_of(*slots),
        matrix,
        bias,
        target.data,
        *strides_of(vector, *slots, target),
        *(view.channels // vector if view else 0 for view in slots),
        target.channels // vector,
        _row_stride(matrix, row_major) // vector,
        _pixels(target, vector),
        tiles,
        ROW_MAJOR=row_major,
        **_constants(target, vector, block),
    )


@replayed(_precision)
def conv1x1_input_grad(dy: Tensor, weight: Tensor, channels: Sequence[int]) -> list[Tensor]:
    """Gradient of every input (`channels`: theirs), each dense in the layout of `dy`."""
    gradient = views(dy)[0]
    counts = list(channels)
    merged = counts if len(counts) <= MOST else [*counts[: MOST - 1], sum(counts[MOST - 1 :])]
    targets = [dense_like(gradient, count) for count in merged]
    matrix, row_major = _matrix(weight)
    vector = _vector([gradient, *targets], matrix, [gradient.channels, *merged])
    block = product(dy.element_size(), max(merged, default=1), dy.device, vector)
    tiles = triton.cdiv(gradient.pixels, block.pixels)
    slots = [*(view.data for view in targets), *[None] * MOST][:MOST]
    conv1x1_input_gradient_kernel(
        (gradient.images * tiles * sum(triton.cdiv(count, block.outputs) for count in merged),),
        gradient.data,
        matrix,
        *slots,
        *strides_of(vector, gradient),
        *[count // vector for count in [*merged, *[0] * MOST][:MOST]],
        gradient.channels // vector,
        _row_stride(matrix, row_major) // vector,
        _pixels(gradient, vector),
        tiles,
        ROW_MAJOR=row_major,
        **_constants(gradient, vector, block),
    )
    if merged is counts:
        return [view.data for view in targets]
    layout = torch.channels_last if gradient.last else torch.contiguous_format
    rest = torch.split(targets.pop().data, counts[MOST - 1 :], 1)
    return [view.data for view in targets] + [part.clone(memory_format=layout) for part in rest]


@replayed(_precision)
def conv1x1_weight_grad(dy: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Gradient of the weight [O, ΣC, 1, 1], in the dtype of `dy`."""
    gradient, *sources = views(dy, *inputs)
    outputs = gradient.channels
    columns = sum(view.channels for view in sources)
    vector = _vector([gradient, *sources], None, [view.channels for view in (gradient, *sources)])
    block = product(dy.element_size(), outputs, dy.device, vector)
    if vector == 1 and dy.dtype == torch.float32 and not _in_tf32(gradient):
        block = replace(block, pixels=block.pixels // 2)  # it sums over pixels, and without tensor cores spills
    per_image = triton.cdiv(gradient.pixels, block.pixels)
    wide = triton.cdiv(outputs, block.outputs)
    programs = wide * sum(triton.cdiv(view.channels, block.k) for view in sources)
    wanted = max(1, SPLITS // max(programs, 1))
    tiles = min(per_image, max(1, triton.cdiv(gradient.images * per_image, wanted)))
    blocks = triton.cdiv(per_image, max(tiles, 1))
    splits = gradient.images * blocks
    result = torch.empty((outputs, columns, 1, 1), dtype=dy.dtype, device=dy.device)
    if splits == 0:
        return result.zero_()
    partial = torch.empty((1, splits, outputs * columns), dtype=torch.float32, device=dy.device)
    column = 0
    for source in sources:
        conv1x1_weight_gradient_kernel(
            (wide, triton.cdiv(source.channels, block.k), splits),
            gradient.data,
            source.data,
            partial,
            *strides_of(vector, gradient, source),
            outputs // vector,
            source.channels // vector,
            column // vector,
            columns // vector,
            _pixels(gradient, vector),
            blocks,
            tiles,
            **_constants(gradient, vector, block),
        )
        column += source.channels
    column_sums(partial, result)
    return result


def _at_most(maps: list[Tensor]) -> list[Tensor]:
    return maps if len(maps) <= MOST else [*maps[: MOST - 1], torch.cat(maps[MOST - 1 :], 1)]


def _matrix(weight: Tensor) -> tuple[Tensor, bool]:
    """The weight as a matrix [O, K] with one axis dense, and whether that is the inputs' axis (row-major)."""
    matrix = weight.flatten(1) if weight.stride(1) == 1 or weight.stride(0) == 1 else weight.contiguous().flatten(1)
    return matrix, matrix.stride(1) == 1 or matrix.shape[1] == 1


def _row_stride(matrix: Tensor, row_major: bool) -> int:
    """Elements between rows (columns when not row-major); of a matrix of one row (column) as if there were more."""
    axis = 0 if row_major else 1
    return matrix.stride(axis) if matrix.shape[axis] > 1 else matrix.shape[1 - axis]


def _vector(all_views: Sequence[View], matrix: Tensor | None, channels: Sequence[int]) -> int:
    """Elements of a 16-byte access when every map, every number of channels and the weight allow it, else 1."""
    vector = min(view.vector() for view in all_views)
    if any(count % vector for count in channels):
        return 1
    if matrix is not None and (matrix.data_ptr() % 16 or any(s % vector for s in matrix.stride() if s != 1)):
        return 1
    return vector


def _pixels(view: View, vector: int) -> int:
    return view.pixels if view.last else view.pixels // vector


def _constants(view: View, vector: int, block: Product) -> dict[str, Any]:
    exact = view.data.dtype == torch.float32 and not _in_tf32(view)
    return {
        "PRECISION": "ieee" if exact else "tf32",
        "LAST": view.last,
        "VEC": vector,
        "BLOCK_P": block.pixels,
        "BLOCK_K": block.k,
        "BLOCK_O": block.outputs,
        # Without tensor cores a thread holds the factors too: half as many sums, or it spills.
        "warps": WARPS[-1] if exact else block.warps,
        "stages": block.stages,
    }
