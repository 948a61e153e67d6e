"""The network a run starts from: fresh, or from weights of any origin fitted to the run's graph and classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from yolov9_fast.data import DataConfig
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.errors import UserError
from yolov9_fast.models import (
    DetectionModel,
    calibrate_batch_norm,
    create_model,
    load_pretrained,
    suggest_architecture,
)


def build_model(
    config: TrainConfig,
    data: DataConfig,
    images: Callable[[], Iterable[Tensor]],
    *,
    announce: Callable[[str], None],
    load: bool = True,
) -> DetectionModel:
    """Make the run's network.

    The class tower's width and the box branch's groups are read from the weights unless the options name them. Weights
    that come fused are given BatchNorm again, whose statistics are measured on `images`.

    Args:
        config: the options; `class_tower` and `box_groups` are filled in where weights or graph decide them.
        images: makes batches [B, 3, H, W] in [0, 1]; called only for fused weights.
        announce: prints a line.
        load: False builds the network only (a resumed run brings its own weights, and the widths in its options).
    """
    layout = None
    if config.weights and load:
        if not Path(config.weights).is_file():
            raise UserError(f"no weights file {config.weights}")
        layout = suggest_architecture(config.weights)
        config.class_tower = config.class_tower or layout.class_tower
        config.box_groups = config.box_groups or layout.box_groups
    try:
        model = create_model(
            config.model,
            data.num_classes,
            class_tower=config.class_tower,
            box_groups=config.box_groups,
            auxiliary=config.auxiliary,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    model.head.check_trainable()
    config.box_groups = model.box_groups
    model.names = dict(data.names)
    if not (load and config.weights):
        return model
    report = load_pretrained(model, config.weights)
    if layout is not None and layout.fused:
        loaded = set(report.loaded)
        seen = calibrate_batch_norm(model, images(), only=lambda name: f"{name}.running_mean" in loaded)
        announce(f"{config.weights} is fused: BatchNorm put back, its statistics measured on {seen} training images")
    return model
