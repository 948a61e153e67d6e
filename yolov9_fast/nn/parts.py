"""The parts of a concatenation, written by their producers into one buffer where they can be."""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor

from yolov9_fast.nn.plan import Slot, Step
from yolov9_fast.ops._concat import ConcatBuffer


class Parts:
    """The parts of one concatenation; their buffer is made when the first of them is known."""

    def __init__(self, channels: tuple[int, ...] | None) -> None:
        """`channels`: of each part; None where a producer does not write into its slot, so that all are copied."""
        self.channels = channels
        self.buffer: ConcatBuffer | None = None
        self.written = 0

    def slot(self, first: int, count: int = 1) -> Slot | None:
        """Where the producer of the parts `first` to `first + count - 1` writes."""
        return None if self.channels is None else functools.partial(self._open, self.channels, first, count)

    def _open(self, channels: tuple[int, ...], first: int, count: int, like: Tensor) -> Tensor:
        if like.shape[1] != sum(channels[first : first + count]):  # the weights no longer have the stated channels
            return torch.empty_like(like)
        if self.buffer is None:
            self.buffer = ConcatBuffer.like(like, channels)
        self.written += count
        return self.buffer.slot(first, count)

    def slots(self, like: Tensor, *numbers: int) -> list[Tensor] | None:
        """The parts of these numbers, to be written by an operator with several results of the shape of `like`."""
        channels = self.channels
        return None if channels is None else [self._open(channels, number, 1, like) for number in numbers]

    def joined(self, *parts: Tensor) -> Tensor:
        """The concatenation; one copy of all parts where a producer could not write into its slot."""
        if self.channels is None or self.buffer is None or self.written < len(self.channels):
            return torch.cat(parts, 1)
        return self.buffer.join(*parts)


def widths(*steps: Step) -> tuple[int, ...] | None:
    """Channels of what the steps give; None where one of them does not write into its slot."""
    found = tuple(step.width for step in steps)
    return None if None in found else cast("tuple[int, ...]", found)
