"""Images without pixels: what the loader sends where the training step makes the images (`resident.py`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from yolov9_fast.data.plan import Arrays
from yolov9_fast.ops import augment


class PlanForm(NamedTuple):
    """B, V and T of `ops.augment`, whether there are tables, and its options; a run has one form, and one for its short
    last batch."""

    batch: int
    views: int
    tiles: int
    coloured: bool
    size: int
    perspective: bool

    def fields(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of tiles, canvases, matrices, shares, tables and flips."""
        batch, views = self.batch, self.views
        return [
            ((batch, views, self.tiles, 5), torch.int64),
            ((batch, views, 2), torch.int64),
            ((batch, views, 3, 3), torch.float64),
            ((batch,), torch.float64),
            ((batch if self.coloured else 0, 3, 256), torch.uint8),
            ((batch, 2), torch.bool),
        ]

    def sizes(self) -> list[int]:
        """Bytes of each field."""
        return [math.prod(shape) * dtype.itemsize for shape, dtype in self.fields()]


@dataclass(frozen=True)
class PlannedImages:
    """The arguments of `ops.augment` but `pixels`, in one buffer, which one copy brings to a device.

    `buffer`: uint8 [n], the fields of the form one after the other.
    """

    buffer: Tensor
    form: PlanForm

    @classmethod
    def of(cls, plans: Arrays, size: int, *, perspective: bool) -> PlannedImages:
        """Images of `size` pixels from plans whose tiles have their offsets."""
        given = (plans.tiles, plans.canvases, plans.matrices, plans.shares, plans.tables, plans.flips)
        flat = np.concatenate([field.reshape(-1).view(np.uint8) for field in given if field is not None])
        batch, views, tiles, _ = plans.tiles.shape
        form = PlanForm(batch, views, tiles, plans.tables is not None, size, perspective)
        return cls(torch.from_numpy(flat), form)

    @classmethod
    def joined(cls, parts: Sequence[PlannedImages]) -> PlannedImages:
        """One after the other; all have one form."""
        fields = zip(*(part.buffer.split(part.form.sizes()) for part in parts), strict=True)
        batch = sum(part.form.batch for part in parts)
        return cls(torch.cat([part for field in fields for part in field]), parts[0].form._replace(batch=batch))

    @property
    def shape(self) -> torch.Size:
        """Of the images."""
        return torch.Size((self.form.batch, 3, self.form.size, self.form.size))

    def pin_memory(self) -> PlannedImages:
        """The same in page-locked memory."""
        return replace(self, buffer=self.buffer.pin_memory())

    def make(self, pixels: Tensor) -> Tensor:
        """The images, uint8 RGB [B, 3, size, size] on the device of `pixels`."""
        form = self.form
        parts = self.buffer.to(pixels.device).split(form.sizes())
        tiles, canvases, matrices, shares, tables, flips = (
            part.view(dtype).view(shape) for part, (shape, dtype) in zip(parts, form.fields(), strict=True)
        )
        colours = tables if form.coloured else None
        return augment(pixels, tiles, canvases, matrices, colours, flips, shares, form.size, form.perspective)
