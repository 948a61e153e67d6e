"""A network's inference on batches of images; on a GPU one CUDA graph for each shape that repeats."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from yolov9_fast._capture import Capture, Unchanged
from yolov9_fast.engine.device import autocast, prepare_images
from yolov9_fast.models import DetectionModel
from yolov9_fast.ops._backend import chosen_settings

SHAPES = 8
"""Shapes of batches that are captured at a time; others are computed without a graph."""


class Inference:
    """From uint8 images to raw maps and decoded predictions of the main branch. NMS is not part of it.

    Args:
        name: for the log.
        model: in evaluation mode. Its values may change in place; another change is noticed, and recorded anew.
        amp: off, bf16 or fp16.
        channels_last: memory format of the images.
        capture: auto or off. Nothing is captured on a CPU.

    Raises `UserError` for another `capture`.
    """

    def __init__(
        self,
        name: str,
        model: DetectionModel,
        device: torch.device,
        *,
        amp: str = "off",
        channels_last: bool = True,
        capture: str = "auto",
    ) -> None:
        self.model, self.device, self.amp, self.channels_last = model, device, amp, channels_last
        self.capture = Capture(name, device, mode=capture, most=SHAPES)
        self._images: dict[Hashable, Tensor] = {}
        self._unchanged: Unchanged | None = None

    def __call__(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Raw maps [B, no, H/s, W/s] in float32 and the prediction [B, 4 + nc, A]; valid until the next call.

        Args:
            images: uint8 [B, 3, H, W], on any device; without gradients.
        """
        if self._unchanged is not None and not self._unchanged.holds():
            self._unchanged = None
            self._images.clear()
            self.capture.reset()
        key = tuple(images.shape), self.amp, self.channels_last, chosen_settings()
        if self.capture.fixed(key):
            if self._unchanged is None:
                self._unchanged = Unchanged(self.model)
            fixed = self._images.get(key)
            if fixed is None:
                fixed = self._images[key] = torch.empty(images.shape, dtype=images.dtype, device=self.device)
            images = fixed.copy_(images, non_blocking=True)
        return self.capture.run(key, lambda: self._compute(images))

    def _compute(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        images = prepare_images(images, self.device, channels_last=self.channels_last)
        with autocast(self.device, self.amp):
            maps = [level.float() for level in self.model.raw(images, auxiliary=False).main]
        return maps, self.model.decode(maps)
