"""Options of a training run; the defaults are the published recipe (paper, appendix table 1)."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import sys
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yolov9_fast._lazy import require
from yolov9_fast._text import printable
from yolov9_fast._untrusted import read_yaml, shown, user_path
from yolov9_fast.atomic import atomic_write
from yolov9_fast.data import AugmentConfig
from yolov9_fast.errors import UserError

AMP_MODES = ("auto", "off", "bf16", "fp16")
_POSITIVE = ("epochs", "imgsz", "batch", "nominal_batch", "max_det")
_FRACTIONS = ("conf", "iou", "momentum", "warmup_momentum", "ema_decay", "label_smoothing")


def check_numbers(
    options: object,
    *,
    positive: Iterable[str] = (),
    fractions: Iterable[str] = (),
    not_negative: Iterable[str] = (),
    optional: bool = True,
) -> None:
    """Check numbers among the attributes of `options` by their names.

    Args:
        positive: integers of at least 1.
        fractions: in [0, 1].
        not_negative: finite, at least 0.
        optional: None passes.

    Raises:
        UserError: names the first wrong one.
    """
    limits = (
        (positive, numbers.Integral, 1.0, math.inf, "at least 1"),
        (fractions, numbers.Real, 0.0, 1.0, "a value in [0, 1]"),
        (not_negative, numbers.Real, 0.0, sys.float_info.max, "a finite value of at least 0"),
    )
    for names, kind, low, high, expected in limits:
        for name in names:
            value = getattr(options, name)
            if (value is None and optional) or (isinstance(value, kind) and low <= float(value) <= high):
                continue
            raise UserError(f"{name}: expected {expected}, got {shown(value)}")


def _option(default: Any, text: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": text, **extra})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a run; written to `config.yaml` in its folder.

    Raises:
        UserError: a value that no run can use.
    """

    model: str = _option("yolov9-t", "network name or graph YAML")
    auxiliary: str = _option(
        "default",
        "auxiliary branch: default (the graph's own), none, pfh, fpn, pan, icn, BACKBONE,NECK, module:function",
    )
    data: str = _option("", "data file (YAML)")
    weights: str | None = _option(None, "weights to start from, of this project or a foreign checkpoint")
    classes_by_index: bool = _option(False, "load the classes of the weights by index, whatever their names")
    epochs: int = _option(100, "epochs")
    imgsz: int = _option(640, "image size in pixels (long side), a multiple of 32")
    batch: int = _option(16, "images per step, over all processes")
    device: str | None = _option(None, "cpu, 0, or 0,1 (several: one process each)")
    amp: str = _option("auto", "mixed precision: auto (as `yolov9-fast info` says for the device)", choices=AMP_MODES)
    workers: int | None = _option(None, "loader processes (default: by the machine's cores)")
    seed: int = _option(0, "seed of weights, order and augmentation")
    deterministic: bool = _option(False, "the same bits in every run, also on a GPU; slower there")
    capture: str = _option(
        "auto", "record steps as CUDA graphs: auto (on a GPU, where it works) or off", choices=("auto", "off")
    )
    project: str = _option("runs/train", "folder of runs")
    name: str = _option("exp", "name of this run; an existing one is never overwritten")

    optimizer: str = _option("sgd", "optimiser", choices=("sgd", "adam", "adamw"))
    lr0: float = _option(0.01, "learning rate")
    lrf: float = _option(0.01, "final learning rate as a factor of lr0")
    schedule: str = _option("linear", "learning-rate schedule", choices=("linear", "cosine", "constant"))
    momentum: float = _option(0.937, "SGD momentum, Adam beta1")
    weight_decay: float = _option(5e-4, "weight decay for a batch of 64")
    warmup_epochs: float = _option(3.0, "warm-up (at least 100 iterations unless 0)")
    warmup_momentum: float = _option(0.8, "momentum at the start of warm-up")
    warmup_bias_lr: float = _option(0.1, "learning rate of biases at the start of warm-up")
    nominal_batch: int = _option(64, "images per optimiser step, by accumulation")
    clip: float = _option(10.0, "largest gradient norm (0: no clipping)")
    ema_decay: float = _option(0.9999, "decay of the averaged weights")
    patience: int = _option(100, "epochs without improvement before stopping (0: never)")
    freeze: int = _option(0, "number of first layers to keep as they are")
    multi_scale: bool = _option(False, "vary the image size by a factor of 0.5 to 1.5 per batch, from 64 pixels")
    sync_bn: bool = _option(True, "BatchNorm statistics over all processes")
    channels_last: bool = _option(True, "channels_last memory format")

    box: float = _option(7.5, "gain of the box loss")
    cls: float = _option(0.5, "gain of the class loss")
    dfl: float = _option(1.5, "gain of the distribution focal loss")
    cls_pw: float = _option(1.0, "weight of positive classes in the class loss")
    label_smoothing: float = _option(0.0, "label smoothing")
    fl_gamma: float = _option(0.0, "gamma of focal loss (0: off)")
    auxiliary_weight: float = _option(0.25, "weight of the auxiliary branch's loss")
    loss_terms: str = _option("", "loss terms of your own: module:function or module:function=WEIGHT, comma-separated")
    lead_head_guided: bool = _option(False, "assign the auxiliary branch by the main head")
    class_tower: int | None = _option(None, "width of the class branch")
    box_groups: int | None = _option(None, "groups of the box branch: 4 as published, 1 dense (default: the graph's)")

    close_mosaic: int = _option(15, "last epochs without mosaic, mixup and copy-paste")
    rect: bool = _option(False, "rectangular batches in validation (less padding; AP differs a little)")
    cache: str | None = _option(
        "auto",
        "keep decoded images: auto (in memory where they fit in half of the free), ram, disk or off",
        choices=("auto", "ram", "disk", "off"),
    )
    augment_on: str = _option(
        "cpu",
        "where images are augmented: cpu (loader processes), gpu (the run's device, which holds all training images)",
        choices=("cpu", "gpu"),
    )
    save_period: int = _option(0, "keep the weights of every n-th epoch (0: only last and best)")
    conf: float = _option(0.001, "confidence threshold of validation")
    iou: float = _option(0.7, "IoU threshold of NMS in validation")
    max_det: int = _option(300, "detections per image in validation")
    plots: bool = _option(True, "draw plots")
    tensorboard: bool = _option(True, "write TensorBoard events if tensorboard is installed")
    callbacks: str = _option("", "callbacks of your own: module:class, comma-separated")
    augmentations: str = _option("", "augmentations of your own: module:function, comma-separated")
    augmentations_before: str = _option("", "likewise, on each source image before the mosaic")
    augment_preview: int = _option(0, "draw so many training samples with their boxes before training")
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        numbers = {f.name for f in option_fields() if isinstance(getattr(self, f.name), int | float)}
        others = sorted(numbers - {*_POSITIVE, *_FRACTIONS})
        check_numbers(self, positive=_POSITIVE, fractions=_FRACTIONS, not_negative=others)
        for f in option_fields():
            choices = f.metadata.get("choices")
            value = getattr(self, f.name)
            if choices and value is not None and value not in choices:
                raise UserError(f"{f.name}: expected one of {', '.join(choices)}, got {shown(value)}")

    def require_data(self) -> None:
        """Raise `UserError` if no data file is named, as in a recipe for any data."""
        if not self.data:
            raise UserError("data: expected a data file, got none (--data FILE.yaml)")


