"""The one trainer: any graph, with or without PGI's auxiliary branch; the head decides the loss.

The published recipe (paper, appendix table 1): SGD in three groups, warm-up, linear learning rate, accumulation to 64
images, gradient norm at most 10, EMA, mosaic closed for the last epochs.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from yolov9_fast._lazy import require
from yolov9_fast.data import DetectionDataset, create_loader, load_data_config, load_split
from yolov9_fast.engine import report
from yolov9_fast.engine.config import TrainConfig, read_config, write_config
from yolov9_fast.engine.distributed import World, join_world, leave_world
from yolov9_fast.engine.ema import ModelEMA
from yolov9_fast.engine.interrupts import NotedInterrupt
from yolov9_fast.engine.optimizer import Schedule, accumulation, build_optimizer, lr_factor
from yolov9_fast.engine.run_files import EventLog, RunFolder, find_run, load_state, new_run, save_state, write_results
from yolov9_fast.engine.start_weights import build_model
from yolov9_fast.engine.training_state import TrainingState
from yolov9_fast.engine.validator import ValidationResult, autocast, open_evaluation_set, prepare_images, validate
from yolov9_fast.errors import CheckpointError, UserError
from yolov9_fast.losses import DetectionLoss, parse_terms
from yolov9_fast.models import load_checkpoint, save_weights
from yolov9_fast.nn.sync_batch_norm import convert_sync_batch_norm

log = logging.getLogger(__name__)
STRIDE = 32
CALIBRATION_IMAGES = 64
PHASES = ("data", "forward", "loss", "backward", "step")


class TrainingDivergedError(UserError):
    """Not one finite optimiser step in a whole epoch."""


def default_workers(world_size: int, batch: int) -> int:
    """Loader processes: the cores left beside the training process, at most 8 and no more than a batch has images."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(max(cores // world_size - 1, 0), batch, 8)


def resolve_amp(mode: str, device: torch.device) -> str:
    """The precision that `auto` means on this device: bf16 on a GPU that has it, else off."""
    if mode != "auto":
        return mode
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "off"


