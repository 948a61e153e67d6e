"""Drop-in: let code that someone else wrote use the operators: models, losses, NMS; each by one call, each undoable.

The package is callable, so that `yf.accelerate` is the function whether or not the package has been imported.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from yolov9_fast.accelerate.loss import LossReport, accelerate_loss, restore_loss
from yolov9_fast.accelerate.model import Report, accelerate, restore
from yolov9_fast.accelerate.nms import NMSFunctions, accelerate_nms

__all__ = [
    "LossReport",
    "NMSFunctions",
    "Report",
    "accelerate",
    "accelerate_loss",
    "accelerate_nms",
    "restore",
    "restore_loss",
]


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        return accelerate(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
