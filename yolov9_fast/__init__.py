"""YOLOv9 with programmable gradient information: train, evaluate, predict.

`import yolov9_fast as yf` loads this file alone; a public name imports what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from yolov9_fast import data, engine, losses, metrics, models, nn, ops, viz
    from yolov9_fast._accelerate import (
        accelerate,
        accelerate_loss,
        accelerate_nms,
        capture_step,
        restore,
        restore_loss,
    )
    from yolov9_fast.engine import Callback, Predictor, TrainConfig, Trainer, train
    from yolov9_fast.models import create_model, fuse, list_models, load_checkpoint, to_deploy, unfuse
    from yolov9_fast.nn import DetectionOutput
    from yolov9_fast.ops import backend, get_backend, set_backend

__all__ = [
    "Callback",
    "DetectionOutput",
    "Predictor",
    "TrainConfig",
    "Trainer",
    "__version__",
    "accelerate",
    "accelerate_loss",
    "accelerate_nms",
    "backend",
    "capture_step",
    "create_model",
    "data",
    "engine",
    "fuse",
    "get_backend",
    "list_models",
    "load_checkpoint",
    "losses",
    "metrics",
    "models",
    "nn",
    "ops",
    "restore",
    "restore_loss",
    "set_backend",
    "to_deploy",
    "train",
    "unfuse",
    "viz",
]

_MODULE_OF = {
    **dict.fromkeys(("accelerate", "accelerate_loss", "accelerate_nms"), "_accelerate"),
    **dict.fromkeys(("capture_step", "restore", "restore_loss"), "_accelerate"),
    **dict.fromkeys(("Callback", "Predictor", "TrainConfig", "Trainer", "train"), "engine"),
    **dict.fromkeys(("create_model", "fuse", "list_models", "load_checkpoint", "to_deploy", "unfuse"), "models"),
    "DetectionOutput": "nn",
    **dict.fromkeys(("backend", "get_backend", "set_backend"), "ops"),
}
"""The module that holds each public name; all other names of `__all__` are subpackages."""

if not TYPE_CHECKING:  # a type checker sees the imports above and reports any other name

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f"{__name__}.{_MODULE_OF.get(name, name)}")
        return getattr(module, name) if name in _MODULE_OF else module


def __dir__() -> list[str]:
    return list(__all__)