def option_fields() -> list[dataclasses.Field[Any]]:
    """The plain options of `TrainConfig` (without the augmentation's)."""
    return [f for f in dataclasses.fields(TrainConfig) if f.name != "augment"]


def plain_type(cls: type, name: str) -> tuple[type, bool]:
    """The type of a field and whether it may be None."""
    hint = typing.get_type_hints(cls)[name]
    optional = isinstance(hint, types.UnionType | typing._UnionGenericAlias)  # type: ignore[attr-defined]
    if optional:
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    return hint, optional


def _converted(cls: type, name: str, value: Any, origin: str) -> Any:
    kind, optional = plain_type(cls, name)
    if value is False and kind is str:
        value = "off"  # which YAML reads as false
    if value is None and optional:
        return None
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{origin}: {name}: expected {kind.__name__}, got {shown(value)}")
    return value


def config_from_dict(data: dict[str, Any], origin: str) -> TrainConfig:
    """A `TrainConfig` from plain data; augmentation options may be under `augment` or among the others.

    Args:
        data: option → value.
        origin: what the data were read from, for error messages.

    Raises:
        UserError: an unknown option, or a value of the wrong type or range.
    """
    flat = _flat_options(data, origin)
    own = {f.name for f in option_fields()}
    augmentation = {f.name for f in dataclasses.fields(AugmentConfig)}
    unknown = [name if isinstance(name, str) else shown(name) for name in flat if name not in own | augmentation]
    if unknown:
        raise UserError(f"{origin}: unknown option {printable(', '.join(sorted(unknown)))}")
    options = {k: _converted(TrainConfig, k, v, origin) for k, v in flat.items() if k in own}
    augment = {k: _converted(AugmentConfig, k, v, origin) for k, v in flat.items() if k in augmentation}
    return TrainConfig(**options, augment=AugmentConfig(**augment))


def _flat_options(data: Any, origin: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise UserError(f"{origin}: expected a table of options, got {shown(data)}")
    augment = data.get("augment")
    if not isinstance(augment, dict | None):
        raise UserError(f"{origin}: augment: expected a table of options, got {shown(augment)}")
    return {key: value for key, value in {**data, **(augment or {})}.items() if key != "augment"}


def read_config(path: Path) -> TrainConfig:
    """Read options from a YAML file; raises `UserError` if it cannot be used."""
    return config_from_dict(_read_options(path), str(path))


def read_options(path: Path) -> dict[str, Any]:
    """The options that a YAML file names, those of the augmentation among them; raises `UserError` as `read_config`."""
    data = _read_options(path)
    config = config_from_dict(data, str(path))
    values = {**dataclasses.asdict(config), **dataclasses.asdict(config.augment)}
    return {name: values[name] for name in _flat_options(data, str(path))}


def _read_options(path: Path) -> Any:
    data = read_yaml(path, "options file", UserError)
    return {} if data is None else data


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """`config` with its paths as they can be used from any working directory."""
    paths: dict[str, Any] = {"data": config.data, "weights": config.weights, "project": config.project}
    if Path(config.model).suffix in (".yaml", ".yml"):
        paths["model"] = config.model
    absolute: dict[str, Any] = {
        name: os.path.abspath(user_path(path, name, UserError)) for name, path in paths.items() if path
    }
    return dataclasses.replace(config, **absolute)


def write_config(config: TrainConfig, path: Path) -> None:
    """Write all options as YAML."""
    yaml = require("yaml")
    atomic_write(path, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
