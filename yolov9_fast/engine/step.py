"""The training step: image conversion, forward, loss, backward, clipping, optimiser, moving average."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from yolov9_fast._capture import Capture, Recorder, Unchanged
from yolov9_fast.data.planned import PlannedImages
from yolov9_fast.engine.clock import PhaseClock
from yolov9_fast.engine.device import autocast, prepare_images
from yolov9_fast.engine.distributed import GradientSum, ProcessGroup
from yolov9_fast.engine.training_state import TrainingState
from yolov9_fast.errors import UserError
from yolov9_fast.losses import DetectionLoss
from yolov9_fast.losses.targets import PaddedTargets, pad_targets
from yolov9_fast.nn import DetectionOutput

PHASES = ("data", "forward", "loss", "backward", "step")
_FEWEST_OBJECTS = 8
_MOST_RECORDINGS = 24
"""Of image sizes, numbers of objects, and steps with and without an update."""


class StepResult(NamedTuple):
    """What a step gives, on the run's device.

    Attributes:
        loss: the terms in the order of `criterion.names`, float64 [terms].
        skipped: whether an update was skipped because the gradients are not finite, 0-dimensional bool.
    """

    loss: Tensor
    skipped: Tensor


@dataclass
class TrainStep:
    """What happens to one batch; the only place that changes weights, gradients and the moving average.

    The batch is copied into buffers that stay where they are, one for each shape; everything after that reads these,
    learning rates from the device and no value on the host. On a GPU it is recorded as a CUDA graph, one for each
    combination of shapes, and replayed; where it cannot be, and on a CPU, it is called.

    Attributes:
        state: model, moving average, optimiser and loss scale.
        amp: off, bf16 or fp16.
        clip: largest gradient norm; 0 for no clipping.
        group: the data-parallel processes.
        capture: auto or off: whether steps are recorded.
        record: makes the recordings; None: CUDA graphs.
        pixels: the images that planned ones are made of (`data.resident`), on the device.
        images: those of the last step, uint8 [B, 3, H, W] on the device; valid until the next one.
        totals: the sum of each loss term over the batches with finite loss, then their number, float64 [terms + 1].
        skipped: the number of skipped updates, int64, 0-dimensional; both since `reset_totals`.
    """

    state: TrainingState
    criterion: DetectionLoss
    device: torch.device
    amp: str = "off"
    clip: float = 10.0
    channels_last: bool = True
    group: ProcessGroup = field(default_factory=lambda: ProcessGroup(0, 1, torch.device("cpu")))
    capture: str = "auto"
    record: Recorder | None = None
    pixels: Tensor | None = None
    images: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.totals = torch.zeros(len(self.criterion.names) + 1, dtype=torch.float64, device=self.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self._images: dict[Hashable, Tensor] = {}
        self._targets: dict[torch.Size, PaddedTargets] = {}
        self._sum: GradientSum | None = None
        self.captured = Capture(
            "the training step", self.device, mode=self.capture, most=_MOST_RECORDINGS, record=self.record
        )
        self._unchanged: Unchanged | None = None

    def __call__(
        self, images: Tensor | PlannedImages, targets: Tensor, *, size: int | None, update: bool, clock: PhaseClock
    ) -> StepResult:
        """Accumulate the gradients of a batch; with `update` also step the optimiser and the moving average.

        Args:
            images: uint8 [B, 3, H, W], or plans of images that the step makes of `pixels`.
            targets: float32 [n, 6]: image, class, cx, cy, w, h (normalised), on the CPU.
            size: resize the images to this many pixels (multi-scale training); None: leave them.
            clock: of `PHASES`; gets the times of all of them but the optimiser's. Of a replayed step, which has no
                phases, the time after "data" is the next phase's that the caller ends.

        Raises:
            UserError: a BatchNorm gets one value per channel.
            ValueError: a target of an image or class that there is not.
        """
        static_images, static_targets = self._load(images, targets, size)
        clock.end("data")
        self._prepare(update)
        result, received, self.images = self.captured.run(
            self._key(static_images, static_targets, size, update),
            lambda: self._program(static_images, static_targets, size, update, clock),
        )
        flat = self.state.flat
        flat.missing = flat.all_missing if update else flat.missing.difference(received)
        if not update:
            flat.show_gradients()
        return StepResult(*(value.clone() for value in result))

    def reset_totals(self) -> None:
        """Begin `totals` and `skipped` anew."""
        self.totals.zero_()
        self.skipped.zero_()

    def update(self) -> Tensor:
        """The end of a step with the gradients that the parameters have; whether they are finite, bool."""
        self._prepare(update=True)
        flat = self.state.flat
        finite = self._update(flat.missing)
        flat.missing = flat.all_missing
        return finite

    def _load(
        self, images: Tensor | PlannedImages, targets: Tensor, size: int | None
    ) -> tuple[Tensor | PlannedImages, PaddedTargets]:
        """The batch in buffers that stay; targets padded to one of a few numbers of objects per image."""
        height, width = (size, size) if size is not None else (images.shape[2], images.shape[3])
        batch, classes = images.shape[0], self.criterion.num_classes
        padded = pad_targets(
            targets,
            batch,
            classes,
            (height, width),
            torch.float32,
            self.criterion.max_objects,
            smallest=_FEWEST_OBJECTS,
        )
        given, form = (images.buffer, images.form) if isinstance(images, PlannedImages) else (images, images.shape)
        if form not in self._images:
            self._images[form] = torch.empty(given.shape, dtype=given.dtype, device=self.device)
        if padded.mask.shape not in self._targets:
            self._targets[padded.mask.shape] = padded.to(self.device, torch.float32)
        static, static_targets = self._images[form], self._targets[padded.mask.shape]
        static.copy_(given, non_blocking=True)
        static_targets.copy_(padded)
        return (replace(images, buffer=static) if isinstance(images, PlannedImages) else static), static_targets

    def _prepare(self, update: bool) -> None:
        """What the host decides before a step."""
        self.state.flat.hide_gradients()
        if self.state.flat.outdated:
            self.state.flatten()
        if self.group.is_distributed and (self._sum is None or self._sum.flat is not self.state.flat):
            if self._sum is not None:
                self._sum.close()
            self._sum = GradientSum(self.state.flat)
        if update:
            self.state.flat.write_rates()
        if self.captured.reason is None and (self._unchanged is None or not self._unchanged.holds()):
            # A callback may have frozen layers, added hooks or replaced a module.
            self.captured.reset()
            self._unchanged = Unchanged(self.state.model)

    def _key(self, images: Tensor | PlannedImages, targets: PaddedTargets, size: int | None, update: bool) -> Hashable:
        """What the program depends on besides tensors that stay and the model; None if nothing is recorded."""
        if self.captured.reason is not None:
            return None
        loss = tuple((name, str(value)) for name, value in vars(self.criterion).items())
        weights = tuple(term.weight for term in self.criterion.terms)
        group = self.state.optimizer.param_groups[0]
        options = tuple(group.get(name) for name in ("nesterov", "eps"))
        form = images.form if isinstance(images, PlannedImages) else images.shape
        shapes = (form, targets.mask.shape, size)
        return (*shapes, update, self.state.flat.missing, self.amp, self.clip, loss, weights, options)

    def _program(
        self,
        images: Tensor | PlannedImages,
        targets: PaddedTargets,
        size: int | None,
        update: bool,
        clock: PhaseClock,
    ) -> tuple[StepResult, list[int], Tensor]:
        """A step on buffers that stay; also the indices of the parameters that received a gradient, and the images."""
        for parameter in self.state.flat.trained:
            parameter.grad = None  # what an attempt to record the step may have left
        if isinstance(images, PlannedImages):
            if self.pixels is None:
                raise ValueError("images: expected a tensor by a step without pixels, got plans of images")
            images = images.make(self.pixels)
        made = images
        images = prepare_images(made, self.device, channels_last=self.channels_last)
        if size is not None:
            images = nn.functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
        with autocast(self.device, self.amp):
            output = self._forward(images)
        self._end(clock, "forward")
        # Gradients are averaged over the processes; the published loss sums over the images of all of them.
        loss = self.criterion(output, targets, (images.shape[2], images.shape[3]), scale=self.group.size)
        self._end(clock, "loss")
        total = loss.total * self.state.scale.value if self.state.scale.enabled else loss.total
        flat = self.state.flat
        if update and self._sum is not None:
            with self._sum:
                total.backward()
            received = self._sum.received
        else:
            total.backward()
            received = flat.collect()
        self._end(clock, "backward")
        skipped = torch.zeros((), dtype=torch.bool, device=self.device)
        if update:
            skipped = ~self._update(flat.missing.difference(received))
            self.skipped += skipped
        items = loss.items.double()
        self.totals += torch.where(items.isfinite().all(), torch.cat((items, items.new_ones(1))), 0.0)
        return StepResult(items, skipped), received, made

    def _end(self, clock: PhaseClock, phase: str) -> None:
        """A recording would hold the clock's events, which nothing reads then."""
        if self.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            clock.end(phase)

    def _update(self, idle: frozenset[int]) -> Tensor:
        state = self.state
        return state.flat.update(clip=self.clip, scale=state.scale, processes=self.group.size, idle=sorted(idle))

    def _forward(self, images: Tensor) -> DetectionOutput:
        try:
            output: DetectionOutput = self.state.model(images)
        except ValueError as error:
            # torch's own words, and those of `bn_silu`. Which block pools to one pixel is known only here.
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"batch: expected more images: with {len(images)} of {images.shape[3]} × {images.shape[2]} pixels a "
                f"BatchNorm has one value per channel; use another --batch, or a larger --imgsz"
            ) from error
        return output
