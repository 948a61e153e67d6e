"""Everything of a run that changes from epoch to epoch, as one object that can be saved and restored exactly."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch

from yolov9_fast.engine.ema import ModelEMA
from yolov9_fast.engine.flat import FlatStorage
from yolov9_fast.engine.loss_scale import LossScale
from yolov9_fast.engine.saved_state import check_tensors
from yolov9_fast.models import DetectionModel
from yolov9_fast.models.module_options import norm_options, set_norm_options, stored_norm_options


@dataclass
class TrainingState:
    """Model, average, optimiser and counters.

    Attributes:
        scale: of the loss, in fp16.
        flat: the buffers in which tensors of the model, its average and the optimiser lie.
        epoch: last finished epoch, counted from 0; −1 before the first.
        iteration: batches of all finished epochs, whatever their number in each.
        last_step: iteration of the last optimiser step; gradients since then are pending and part of the state.
        warmup_iterations: of the whole run, by the number of batches that its first epoch had.
        stopped: why a callback ended the run before its last epoch; empty if none did.
        finished: the final evaluation is done.
        data: what the run trains on (`TrainingData.description`); saved, and not changed by `restore`.
        rows: one table row per finished epoch (results.csv).
    """

    model: DetectionModel
    ema: ModelEMA
    optimizer: torch.optim.Optimizer
    scale: LossScale
    epoch: int = -1
    iteration: int = 0
    last_step: int = -1
    warmup_iterations: int = 0
    best_fitness: float = -1.0
    best_epoch: int = -1
    skipped_steps: int = 0
    stopped: str = ""
    finished: bool = False
    rows: list[dict[str, float]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    _COUNTERS = (
        *("epoch", "iteration", "last_step", "warmup_iterations"),
        *("best_fitness", "best_epoch", "skipped_steps", "stopped", "finished"),
    )

    def __post_init__(self) -> None:
        self.flatten()

    def flatten(self) -> None:
        """Lay out the buffers, again after the optimiser got other parameters; values stay."""
        self.flat = FlatStorage(self.model, self.ema, self.optimizer)

    def capture(self) -> dict[str, Any]:
        """Tensors, numbers and text only, so that it can be read back without executing anything."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "ema_updates": int(self.ema.updates),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scale.state_dict(),
            "gradients": [None if p.grad is None else p.grad.detach().clone() for p in self.model.parameters()],
            "rows": json.dumps(self.rows),
            "data": json.dumps(self.data),
            "torch_rng": torch.get_rng_state(),
            "batch_norm": {name: list(pair) for name, pair in norm_options(self.model).items()},
            **{name: getattr(self, name) for name in self._COUNTERS},
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Become what `capture` returned.

        Raises:
            KeyError, RuntimeError, ValueError: it belongs to another run; nothing has changed.
        """
        check_tensors(saved, self.capture(), list(self.model.parameters()), self.optimizer)
        norms = stored_norm_options(saved.get("batch_norm", {}))
        for model in (self.model, self.ema.model):
            set_norm_options(model, norms)
        self.model.load_state_dict(saved["model"])
        self.ema.model.load_state_dict(saved["ema"])
        self.ema.updates.fill_(saved["ema_updates"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.flat.take_moments()
        self.scale.load_state_dict(saved["scaler"])
        for parameter, gradient in zip(self.model.parameters(), saved["gradients"], strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        self.flat.hide_gradients()
        self.flat.show_gradients()
        self.rows = json.loads(saved["rows"])
        torch.set_rng_state(saved["torch_rng"])
        for name in self._COUNTERS:
            setattr(self, name, saved[name])