class Trainer:
    """One training run.

    `Trainer(config).run()` trains from the start; `Trainer.resume(project, name).run()` goes on after the last finished
    epoch, and ends as the uninterrupted run would have.

    Args:
        config: the run's options.
        world: this process among all (None: from the environment that `torchrun` sets).
        run: the folder of a run that goes on (None: a new one).
    """

    def __init__(self, config: TrainConfig, *, world: World | None = None, run: RunFolder | None = None) -> None:
        config.check()
        self.config = config
        self.world = world or join_world(config.device)
        self._resuming = run is not None
        self._save_error: UserError | None = None
        self._interrupt = NotedInterrupt()
        if config.imgsz % STRIDE:
            rounded = -(-config.imgsz // STRIDE) * STRIDE
            self._say(f"image size {config.imgsz} is not a multiple of {STRIDE}: training at {rounded}")
            config.imgsz = rounded
        if config.batch % self.world.size:
            raise UserError(f"batch {config.batch} does not divide over {self.world.size} processes")
        self.amp = resolve_amp(config.amp, self.world.device)
        random.seed(config.seed)
        np.random.seed(config.seed)
        torch.manual_seed(config.seed)
        self.data = load_data_config(config.data)
        self._open_data()
        self._build()
        path = run.path if run else new_run(config.project, config.name).path if self.world.is_main else None
        self.run_folder = RunFolder(Path(self.world.broadcast_object(path)))

    @classmethod
    def resume(
        cls, project: str | Path, name: str | None = None, *, device: str | None = None, workers: int | None = None
    ) -> Trainer:
        """Go on with a run after its last finished epoch; device and workers may differ, everything else is as it was.

        Raises:
            UserError: no run with a state is there, or it has finished.
            CheckpointError: its state is damaged.
        """
        run = find_run(project, name)
        saved = load_state(run.state)
        config = read_config(run.config)
        if saved["epoch"] + 1 >= config.epochs:
            raise UserError(f"{run.path} has finished its {config.epochs} epochs; nothing to resume")
        config.device = device if device is not None else config.device
        config.workers = workers if workers is not None else config.workers
        trainer = cls(config, run=run)
        try:
            trainer.state.restore(saved)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{run.state} does not belong to this run: {error}") from error
        trainer._say(f"resuming {run.path}: {saved['epoch'] + 1} of {config.epochs} epochs are done")
        return trainer

    # Set-up -----------------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        if self.world.is_main:
            log.info(text)

    def _open_data(self) -> None:
        config, world = self.config, self.world
        workers = default_workers(world.size, config.batch) if config.workers is None else config.workers
        if not world.is_main:
            world.barrier()  # Rank 0 checks the labels once; the others then find its result.
        records, labels = load_split(self.data, "train", for_training=True)
        local_batch = config.batch // world.size
        self.evaluation = open_evaluation_set(
            self.data,
            "val",
            image_size=config.imgsz,
            batch_size=2 * local_batch,
            workers=workers,
            rect=config.rect,
            cache=config.cache,
            world=world,
        )
        if world.is_main:
            world.barrier()
        self._say(f"train: {labels.summary()}")
        self._say(f"val: {self.evaluation.report.summary()}")
        self.dataset = DetectionDataset(
            records,
            image_size=config.imgsz,
            augment=config.augment,
            cache=config.cache,
            seed=config.seed,
            augmentations=[path for path in config.augmentations.split(",") if path],
        )
        self.labels = np.concatenate([r.boxes for r in records]) if records else np.zeros((0, 5), np.float32)
        self.loader = create_loader(
            self.dataset,
            batch_size=local_batch,
            workers=workers,
            shuffle=True,
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
        )

    def _build(self) -> None:
        config, world = self.config, self.world
        model = build_model(config, self.data, self._calibration_images, announce=self._say, load=not self._resuming)
        model.to(world.device)
        if config.channels_last:
            nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if world.is_distributed:
            world.broadcast_state(model)
            if config.sync_bn:
                convert_sync_batch_norm(model)
        self._frozen = list(model.model)[: config.freeze]
        for layer in self._frozen:
            layer.requires_grad_(False)
        self.schedule = self._make_schedule()
        optimizer = build_optimizer(
            model,
            config.optimizer,
            lr=config.lr0,
            momentum=config.momentum,
            weight_decay=config.weight_decay * config.batch * self.schedule.accumulate / config.nominal_batch,
        )
        scaler = torch.amp.GradScaler(world.device.type, enabled=self.amp == "fp16")
        self.model = model
        self.state = TrainingState(model, ModelEMA(model, config.ema_decay), optimizer, scaler)
        self.criterion = self._make_loss()
        self.network: nn.Module = model
        if world.is_distributed:
            devices = [world.device.index] if world.device.type == "cuda" else None
            self.network = nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def _make_schedule(self) -> Schedule:
        config = self.config
        warmup = max(round(config.warmup_epochs * len(self.loader)), 100) if config.warmup_epochs > 0 else 0
        return Schedule(
            base_lr=config.lr0,
            momentum=config.momentum,
            factor=lr_factor(config.schedule, config.epochs, config.lrf),
            warmup_iterations=warmup,
            warmup_bias_lr=config.warmup_bias_lr,
            warmup_momentum=config.warmup_momentum,
            accumulate=accumulation(config.batch, config.nominal_batch),
        )

    def _make_loss(self) -> DetectionLoss:
        config = self.config
        return DetectionLoss(
            self.data.num_classes,
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

    def _calibration_images(self) -> list[Tensor]:
        """A few training batches, as the network will see them (for weights that come without BatchNorm)."""
        self.loader.set_epoch(0, mosaic=True)
        images: list[Tensor] = []
        for batch in self.loader:
            images.append(batch.images.float().div_(255))
            if sum(map(len, images)) >= CALIBRATION_IMAGES:
                break
        return images

    # Training ---------------------------------------------------------------------------------------------------------

    def run(self) -> ValidationResult | None:
        """Train to the last epoch (or until patience ends) and evaluate the best weights; rank 0 gets their result."""
        config, folder, main = self.config, self.run_folder, self.world.is_main
        start = self.state.epoch + 1
        self.events = EventLog(folder.path, config.tensorboard and main, purge_step=start if self._resuming else None)
        if main:
            write_config(config, folder.config)
        if main and not self._resuming:
            # A run killed in its first epoch can be resumed too, and a disk without room is found before any work.
            save_state(folder.state, self.state.capture())
            if config.plots:
                report.write_label_plot(self.labels, self.data.names, folder)
        self._announce()
        try:
            with self._interrupt:
                for epoch in range(start, config.epochs):
                    row = self._train_epoch(epoch)
                    result = self._validate(epoch)
                    if self._finish_epoch(epoch, row, result):
                        break
            if self._save_error is not None:
                raise self._save_error
            return self._evaluate_best()
        except KeyboardInterrupt:
            self._say(
                f"interrupted; the last finished epoch is in {folder.weights}; go on with: yolov9-fast train --resume "
                f"--project {folder.path.parent} --name {folder.path.name}"
            )
            raise
        finally:
            self.events.close()
            self.loader.close()
            self.evaluation.loader.close()

    def _announce(self) -> None:
        config = self.config
        mosaic = max(config.epochs - config.close_mosaic, 0) if config.augment.mosaic else 0
        self._say(
            f"{self.model.graph_name} on {self.world.size} × {self.world.device}, {config.imgsz} px, "
            f"batch {config.batch} (an optimiser step every {self.schedule.accumulate}), amp {self.amp}, "
            f"{config.epochs} epochs of {len(self.loader)} batches, mosaic in the first {mosaic}; "
            f"results in {self.run_folder.path}"
        )

    def _train_mode(self) -> None:
        self.network.train()
        for layer in self._frozen:
            layer.eval()

    def _rescaled(self, images: Tensor, iteration: int) -> Tensor:
        """The batch at this iteration's size (multi-scale); the draw depends on seed and iteration alone."""
        if not self.config.multi_scale:
            return images
        low, high = (max(int(self.config.imgsz * factor) // STRIDE, 1) for factor in (0.5, 1.5))
        size = random.Random(f"{self.config.seed}-{iteration}").randint(low, high) * STRIDE
        return nn.functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        config, device, state = self.config, self.world.device, self.state
        self.loader.set_epoch(epoch, mosaic=epoch < config.epochs - config.close_mosaic)
        self._train_mode()
        names = self.criterion.names
        totals = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)
        clock = dict.fromkeys(PHASES, 0.0)
        steps = skipped = 0
        title = f"epoch {epoch + 1}/{config.epochs}"
        tqdm = require("tqdm").tqdm
        bar = tqdm(self.loader, desc=title, unit="batch", leave=False, disable=not self.world.is_main)
        mark = time.perf_counter()
        for index, batch in enumerate(bar):
            self._interrupt.check()
            iteration = epoch * len(self.loader) + index
            accumulate = self.schedule.apply(state.optimizer, iteration, epoch)
            will_step = iteration - state.last_step >= accumulate
            images = self._rescaled(prepare_images(batch, device, channels_last=config.channels_last), iteration)
            if epoch == 0 and index < 3 and self.world.is_main and config.plots:
                report.write_batch_picture(batch, self.data.names, self.run_folder, index, self.events)
            marks = [mark, time.perf_counter()]
            quiet = self.world.is_distributed and not will_step
            with self.network.no_sync() if quiet else contextlib.nullcontext():  # type: ignore[operator]
                with autocast(device, self.amp):
                    output = self.network(images)
                marks.append(time.perf_counter())
                loss = self.criterion(output, batch.targets, (images.shape[2], images.shape[3]))
                marks.append(time.perf_counter())
                # Processes average their gradients; the published loss sums over the images of all of them.
                state.scaler.scale(loss.total * self.world.size).backward()
            marks.append(time.perf_counter())
            if will_step:
                taken = self._step()
                steps, skipped = steps + 1, skipped + (not taken)
                state.last_step = iteration
            items = loss.items.double()
            totals += torch.where(torch.isfinite(items).all(), torch.cat((items, items.new_ones(1))), 0.0)
            mark = time.perf_counter()
            for name, began, ended in zip(PHASES, marks, [*marks[1:], mark], strict=True):
                clock[name] += ended - began
            if not bar.disable and (index % 10 == 0 or index == len(self.loader) - 1):
                means = (totals[:-1] / totals[-1].clamp_min(1)).tolist()
                bar.set_postfix_str(_loss_text(dict(zip(names, means, strict=True))), refresh=False)
        state.skipped_steps += skipped
        # fp16 starts by halving its loss scale until gradients fit; only then are skipped steps the run's fault.
        searching_scale = self.amp == "fp16" and state.scaler.get_scale() >= 1
        if steps and skipped == steps and not searching_scale:
            raise TrainingDivergedError(
                f"epoch {epoch + 1}: not one of {steps} optimiser steps was finite; lower --lr0, or use --amp off"
            )
        if skipped:
            self._say(f"epoch {epoch + 1}: {skipped} of {steps} optimiser steps skipped (gradients not finite)")
        totals = self.world.sum(totals)
        means = (totals[:-1] / totals[-1].clamp_min(1)).tolist()
        row: dict[str, Any] = {"epoch": epoch + 1}
        row |= {f"train/{name}": value for name, value in zip(names, means, strict=True)}
        groups = zip(("bias", "weight", "bn"), state.optimizer.param_groups, strict=True)
        row |= {f"lr/{name}": group["lr"] for name, group in groups}
        return row | {"skipped_steps": skipped} | {f"seconds/{name}": value for name, value in clock.items()}

    def _step(self) -> bool:
        """One optimiser step; False where the gradients are not finite and it was skipped."""
        state = self.state
        state.scaler.unscale_(state.optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip if self.config.clip > 0 else float("inf"))
        finite = bool(torch.isfinite(norm))
        if finite:
            state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if finite:
            state.ema.update(self.model)
        else:
            self._mend_buffers()
        return finite

    @torch.no_grad()
    def _mend_buffers(self) -> None:
        """A forward pass with non-finite values has spoilt running statistics for good: take the average's instead."""
        averaged = dict(self.state.ema.model.named_buffers())
        for name, buffer in self.model.named_buffers():
            if buffer.is_floating_point() and not bool(torch.isfinite(buffer).all()):
                buffer.copy_(averaged[name])

    # After an epoch ---------------------------------------------------------------------------------------------------

    def _validate(self, epoch: int) -> ValidationResult:
        config = self.config
        if self.world.is_distributed:
            self.world.broadcast_state(self.state.ema.model)
        return validate(
            self.state.ema.model,
            self.evaluation,
            conf=config.conf,
            iou=config.iou,
            max_det=config.max_det,
            amp=self.amp,
            criterion=self.criterion,
            world=self.world,
            channels_last=config.channels_last,
            title=f"epoch {epoch + 1}/{config.epochs} val",
        )

    def _finish_epoch(self, epoch: int, row: dict[str, Any], result: ValidationResult) -> bool:
        """Record, save and report an epoch; True where training should stop."""
        state, patience = self.state, self.config.patience
        state.epoch = epoch
        # Until the next step pending gradients are each process's own; averaged now, one state holds for all of them.
        self.world.average_gradients(self.model)
        stop = False
        if self.world.is_main:
            assert result.metrics is not None
            assert result.loss is not None
            metrics = result.metrics
            row |= {f"val/{name}": value for name, value in result.loss.items()}
            for name in ("ap", "ap50", "ap75", "precision", "recall"):
                row[f"metrics/{name}"] = getattr(metrics, name)
            sizes = {f"metrics/ap_{size}": getattr(metrics, f"ap_{size}") for size in ("small", "medium", "large")}
            row |= {name: value for name, value in sizes.items() if not np.isnan(value)}
            row["seconds/val"] = sum(result.seconds.values())
            row["seconds"] = sum(v for k, v in row.items() if k.startswith("seconds/"))
            fitness = float(np.nan_to_num(0.1 * metrics.ap50 + 0.9 * metrics.ap))
            if fitness > state.best_fitness:
                state.best_fitness, state.best_epoch = fitness, epoch
            state.rows.append(row)
            self._save(fitness)
            self.events.scalars(row, epoch + 1)
            self._say(
                f"epoch {epoch + 1}/{self.config.epochs}: "
                f"train {_loss_text({name: row[f'train/{name}'] for name in result.loss})} | "
                f"val {_loss_text(result.loss)} | AP {metrics.ap:.4f} AP50 {metrics.ap50:.4f} | "
                f"{row['seconds']:.1f} s"
            )
            stop = bool(patience) and epoch - state.best_epoch >= patience
            if stop:
                self._say(f"no improvement for {patience} epochs: stopped; best was epoch {state.best_epoch + 1}")
        return self.world.any(stop)

    def _save(self, fitness: float) -> None:
        """Weights and state after an epoch; a full disk is reported and leaves the previous files as they were."""
        state, folder, period = self.state, self.run_folder, self.config.save_period
        model, number = state.ema.model, state.epoch + 1
        metadata = {"epoch": number, "fitness": fitness, "image_size": self.config.imgsz}
        try:
            save_weights(model, folder.last, metadata=metadata)
            if state.best_epoch == state.epoch:
                save_weights(model, folder.best, metadata=metadata)
            if period and number % period == 0:
                save_weights(model, folder.weights / f"epoch{number}.safetensors", metadata=metadata)
            write_results(folder.results, state.rows)
            save_state(folder.state, state.capture())
            self._save_error = None
        except UserError as error:
            log.error("epoch %d was not saved: %s; training goes on", number, error)
            self._save_error = error

    def _evaluate_best(self) -> ValidationResult | None:
        """Evaluate the best weights once more, and write tables and plots."""
        config, folder = self.config, self.run_folder
        self.world.barrier()
        source = folder.best if folder.best.is_file() else folder.last
        model = copy.deepcopy(self.state.ema.model)
        if self.world.is_main:
            model.load_state_dict(load_checkpoint(source).state_dict())
        self.world.broadcast_state(model)
        result = validate(
            model,
            self.evaluation,
            conf=config.conf,
            iou=config.iou,
            max_det=config.max_det,
            amp=self.amp,
            world=self.world,
            channels_last=config.channels_last,
            title="best weights",
        )
        if not self.world.is_main:
            return None
        assert result.metrics is not None
        report.save_evaluation(result, self.data.names, folder.path, plots=config.plots)
        if config.plots:
            report.write_results_plot(folder)
        self._say(f"best weights (epoch {self.state.best_epoch + 1}): {source}\n{result.metrics.table()}")
        if self.state.skipped_steps:
            self._say(f"{self.state.skipped_steps} optimiser steps were skipped in all (gradients not finite)")
        return result


def _loss_text(losses: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in losses.items())


def train(config: TrainConfig) -> ValidationResult | None:
    """Train from the start; the result of the best weights on rank 0."""
    try:
        return Trainer(config).run()
    finally:
        leave_world()
