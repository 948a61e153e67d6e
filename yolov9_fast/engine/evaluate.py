"""Evaluation of a weights file: load and fuse it, open the split, validate, write the results."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from yolov9_fast.data import load_data_config
from yolov9_fast.engine.distributed import parse_device
from yolov9_fast.engine.report import save_evaluation
from yolov9_fast.engine.run_files import new_run
from yolov9_fast.engine.trainer import STRIDE, default_workers, resolve_amp
from yolov9_fast.engine.validator import ValidationResult, open_evaluation_set, validate
from yolov9_fast.errors import UserError
from yolov9_fast.models import DetectionModel, fuse, load_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate and how; the defaults are the published settings with square letterbox."""

    weights: str | Path
    data: str | Path
    split: str = "val"
    imgsz: int = 640
    batch: int = 32
    conf: float = 0.001
    iou: float = 0.7
    max_det: int = 300
    rect: bool = False
    amp: str = "off"
    device: str | None = None
    workers: int | None = None
    plots: bool = True
    project: str | Path = "runs/val"
    name: str = "exp"

    def check(self) -> None:
        """Raise `UserError` for a value that no evaluation can use."""
        for name in ("imgsz", "batch", "max_det"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("conf", "iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"workers must not be negative, got {self.workers}")


def evaluate(options: EvaluationOptions) -> tuple[ValidationResult, Path]:
    """Evaluate weights on a split; returns the result and the folder with its files.

    Raises:
        UserError: unusable weights, data, device or option.
    """
    options.check()
    device = single_device(options.device)
    amp = resolve_amp(options.amp, device)
    size = whole_size(options.imgsz)
    model = inference_model(load_checkpoint(options.weights), device)
    data = load_data_config(options.data)
    if model.num_classes != data.num_classes:
        raise UserError(f"{options.weights} knows {model.num_classes} classes, {options.data} names {data.num_classes}")
    workers = default_workers(1, options.batch) if options.workers is None else options.workers
    evaluation = open_evaluation_set(
        data, options.split, image_size=size, batch_size=options.batch, workers=workers, rect=options.rect
    )
    log.info(
        f"{options.weights}: {model.graph_name}, fused, on {device}, amp {amp}; {options.split} of {options.data}, "
        f"{size} px {'rectangular' if options.rect else 'square'}, batch {options.batch}, confidence {options.conf:g}, "
        f"IoU {options.iou:g}, at most {options.max_det} detections an image"
    )
    log.info(evaluation.report.summary())
    try:
        result = validate(
            model,
            evaluation,
            conf=options.conf,
            iou=options.iou,
            max_det=options.max_det,
            amp=amp,
            channels_last=True,
            title=f"val {options.split}",
        )
    finally:
        evaluation.loader.close()
    folder = new_run(options.project, options.name).path
    save_evaluation(result, data.names, folder, plots=options.plots)
    return result, folder


def inference_model(model: DetectionModel, device: torch.device) -> DetectionModel:
    """`model` fused, in evaluation mode, on `device`, in channels_last layout; the given one is left as it is."""
    model = (model if model.is_fused else fuse(model)).to(device).eval()
    nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def single_device(device: str | None) -> torch.device:
    """The one device of a command that runs in one process; raises `UserError` for a list or an absent device."""
    if device and "," in device:
        raise UserError(f"device {device!r}: this command uses one device; name one of them")
    return parse_device(device)


def whole_size(size: int) -> int:
    """`size` in pixels rounded up to a multiple of the largest stride, with a line where that changes it."""
    rounded = -(-size // STRIDE) * STRIDE
    if rounded != size:
        log.info(f"image size {size} is not a multiple of {STRIDE}: using {rounded}")
    return rounded
