"""The memory layouts of a [B, C, H, W] tensor that operators and kernels read without a copy.

"channels_last": each pixel is a row of C adjacent channels, with one stride from row to row (dense, or a channel slice
of a channels_last tensor). "contiguous": each channel is a plane of H·W adjacent pixels, with any batch stride (dense,
or a channel slice of a contiguous tensor). A map of one channel or of one pixel has both, and so has an empty one.

Every new map of an operator is like one of its arguments: dense, in the `memory_format_of` that one. Fakes, references,
Triton launchers (`empty_map`) and the C++ operators (`empty_map` in csrc/common/map_layout.h) all follow this rule, so
that torch.compile sees the strides that the kernels give, also of sides of length 0 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def layout_of(x: Tensor) -> str | None:
    """The layout of `x` [B, C, H, W]: "channels_last", "contiguous", or None for any other.

    Of a map that has both, strides of sides that may have length 1 tell how it was made; one channel is contiguous.
    """
    dense = x.is_contiguous(memory_format=torch.channels_last), x.is_contiguous()
    if dense[0] != dense[1] and x.numel() > 0:
        return "channels_last" if dense[0] else "contiguous"
    channels_last, contiguous = row_stride(x) is not None, image_stride(x) is not None
    if channels_last and contiguous:
        return "channels_last" if x.shape[1] > 1 and x.stride(1) == 1 and x.stride(3) != 1 else "contiguous"
    return "channels_last" if channels_last else "contiguous" if contiguous else None


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The memory format of a new tensor in the layout of `x`; contiguous where `x` has neither."""
    return torch.channels_last if layout_of(x) == "channels_last" else torch.contiguous_format


def row_stride(x: Tensor) -> int | None:
    """Elements from one pixel to the next if `x` [B, C, H, W] is channels_last, dense or a slice; else None."""
    batch, channels, height, width = x.shape
    if x.numel() == 0:
        return channels
    if channels > 1 and x.stride(1) != 1:
        return None
    if width > 1:
        row = x.stride(3)
    elif height > 1:
        row = x.stride(2)
    else:
        row = x.stride(0) if batch > 1 else channels
    if row < channels:
        return None
    fits = (width == 1 or x.stride(3) == row) and (height == 1 or x.stride(2) == row * width)
    return row if fits and (batch == 1 or x.stride(0) == row * width * height) else None


def image_stride(x: Tensor) -> int | None:
    """Elements from one image to the next if `x` [B, C, H, W] is contiguous, dense or a slice; else None."""
    batch, channels, height, width = x.shape
    pixels = height * width
    if x.numel() == 0:
        return channels * pixels
    dense = (
        (width == 1 or x.stride(3) == 1)
        and (height == 1 or x.stride(2) == width)
        and (channels == 1 or x.stride(1) == pixels)
    )
    image = x.stride(0) if batch > 1 else pixels * channels
    return image if dense and image >= pixels * channels else None


def telling(maps: Sequence[Tensor]) -> Tensor:
    """The first map that has one layout only: one channel or one pixel has both; or the first of all."""
    return next((x for x in maps if (row_stride(x) is None) != (image_stride(x) is None)), maps[0])


def in_layout_of(
    like: Tensor, maps: Sequence[Tensor], memory_format: torch.memory_format | None = None
) -> list[Tensor]:
    """`maps`, all in the layout of `like`; those in another layout are copied.

    If `like` has neither layout: in `memory_format`, by default contiguous.
    """
    layout = layout_of(like)
    if memory_format is None or layout is not None:
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    stride = row_stride if memory_format == torch.channels_last else image_stride
    return [x if stride(x) is not None else x.contiguous(memory_format=memory_format) for x in maps]


def empty_map(
    like: Tensor,
    channels: int | None = None,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Uninitialised [B, channels, *size], by default of the shape and dtype of `like`; dense, in its layout, device."""
    rows = like.is_contiguous(memory_format=torch.channels_last)
    if rows != like.is_contiguous() and like.numel() > 0:  # `memory_format_of`, in fewer Python calls
        layout = torch.channels_last if rows else torch.contiguous_format
    else:
        layout = memory_format_of(like)
    if channels is None and size is None:
        return torch.empty_like(like, dtype=dtype, memory_format=layout)
    batch, own_channels, height, width = like.shape
    return torch.empty(
        (batch, own_channels if channels is None else channels, *(size or (height, width))),
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=layout,
    )


def dense(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """`x` with the strides of a new tensor; `contiguous` leaves those of sides of length 1, and of an empty tensor."""
    return x.contiguous(memory_format=memory_format) if min(x.shape) > 1 else x.clone(memory_format=memory_format)
