"""Training, evaluation and prediction: everything that runs a network over data."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from yolov9_fast.engine.busy import share_cores
    from yolov9_fast.engine.callbacks import BatchResult, Callback, EpochResult
    from yolov9_fast.engine.config import TrainConfig
    from yolov9_fast.engine.evaluation import EvaluationOptions, evaluate
    from yolov9_fast.engine.predictor import Prediction, Predictor
    from yolov9_fast.engine.trainer import Trainer, TrainingDivergedError, train
    from yolov9_fast.engine.validator import EvaluationSet, ValidationResult, open_evaluation_set, validate

__all__ = [
    "BatchResult",
    "Callback",
    "EpochResult",
    "EvaluationOptions",
    "EvaluationSet",
    "Prediction",
    "Predictor",
    "TrainConfig",
    "Trainer",
    "TrainingDivergedError",
    "ValidationResult",
    "evaluate",
    "open_evaluation_set",
    "share_cores",
    "train",
    "validate",
]

_MODULES = {
    "busy": ("share_cores",),
    "callbacks": ("BatchResult", "Callback", "EpochResult"),
    "config": ("TrainConfig",),
    "evaluation": ("EvaluationOptions", "evaluate"),
    "predictor": ("Prediction", "Predictor"),
    "trainer": ("Trainer", "TrainingDivergedError", "train"),
    "validator": ("EvaluationSet", "ValidationResult", "open_evaluation_set", "validate"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


if not TYPE_CHECKING:  # a type checker sees the imports above and reports any other name

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
