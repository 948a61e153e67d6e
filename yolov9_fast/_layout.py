"""In which of the two layouts that the operators read in place a [B, C, H, W] tensor lies.

"channels_last": pixels are rows of C neighbouring channels, one row stride for all pixels (dense, or a channel slice
of a channels_last buffer). "contiguous": planes of H·W neighbouring pixels, the batch stride free (dense, or a slice).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def layout_of(x: Tensor) -> str | None:
    """The layout of `x` [B, C, H, W] by its name, None for what lies in neither."""
    channels_last, contiguous = row_stride(x) is not None, _in_planes(x)
    if channels_last and contiguous:
        # C = 1 or one pixel: both hold; strides tell what the tensor was made as.
        return "channels_last" if x.shape[1] > 1 and x.stride(1) == 1 and x.stride(3) != 1 else "contiguous"
    return "channels_last" if channels_last else "contiguous" if contiguous else None


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The memory format in which to allocate what belongs beside `x`."""
    return torch.channels_last if layout_of(x) == "channels_last" else torch.contiguous_format


def row_stride(x: Tensor) -> int | None:
    """Elements from one pixel to the next where `x` [B, C, H, W] lies channels_last, dense or as a slice; else None."""
    batch, channels, height, width = x.shape
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


def _in_planes(x: Tensor) -> bool:
    batch, channels, height, width = x.shape
    pixels = height * width
    return (
        (width == 1 or x.stride(3) == 1)
        and (height == 1 or x.stride(2) == width)
        and (channels == 1 or x.stride(1) == pixels)
        and (batch == 1 or x.stride(0) >= pixels * channels)
    )


def in_layout_of(
    like: Tensor, maps: Sequence[Tensor], memory_format: torch.memory_format | None = None
) -> list[Tensor]:
    """`maps`, all in the layout of `like`; those in another are copied.

    Where `like` lies in neither layout: in `memory_format`, by default contiguous.
    """
    layout = layout_of(like)
    if memory_format is None or layout is not None:
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    fits = _fits_rows if memory_format == torch.channels_last else _in_planes
    return [x if fits(x) else x.contiguous(memory_format=memory_format) for x in maps]


def _fits_rows(x: Tensor) -> bool:
    return row_stride(x) is not None


def check_map(op: str, name: str, x: object) -> None:
    """Raises `TypeError`/`ValueError` for what is no floating [B, C, H, W] tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.ndim != 4:
        raise ValueError(f"{op}: {name} must have shape [B, C, H, W], got {list(x.shape)}")
