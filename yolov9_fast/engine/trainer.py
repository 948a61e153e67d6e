"""The training loop: any graph, with or without PGI's auxiliary branch.

The published recipe (paper, appendix table 1): SGD in three groups, warm-up, linear learning rate, steps over the
gradients of 64 images, gradient norm at most 10, moving average of the weights, no mosaic in the last epochs.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import os
import random
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from yolov9_fast.data import load_data_config
from yolov9_fast.engine.callbacks import BatchResult, Callback, CallbackList, EpochResult
from yolov9_fast.engine.clock import PhaseClock
from yolov9_fast.engine.config import TrainConfig, read_config
from yolov9_fast.engine.device import computing_on, resolve_amp, round_image_size, to_channels_last
from yolov9_fast.engine.distributed import ProcessGroup, clear_endings, join_process_group, leave_process_group
from yolov9_fast.engine.ema import ModelEMA
from yolov9_fast.engine.freed_memory import keeping_freed_memory
from yolov9_fast.engine.initial_weights import build_model
from yolov9_fast.engine.interrupts import InterruptMonitor, progress_bar
from yolov9_fast.engine.loss_scale import LossScale
from yolov9_fast.engine.optimizer import Schedule, build_optimizer
from yolov9_fast.engine.report import loss_text, validation_columns
from yolov9_fast.engine.resumption import check_classes, check_unfinished, data_changes, reading_state
from yolov9_fast.engine.run_callbacks import imported_callbacks, run_callbacks
from yolov9_fast.engine.run_files import RunFolder, find_run, load_state, new_run, save_state
from yolov9_fast.engine.step import PHASES, TrainStep
from yolov9_fast.engine.training_data import open_training_data
from yolov9_fast.engine.training_state import TrainingState
from yolov9_fast.engine.validator import ValidationResult, validate
from yolov9_fast.errors import UserError
from yolov9_fast.losses import DetectionLoss, parse_terms
from yolov9_fast.models import DetectionModel, load_checkpoint
from yolov9_fast.models.model import MAX_STRIDE
from yolov9_fast.nn.sync_batch_norm import convert_sync_batch_norm

log = logging.getLogger(__name__)


class TrainingDivergedError(UserError):
    """An epoch without one finite optimiser step."""


class Trainer:
    """One training run.

    `Trainer(config).run()` trains from the start. `Trainer.resume(project, name).run()` continues after the last
    finished epoch, and ends with the weights of an uninterrupted run.

    Args:
        config: the run's options.
        callbacks: called at the run's events, after its own ones (`engine.callbacks`).
        process_group: of this process (None: from the environment that `torchrun` sets).
        run: the folder of a run to resume (None: make a new one).

    Attributes:
        config: the run's options; `imgsz`, `class_tower` and `box_groups` have their final values.
        state: model, moving average, optimiser, counters, and a row per finished epoch.
        loader: of training batches.
        criterion: the loss; `criterion.names` are its terms.
        schedule: learning rates, momentum and gradient accumulation.
        amp: off, bf16 or fp16.
        run_folder: the run's files.
        process_group: this process's rank and device.
        resumed: whether the run was continued from a saved state.

    Raises:
        UserError: options, data, weights or device that cannot be used.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        callbacks: Sequence[Callback] = (),
        process_group: ProcessGroup | None = None,
        run: RunFolder | None = None,
    ) -> None:
        config.require_data()
        self.process_group = group = process_group or join_process_group(
            config.device, deterministic=config.deterministic
        )
        if config.batch % group.size:
            raise UserError(f"batch: expected a multiple of the {group.size} processes, got {config.batch}")
        config = dataclasses.replace(config, imgsz=round_image_size(config.imgsz))
        random.seed(config.seed)
        np.random.seed(config.seed)
        torch.manual_seed(config.seed)
        self.resumed = run is not None
        self.amp = resolve_amp(config.amp, group.device)
        self.training_data = open_training_data(config, group)
        self.loader = self.training_data.loader
        model, self.config = build_model(config, self.training_data, load=not self.resumed)
        self._build_step(model)
        callbacks = [*run_callbacks(self.config), *imported_callbacks(self.config.callbacks), *callbacks]
        own = run or (new_run(config.project, config.name) if group.is_main else None)
        path = Path(group.broadcast_object(own and own.path))
        self.run_folder = own or RunFolder(path)
        self.callbacks = CallbackList([c for c in callbacks if group.is_main or c.every_process])
        self._interrupts = InterruptMonitor()

    @classmethod
    def resume(
        cls,
        project: str | Path,
        name: str | None = None,
        *,
        device: str | None = None,
        workers: int | None = None,
        data: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> Trainer:
        """Continue a run after its last finished epoch, or make up for its final evaluation.

        Only device, workers, callbacks, and images and labels may differ, the classes may not. A warning tells how the
        data differs from what the run had before.

        Args:
            project: the folder of runs.
            name: the run; None: the newest.
            data: data file; None: the run's own.

        Raises:
            UserError: there is no run with a state, or the data has other classes.
            RunFinishedError: nothing is left to do.
            CheckpointError: its state is damaged.
        """
        run = find_run(project, name)
        saved = load_state(run.state)
        config = read_config(run.config)
        changes = {"device": device, "workers": workers, "data": None if data is None else str(data)}
        config = dataclasses.replace(config, **{k: v for k, v in changes.items() if v is not None})  # type: ignore[arg-type]
        with reading_state(run):
            check_unfinished(run, config, saved)
            check_classes(load_data_config(config.data), saved)
        trainer = cls(config, callbacks=callbacks, run=run)
        with reading_state(run):
            trainer._restore(saved)
        left = "" if trainer._epochs_left() else "; the final evaluation is left to do"
        log.info(f"resuming {run.path}: {saved['epoch'] + 1} of {config.epochs} epochs are done{left}")
        return trainer

    def _build_step(self, model: DetectionModel) -> None:
        config, group = self.config, self.process_group
        model.to(group.device)
        if config.channels_last:
            to_channels_last(model)
        if group.is_distributed:
            group.broadcast_state(model)
            if config.sync_bn:
                convert_sync_batch_norm(model)
        self._frozen = list(model.model)[: config.freeze]
        for layer in self._frozen:
            layer.requires_grad_(False)
        self.schedule = Schedule.from_config(config, len(self.loader))
        optimizer = build_optimizer(
            model,
            config.optimizer,
            lr=config.lr0,
            momentum=config.momentum,
            weight_decay=config.weight_decay * config.batch * self.schedule.accumulate / config.nominal_batch,
        )
        scale = LossScale(group.device, enabled=self.amp == "fp16")
        self.state = TrainingState(
            model,
            ModelEMA(model, config.ema_decay),
            optimizer,
            scale,
            warmup_iterations=self.schedule.warmup_iterations,
            data=self.training_data.description,
        )
        self.criterion = DetectionLoss(
            model.num_classes,
            lead_head_guided=config.lead_head_guided,
            auxiliary_weight=config.auxiliary_weight,
            box_gain=config.box,
            cls_gain=config.cls,
            dfl_gain=config.dfl,
            class_pos_weight=config.cls_pw,
            label_smoothing=config.label_smoothing,
            focal_gamma=config.fl_gamma,
            terms=parse_terms(config.loss_terms),
        )
        self.step = TrainStep(
            self.state,
            self.criterion,
            group.device,
            amp=self.amp,
            clip=config.clip,
            channels_last=config.channels_last,
            group=group,
            capture=config.capture,
            pixels=self.training_data.pixels,
        )

    def _restore(self, saved: dict[str, Any]) -> None:
        self.state.restore(saved)
        self.schedule = dataclasses.replace(self.schedule, warmup_iterations=self.state.warmup_iterations)
        changes = data_changes(saved, self.state.data)
        if changes:
            log.warning(f"{self.training_data.config.file}: the run continues on other data: {changes}")

    @property
    def model(self) -> DetectionModel:
        """The network that is trained; `state.ema.model` has the averaged weights, which are validated and saved."""
        return self.state.model

    @property
    def class_names(self) -> dict[int, str]:
        """Class index → name."""
        return self.training_data.config.names

    @property
    def best_weights(self) -> Path:
        """The weights file of the best epoch so far."""
        return self.run_folder.best if self.run_folder.best.is_file() else self.run_folder.last

    @property
    def resume_command(self) -> str:
        """The command that continues this run, as a shell takes it, from any working directory."""
        path = Path(os.path.abspath(self.run_folder.path))
        return f"yolov9-fast train --resume --project {shlex.quote(str(path.parent))} --name {shlex.quote(path.name)}"

    def stop(self, reason: str) -> None:
        """End training after this epoch (in every process); for callbacks. The run has then finished."""
        self.state.stopped = reason or "stopped by a callback"

    def _advice(self) -> str:
        if self.state.finished:
            return f"the run has finished; results in {self.run_folder.path}"
        return f"the last finished epoch is saved; continue with: {self.resume_command}"

    def _epochs_left(self) -> range:
        return range(self.config.epochs if self.state.stopped else self.state.epoch + 1, self.config.epochs)

    def run(self) -> ValidationResult | None:
        """Train to the last epoch, or until a callback stops the run, and evaluate the best weights.

        Returns:
            The result of the best weights on rank 0, None elsewhere.

        Raises:
            TrainingDivergedError: an epoch without one finite optimiser step.
            UserError: the last epoch could not be saved.
        """
        epochs = self._epochs_left()
        fixed_sizes, deterministic = not self.config.multi_scale, self.config.deterministic
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                computing_on(self.process_group.device, fixed_sizes=fixed_sizes, deterministic=deterministic)
            )
            stack.enter_context(keeping_freed_memory(self.process_group.device))
            for resource in (self.training_data.evaluation.loader, self.loader, *self.callbacks):
                stack.callback(resource.close)
            with clear_endings(self._advice):
                with self._interrupts:
                    self.callbacks.call(Callback.on_train_start, self)
                    for epoch in epochs:
                        self._run_epoch(epoch)
                        if self.state.stopped:
                            log.info(f"stopped: {self.state.stopped}")
                            break
                self.callbacks.call(Callback.on_train_end, self)
                return self._evaluate_best()

    def _run_epoch(self, epoch: int) -> None:
        state, group = self.state, self.process_group
        row = self._train_epoch(epoch)
        group.broadcast_state(state.ema.model)
        title = f"epoch {epoch + 1}/{self.config.epochs} val"
        validation = self._validate(state.ema.model, title, self.criterion)
        state.epoch, state.iteration = epoch, state.iteration + len(self.loader)
        # Pending gradients are each process's own until the next update; averaged, one state serves all processes.
        group.average(state.flat.gradients)
        if group.is_main:
            row |= validation_columns(validation)
            row["seconds"] = sum(value for name, value in row.items() if name.startswith("seconds/"))
        result = EpochResult(epoch, row, validation)
        self.callbacks.call(Callback.on_validation_end, self, result)
        if group.is_main:
            # Callbacks may have added tensors or NumPy numbers; the state takes plain ones.
            row.update({name: float(value) for name, value in row.items() if not isinstance(value, int)})
            if validation.fitness > state.best_fitness or not self.training_data.evaluation.has_objects:
                state.best_fitness, state.best_epoch = validation.fitness, epoch
            state.rows.append(row)
        self.callbacks.call(Callback.on_epoch_end, self, result)
        reasons = group.gather_objects(state.stopped)
        state.stopped = group.broadcast_object(next(filter(None, reasons), ""))

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        """Train on every batch once; returns the training columns of results.csv."""
        config, state, batches = self.config, self.state, len(self.loader)
        self.loader.set_epoch(epoch, mosaic=epoch < config.epochs - config.close_mosaic)
        state.model.train()
        for layer in self._frozen:
            layer.eval()
        self.callbacks.call(Callback.on_epoch_start, self, epoch)
        state.flat.refresh()
        self.step.reset_totals()
        updates = 0
        title = f"epoch {epoch + 1}/{config.epochs}"
        clock = PhaseClock(*PHASES, device=self.process_group.device)
        waited = self.loader.waited
        with progress_bar(self.loader, title, shown=self.process_group.is_main) as bar:
            for index, batch in enumerate(bar):
                self._interrupts.check()
                iteration = state.iteration + index
                accumulate = self.schedule.apply(state.optimizer, iteration, epoch)
                update = iteration - state.last_step >= accumulate
                size = self._image_size(iteration)
                images = batch.images if batch.planned is None else batch.planned
                loss, skipped = self.step(images, batch.targets, size=size, update=update, clock=clock)
                if batch.planned is not None:
                    batch = dataclasses.replace(batch, images=self.step.images, planned=None)
                if update:
                    updates, state.last_step = updates + 1, iteration
                clock.end("step")
                result = BatchResult(epoch, index, iteration, batch, loss, update, skipped)
                self.callbacks.call(Callback.on_batch_end, self, result)
                if not bar.disable and (index % 10 == 0 or index == batches - 1):
                    bar.set_postfix_str(loss_text(self._mean_loss(self.step.totals)), refresh=False)
        skipped_steps = int(self.step.skipped)
        self._report_skipped(epoch, updates, skipped_steps)
        row: dict[str, float] = {"epoch": epoch + 1}
        totals = self.process_group.sum(self.step.totals)
        row |= {f"train/{name}": value for name, value in self._mean_loss(totals).items()}
        groups = zip(("bias", "weight", "bn"), state.optimizer.param_groups, strict=True)
        row |= {f"lr/{name}": group["lr"] for name, group in groups}
        row |= {"skipped_steps": skipped_steps, "seconds_waiting": self.loader.waited - waited}
        return row | {f"seconds/{name}": value for name, value in clock.seconds.items()}

    def _mean_loss(self, totals: Tensor) -> dict[str, float]:
        """`totals`: the sum of each loss term over batches, then the number of batches."""
        return dict(zip(self.criterion.names, (totals[:-1] / totals[-1].clamp_min(1)).tolist(), strict=True))

    def _image_size(self, iteration: int) -> int | None:
        """Multi-scale training: a size by seed and iteration only, 0.5 to 1.5 times `imgsz`, from 64 pixels."""
        if not self.config.multi_scale:
            return None
        # At 32 pixels BatchNorm has one value per channel and image.
        smallest = min(self.config.imgsz, 2 * MAX_STRIDE)
        low, high = (max(int(self.config.imgsz * factor), smallest) // MAX_STRIDE for factor in (0.5, 1.5))
        return random.Random(f"{self.config.seed}-{iteration}").randint(low, high) * MAX_STRIDE

    def _report_skipped(self, epoch: int, updates: int, skipped: int) -> None:
        self.state.skipped_steps += skipped
        # fp16 begins by halving its loss scale until the gradients fit; such skipped steps do not count as divergence.
        searching_scale = self.amp == "fp16" and float(self.state.scale.value) >= 1
        if updates and skipped == updates and not searching_scale:
            raise TrainingDivergedError(
                f"epoch {epoch + 1}: not one of {updates} optimiser steps was finite; lower --lr0, or use --amp off"
            )
        if skipped:
            log.info(f"epoch {epoch + 1}: {skipped} of {updates} optimiser steps skipped (gradients not finite)")

    def _validate(self, model: DetectionModel, title: str, criterion: DetectionLoss | None = None) -> ValidationResult:
        return validate(
            model,
            self.training_data.evaluation,
            conf=self.config.conf,
            iou=self.config.iou,
            max_det=self.config.max_det,
            amp=self.amp,
            criterion=criterion,
            process_group=self.process_group,
            channels_last=self.config.channels_last,
            title=title,
            capture=self.config.capture,
        )

    def _evaluate_best(self) -> ValidationResult | None:
        group = self.process_group
        self.state.finished = False
        group.barrier()
        model = copy.deepcopy(self.state.ema.model)
        if group.is_main:
            model.load_state_dict(load_checkpoint(self.best_weights).state_dict())
        group.broadcast_state(model)
        result = self._validate(model, "best weights")
        self.callbacks.call(Callback.on_evaluation_end, self, result)
        self.state.finished = True
        if group.is_main:
            save_state(self.run_folder.state, self.state.capture())
        return result if group.is_main else None


def train(config: TrainConfig, *, callbacks: Sequence[Callback] = ()) -> ValidationResult | None:
    """Train from the start; the result of the best weights on rank 0, None elsewhere.

    Args:
        config: the run's options.
        callbacks: called at the run's events.

    Raises:
        UserError: as `Trainer` and `Trainer.run`.
    """
    with clear_endings():
        try:
            return Trainer(config, callbacks=callbacks).run()
        finally:
            leave_process_group()
