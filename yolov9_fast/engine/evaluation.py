"""Evaluation of a weights file: load and fuse it, validate it on a split, write the results."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from yolov9_fast._capture import check_mode
from yolov9_fast.data import load_data_config
from yolov9_fast.engine.config import check_numbers
from yolov9_fast.engine.device import (
    computing_on,
    default_workers,
    inference_model,
    resolve_amp,
    round_image_size,
    single_device,
)
from yolov9_fast.engine.distributed import ProcessGroup
from yolov9_fast.engine.report import save_evaluation
from yolov9_fast.engine.run_files import new_run
from yolov9_fast.engine.validator import ValidationResult, open_evaluation_set, validate
from yolov9_fast.errors import UserError
from yolov9_fast.models import load_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate and how; the defaults are the published settings with square images.

    Raises:
        UserError: a number out of range, or another `capture` than auto or off.
    """

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
    deterministic: bool = False
    capture: str = "auto"
    workers: int | None = None
    plots: bool = True
    project: str | Path = "runs/val"
    name: str = "exp"

    def __post_init__(self) -> None:
        check_numbers(
            self, positive=("imgsz", "batch", "max_det"), fractions=("conf", "iou"), not_negative=("workers",)
        )
        check_mode(self.capture)


def evaluate(options: EvaluationOptions) -> tuple[ValidationResult, Path]:
    """Evaluate weights on a split; returns the result and the folder with its files.

    Raises:
        UserError: unusable weights, data, device or option.
    """
    device = single_device(options.device)
    with computing_on(device, deterministic=options.deterministic):
        return _evaluate(options, device)


def _evaluate(options: EvaluationOptions, device: torch.device) -> tuple[ValidationResult, Path]:
    amp = resolve_amp(options.amp, device)
    size = round_image_size(options.imgsz)
    data = load_data_config(options.data)
    model = inference_model(load_checkpoint(options.weights), device, amp)
    if model.num_classes != data.num_classes:
        raise UserError(
            f"{options.weights}: expected {data.num_classes} classes as in {options.data}, got {model.num_classes}"
        )
    workers = default_workers(1, options.batch) if options.workers is None else options.workers
    evaluation = open_evaluation_set(
        data,
        options.split,
        image_size=size,
        batch_size=options.batch,
        workers=workers,
        rect=options.rect,
        process_group=ProcessGroup(0, 1, device),
    )
    run = new_run(options.project, options.name)
    log.info(
        f"{options.weights}: {model.graph_name}, fused, on {device}, amp {amp}; {options.split} of {options.data}, "
        f"{size} px {'rectangular' if options.rect else 'square'}, batch {options.batch}, confidence {options.conf:g}, "
        f"IoU {options.iou:g}, at most {options.max_det} detections an image"
    )
    log.info(evaluation.report.summary(), extra={"lines": True})
    if not evaluation.has_objects:
        log.warning(f"{options.data}: {options.split}: no objects, so AP is not defined")
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
            capture=options.capture,
        )
    finally:
        evaluation.loader.close()
    save_evaluation(result, data.names, run.path, plots=options.plots)
    return result, run.path
