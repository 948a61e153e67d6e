"""YOLOv9 with programmable gradient information: train, evaluate, predict; every public name loads when first used."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULE_OF = {
    "create_model": "yolov9_fast.models",
    "load_checkpoint": "yolov9_fast.models",
    "to_deploy": "yolov9_fast.models",
    "fuse": "yolov9_fast.models",
    "unfuse": "yolov9_fast.models",
    "DetectionOutput": "yolov9_fast.models",
    "Predictor": "yolov9_fast.engine.predictor",
    "set_backend": "yolov9_fast.ops._backend",
    "get_backend": "yolov9_fast.ops._backend",
    "backend": "yolov9_fast.ops._backend",
    "accelerate_loss": "yolov9_fast._accelerate",
    "restore_loss": "yolov9_fast._accelerate",
    "accelerate_nms": "yolov9_fast._accelerate",
    "accelerate": "yolov9_fast._accelerate.model",
    "restore": "yolov9_fast._accelerate.model",
}
_SUBMODULES = ("data", "engine", "losses", "metrics", "models", "nn", "ops", "viz")

__all__ = ["__version__", *_MODULE_OF, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"yolov9_fast.{name}")
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'yolov9_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
