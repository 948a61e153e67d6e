"""The callbacks of every run: its files, TensorBoard, plots, messages and early stopping."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from yolov9_fast import viz
from yolov9_fast._lazy import import_callable, require
from yolov9_fast.atomic import atomic_write
from yolov9_fast.data.sample import collate
from yolov9_fast.engine.callbacks import BatchResult, Callback, EpochResult
from yolov9_fast.engine.config import TrainConfig, with_absolute_paths, write_config
from yolov9_fast.engine.report import loss_text, save_evaluation, try_plot
from yolov9_fast.engine.run_files import save_state, write_results
from yolov9_fast.engine.validator import ValidationResult
from yolov9_fast.errors import UserError
from yolov9_fast.models import save_weights

if TYPE_CHECKING:
    from yolov9_fast.engine.trainer import Trainer

log = logging.getLogger(__name__)
_PLOTTED_BATCHES = 3
_MUCH_WAITING = 0.1


def run_callbacks(config: TrainConfig) -> list[Callback]:
    """What `config` asks for, in the order of the calls: an epoch is saved before it is reported."""
    tensorboard = TensorBoard() if config.tensorboard else None
    callbacks = [
        EarlyStopping(config.patience) if config.patience else None,  # First: the state that is saved knows of it.
        SaveRun(config.save_period),
        tensorboard,
        Plots(tensorboard) if config.plots else None,
        Preview(config.augment_preview) if config.augment_preview else None,
        Messages(),
    ]
    return [callback for callback in callbacks if callback is not None]


def imported_callbacks(paths: str) -> list[Callback]:
    """The callbacks that comma-separated import paths `module:class` make, called without arguments.

    Raises:
        UserError: a path that leads to no callback.
    """
    callbacks = []
    for path in filter(None, paths.split(",")):
        try:
            callback = import_callable(path)()
        except (ValueError, TypeError) as error:
            raise UserError(f"callbacks: {error}") from error
        if not isinstance(callback, Callback):
            raise UserError(f"callbacks: expected {path} to make a Callback, got {type(callback).__name__}")
        callbacks.append(callback)
    return callbacks


class SaveRun(Callback):
    """Options, weights, `results.csv` and the state to resume from.

    A full disk leaves the previous files as they were and is reported; training continues, and the run ends with the
    error if its last epoch could not be saved.

    Args:
        period: keep the weights of every `period`-th epoch; 0: only last and best.
    """

    def __init__(self, period: int = 0) -> None:
        self.period = period
        self._error: UserError | None = None
        self._saved_stop = ""

    def on_train_start(self, trainer: Trainer) -> None:
        self._saved_stop = trainer.state.stopped
        if not trainer.resumed:
            # A run killed in its first epoch can be resumed too, and a full disk is found before any work.
            save_state(trainer.run_folder.state, trainer.state.capture())
        # Second: a folder with options can be resumed.
        write_config(with_absolute_paths(trainer.config), trainer.run_folder.config)

    def on_epoch_end(self, trainer: Trainer, result: EpochResult) -> None:
        state, folder, number = trainer.state, trainer.run_folder, result.epoch + 1
        targets = [folder.last]
        if state.best_epoch == result.epoch:
            targets.append(folder.best)
        if self.period and number % self.period == 0:
            targets.append(folder.weights / f"epoch{number}.safetensors")
        metadata = {"epoch": number, "fitness": result.validation.fitness, "image_size": trainer.config.imgsz}
        try:
            for target in targets:
                save_weights(state.ema.model, target, metadata=metadata)
            write_results(folder.results, state.rows)
            save_state(folder.state, state.capture())  # Last: a state never counts an epoch whose weights are missing.
            self._error, self._saved_stop = None, state.stopped
        except UserError as error:
            log.error("epoch %d was not saved: %s; training continues", number, error)
            self._error = error

    def on_train_end(self, trainer: Trainer) -> None:
        if self._error is not None:
            raise self._error
        if trainer.state.stopped != self._saved_stop:  # A callback that is called after this one stopped the run.
            save_state(trainer.run_folder.state, trainer.state.capture())

    def on_evaluation_end(self, trainer: Trainer, result: ValidationResult) -> None:
        save_evaluation(result, trainer.class_names, trainer.run_folder.path, plots=trainer.config.plots)


class TensorBoard(Callback):
    """A TensorBoard scalar for every number of an epoch's row; one log line if tensorboard is not installed."""

    def __init__(self) -> None:
        self._writer: Any = None

    def on_train_start(self, trainer: Trainer) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.info("TensorBoard events are off: `pip install tensorboard` turns them on")
            return
        # The step of an epoch is its number, counted from 1; what is purged begins with the next epoch.
        purge_step = trainer.state.epoch + 2 if trainer.resumed else None
        self._writer = SummaryWriter(str(trainer.run_folder.path), purge_step=purge_step)

    def on_epoch_end(self, trainer: Trainer, result: EpochResult) -> None:
        if self._writer is None:
            return
        for key, value in result.row.items():
            if key != "epoch":
                self._writer.add_scalar(key, value, result.epoch + 1)
        self._writer.flush()

    def add_image(self, tag: str, image: np.ndarray) -> None:
        """`image`: uint8 RGB [H, W, 3]."""
        if self._writer is not None:
            self._writer.add_image(tag, image, 0, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Plots(Callback):
    """Label statistics, the first batches with their boxes, and the curves of `results.csv`."""

    def __init__(self, tensorboard: TensorBoard | None = None) -> None:
        self._tensorboard = tensorboard

    def on_train_start(self, trainer: Trainer) -> None:
        out = trainer.run_folder.path / "labels.png"
        if not out.is_file():  # Also where a run was killed before it drew them.
            try_plot(viz.plot_labels, trainer.training_data.labels, trainer.class_names, out)

    def on_batch_end(self, trainer: Trainer, result: BatchResult) -> None:
        if result.epoch > 0 or result.index >= _PLOTTED_BATCHES:
            return
        try_plot(self._draw_batch, trainer, result)

    def on_evaluation_end(self, trainer: Trainer, result: ValidationResult) -> None:
        try_plot(viz.plot_results, trainer.run_folder.results, trainer.run_folder.path / "results.png")

    def _draw_batch(self, trainer: Trainer, result: BatchResult) -> None:
        name = f"train_batch{result.index}"
        image = viz.draw_targets(result.batch.images, result.batch.targets, trainer.class_names)
        atomic_write(trainer.run_folder.path / f"{name}.jpg", require("cv2").imencode(".jpg", image)[1].tobytes())
        if self._tensorboard is not None:
            self._tensorboard.add_image(name, np.ascontiguousarray(image[..., ::-1]))


class Preview(Callback):
    """The first `count` training samples of the next epoch with their boxes, a picture each, before training."""

    def __init__(self, count: int) -> None:
        self.count = count

    def on_train_start(self, trainer: Trainer) -> None:
        epoch, config, dataset = trainer.state.epoch + 1, trainer.config, trainer.loader.dataset
        trainer.loader.set_epoch(epoch, mosaic=epoch < config.epochs - config.close_mosaic)
        for number, key in enumerate(itertools.islice(trainer.loader.keys(), self.count)):
            batch = collate([dataset[key]])
            image = viz.draw_targets(trainer.training_data.images_of(batch), batch.targets, trainer.class_names)
            data = require("cv2").imencode(".jpg", image)[1].tobytes()
            atomic_write(trainer.run_folder.path / f"augment_preview{number}.jpg", data)


class Messages(Callback):
    """Log lines about the run, every epoch, and the final result."""

    def on_train_start(self, trainer: Trainer) -> None:
        config = trainer.config
        mosaic = max(config.epochs - config.close_mosaic, 0) if config.augment.mosaic else 0
        log.info(
            f"{trainer.model.graph_name} on {trainer.process_group.size} × {trainer.process_group.device}, "
            f"{config.imgsz} px, batch {config.batch} (an optimiser step every {trainer.schedule.accumulate}), "
            f"amp {trainer.amp}, {config.epochs} epochs of {len(trainer.loader)} batches, "
            f"mosaic in the first {mosaic}; results in {trainer.run_folder.path}"
        )

    def on_epoch_end(self, trainer: Trainer, result: EpochResult) -> None:
        row, losses = result.row, result.validation.loss
        assert losses is not None
        share = row["seconds_waiting"] / max(row["seconds"], 1e-9)
        waiting = f" ({share:.0%} waiting for images)" if share >= _MUCH_WAITING else ""
        log.info(
            f"epoch {result.epoch + 1}/{trainer.config.epochs}: "
            f"train {loss_text({name: row[f'train/{name}'] for name in losses})} | "
            f"val {loss_text(losses)} | "
            f"AP {row['metrics/ap']:.4f} AP50 {row['metrics/ap50']:.4f} | {row['seconds']:.1f} s{waiting}"
        )

    def on_evaluation_end(self, trainer: Trainer, result: ValidationResult) -> None:
        assert result.metrics is not None
        state = trainer.state
        log.info(f"best weights (epoch {state.best_epoch + 1}): {trainer.best_weights}")
        log.info(result.metrics.table(), extra={"lines": True})
        if state.skipped_steps:
            log.info(f"{state.skipped_steps} optimiser steps were skipped in total (gradients not finite)")


class EarlyStopping(Callback):
    """Stop after `patience` epochs without a better fitness."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_epoch_end(self, trainer: Trainer, result: EpochResult) -> None:
        best = trainer.state.best_epoch
        if result.epoch - best >= self.patience:
            trainer.stop(f"no improvement for {self.patience} epochs; best was epoch {best + 1}")
