"""Callbacks: functions of a training run's events, for users and for the run's own files and messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Concatenate, ParamSpec

from torch import Tensor

from yolov9_fast.data import Batch
from yolov9_fast.engine.validator import ValidationResult

if TYPE_CHECKING:
    from yolov9_fast.engine.trainer import Trainer

P = ParamSpec("P")


@dataclass(frozen=True)
class BatchResult:
    """A finished training batch.

    Attributes:
        epoch: counted from 0.
        index: of the batch in its epoch.
        iteration: batches of all epochs before this one.
        batch: uint8 images [B, 3, H, W] and targets [n, 6]. With `augment_on` gpu the images are on the run's device,
            and the next batch overwrites them.
        loss: the loss terms in the order of `trainer.criterion.names`, float64 [terms] on the run's device; reading its
            numbers waits for a GPU.
        update: the optimiser's turn: gradient accumulation ends with this batch.
        skipped: whether the gradients were not finite, so that weights did not change; 0-dimensional bool on the run's
            device. Reading it, also by `if`, waits for a GPU.
    """

    epoch: int
    index: int
    iteration: int
    batch: Batch
    loss: Tensor
    update: bool
    skipped: Tensor


@dataclass(frozen=True)
class EpochResult:
    """A trained and validated epoch.

    Attributes:
        epoch: counted from 0.
        row: the epoch's row of `results.csv`. Numbers added in `on_validation_end` appear there and in TensorBoard.
        validation: of the averaged weights; its metrics are None on other ranks than 0.
    """

    epoch: int
    row: dict[str, float]
    validation: ValidationResult


class Callback:
    """Base class of callbacks: override the events you need.

    Events come in this order: `on_train_start`; for each epoch `on_epoch_start`, `on_batch_end` after every batch,
    `on_validation_end`, `on_epoch_end`; `on_train_end`, `on_evaluation_end`; and always, also after an error or
    Ctrl-C, `close`.

    Use `trainer` to read `config`, `state` (weights, moving average, optimiser, rows of earlier epochs), `run_folder`
    and `process_group`, and to call `trainer.stop(reason)`. An exception ends the run with a note that names the
    callback; the run resumes after its last finished epoch.

    Attributes:
        every_process: call it in every process of a data-parallel run, not on rank 0 only.
    """

    every_process: bool = False

    def on_train_start(self, trainer: Trainer) -> None:
        """Before the first epoch, also of a resumed run; the run's folder and options have been written."""

    def on_epoch_start(self, trainer: Trainer, epoch: int) -> None:
        """Before the first batch of `epoch` (counted from 0)."""

    def on_batch_end(self, trainer: Trainer, result: BatchResult) -> None:
        """After a batch, and after the optimiser's step if one was due."""

    def on_validation_end(self, trainer: Trainer, result: EpochResult) -> None:
        """After the validation of an epoch; nothing of the epoch has been saved."""

    def on_epoch_end(self, trainer: Trainer, result: EpochResult) -> None:
        """After an epoch has been saved; from here on a resumed run starts with the next one."""

    def on_train_end(self, trainer: Trainer) -> None:
        """After the last epoch."""

    def on_evaluation_end(self, trainer: Trainer, result: ValidationResult) -> None:
        """After the best weights have been evaluated at the end of the run."""

    def close(self) -> None:
        """Release what `on_train_start` opened."""


class CallbackList:
    """The callbacks of one process, called in their order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = list(callbacks)

    def __iter__(self) -> Iterator[Callback]:
        return iter(self._callbacks)

    def call(
        self,
        event: Callable[Concatenate[Callback, Trainer, P], None],
        trainer: Trainer,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> None:
        """Call `event`, a method of `Callback`, on every callback; a note with its name is added to an exception."""
        for callback in self._callbacks:
            try:
                getattr(callback, event.__name__)(trainer, *args, **kwargs)
            except Exception as error:
                name = f"{type(callback).__name__}.{event.__name__}"
                error.add_note(f"raised by the callback {name}; continue the run with: {trainer.resume_command}")
                raise
