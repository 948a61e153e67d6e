"""The network a run starts from: with random weights, or with those of a file fitted to its graph and classes."""

from __future__ import annotations

import dataclasses
import logging
import os

from torch import Tensor

from yolov9_fast._untrusted import user_path
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.engine.training_data import TrainingData
from yolov9_fast.errors import UserError
from yolov9_fast.models import (
    DetectionModel,
    calibrate_batch_norm,
    create_model,
    load_pretrained,
    suggest_architecture,
)

log = logging.getLogger(__name__)
_CALIBRATION_IMAGES = 64


def build_model(
    config: TrainConfig, training_data: TrainingData, *, load: bool = True
) -> tuple[DetectionModel, TrainConfig]:
    """Make the run's network.

    The weights' classes are matched to the data's by name (`load_pretrained`). The class tower's width and the box
    branch's groups are read from the weights unless the options name them. Fused weights get BatchNorm layers again,
    whose statistics are measured on training images.

    Args:
        training_data: the classes, and training images, which are read only for fused weights.
        load: False builds the network only (a resumed run loads its own weights, and its options have the widths).

    Returns:
        The network, and `config` with `class_tower` and `box_groups` filled in.

    Raises:
        UserError: the network cannot be built or trained, or the weights cannot be read.
    """
    data, layout = training_data.config, None
    if config.weights and load:
        if not os.path.isfile(user_path(config.weights, "weights", UserError)):
            raise UserError(f"weights: expected a file, got {config.weights}")
        layout = suggest_architecture(config.weights)
        config = dataclasses.replace(
            config,
            class_tower=config.class_tower or layout.class_tower,
            box_groups=config.box_groups or layout.box_groups,
        )
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
    model.names = dict(data.names)
    if layout is not None:
        assert config.weights is not None
        names = None if config.classes_by_index else data.names
        loaded = set(load_pretrained(model, config.weights, names=names).loaded)
        if layout.fused:
            images = _calibration_images(training_data)
            seen = calibrate_batch_norm(model, images, only=lambda name: f"{name}.running_mean" in loaded)
            log.info(f"{config.weights} is fused: BatchNorm statistics measured on {seen} training images")
    return model, dataclasses.replace(config, box_groups=model.box_groups)


def _calibration_images(training_data: TrainingData) -> list[Tensor]:
    """A few training batches as the network gets them: float32 [B, 3, H, W] in [0, 1]."""
    training_data.loader.set_epoch(0, mosaic=True)
    images: list[Tensor] = []
    for batch in training_data.loader:
        images.append(training_data.images_of(batch).cpu().float().div_(255))
        if sum(map(len, images)) >= _CALIBRATION_IMAGES:
            break
    return images
