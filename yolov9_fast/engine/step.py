"""The training step: image conversion, forward, loss, backward, clipping, optimiser, moving average."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from yolov9_fast.engine.clock import PhaseClock
from yolov9_fast.engine.device import autocast, prepare_images
from yolov9_fast.engine.training_state import TrainingState
from yolov9_fast.errors import UserError
from yolov9_fast.losses import DetectionLoss
from yolov9_fast.nn import DetectionOutput

PHASES = ("data", "forward", "loss", "backward", "step")


@dataclass
class TrainStep:
    """What happens to one batch; the only place that changes weights, gradients and the moving average.

    Attributes:
        network: computes the forward pass: `state.model`, or DistributedDataParallel around it.
        state: model, moving average, optimiser and gradient scaler.
        amp: off, bf16 or fp16.
        clip: largest gradient norm; 0 for no clipping.
        processes: number of data-parallel processes.
    """

    network: nn.Module
    state: TrainingState
    criterion: DetectionLoss
    device: torch.device
    amp: str = "off"
    clip: float = 10.0
    channels_last: bool = True
    processes: int = 1

    def __call__(
        self, images: Tensor, targets: Tensor, *, size: int | None, update: bool, clock: PhaseClock
    ) -> tuple[Tensor, bool]:
        """Accumulate the gradients of a batch; with `update` also step the optimiser and the moving average.

        Args:
            images: uint8 [B, 3, H, W].
            targets: float32 [n, 6]: image, class, cx, cy, w, h (normalised).
            size: resize the images to this many pixels (multi-scale training); None: leave them.
            clock: of `PHASES`; gets the times of all of them but the optimiser's.

        Returns:
            The loss terms in the order of `criterion.names`, float64 [terms]; and whether an update was skipped because
            the gradients are not finite.

        Raises:
            UserError: a BatchNorm gets one value per channel.
        """
        images = prepare_images(images, self.device, channels_last=self.channels_last)
        if size is not None:
            images = nn.functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
        clock.end("data")
        with self._local_gradients(not update):
            with autocast(self.device, self.amp):
                output = self._forward(images)
            clock.end("forward")
            # DistributedDataParallel averages gradients; the published loss sums over the images of all processes.
            loss = self.criterion(output, targets, (images.shape[2], images.shape[3]), scale=self.processes)
            clock.end("loss")
            self.state.scaler.scale(loss.total).backward()
        clock.end("backward")
        skipped = update and not self.update()
        return loss.items.double(), skipped

    def _forward(self, images: Tensor) -> DetectionOutput:
        try:
            output: DetectionOutput = self.network(images)
        except ValueError as error:
            # torch's own words, and those of `bn_silu`. Which block pools to one pixel is known only here.
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"batch: expected more images: with {len(images)} of {images.shape[3]} × {images.shape[2]} pixels a "
                f"BatchNorm has one value per channel; use another --batch, or a larger --imgsz"
            ) from error
        return output

    def update(self) -> bool:
        """Clip, step the optimiser, update the moving average; False if skipped for gradients that are not finite."""
        state = self.state
        state.scaler.unscale_(state.optimizer)
        parameters = [p for p in state.model.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.clip if self.clip > 0 else float("inf"))
        finite = bool(torch.isfinite(norm))  # the only wait for the device
        if finite:
            state.optimizer.step()  # `scaler.step` would wait once more, to see the same of the gradients
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if finite:
            state.ema.update(state.model)
        else:
            self._restore_buffers()
        return finite

    @torch.no_grad()
    def _restore_buffers(self) -> None:
        """Replace running statistics that a forward pass made non-finite by those of the moving average.

        The device decides which: asking it would be a wait for each of them.
        """
        averages = dict(self.state.ema.model.named_buffers())
        own = {name: b for name, b in self.state.model.named_buffers() if b.is_floating_point()}
        for name, buffer in own.items():
            torch.where(torch.isfinite(buffer).all(), buffer, averages[name], out=buffer)

    def _local_gradients(self, local: bool) -> contextlib.AbstractContextManager[None]:
        """Without the all-reduce of gradients, which only the last batch before an update needs."""
        if local and isinstance(self.network, nn.parallel.DistributedDataParallel):
            return self.network.no_sync()
        return contextlib.nullcontext()
