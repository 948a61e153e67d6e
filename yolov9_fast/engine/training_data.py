"""The images of a training run: the loader of its training split, and the split it is validated on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from yolov9_fast.data import (
    Batch,
    DataConfig,
    DetectionDataset,
    DetectionLoader,
    ImageRecord,
    create_loader,
    load_data_config,
    load_split,
)
from yolov9_fast.data.loader import local_processes
from yolov9_fast.data.resident import hold_images
from yolov9_fast.data.stores import choose_cache
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.engine.device import default_workers
from yolov9_fast.engine.distributed import ProcessGroup
from yolov9_fast.engine.validator import EvaluationSet, open_evaluation_set
from yolov9_fast.errors import DataError, UserError
from yolov9_fast.models.model import MAX_STRIDE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """Loaders of this process.

    Attributes:
        config: the data file.
        labels: float32 [n, 5], all training boxes: class, then centre and size, normalised.
        loader: of augmented training images, or of plans for them.
        pixels: the images that plans refer to, uint8 [n] on the run's device; None: the loader has images.
        evaluation: the validation split.
        description: class names, batches per epoch, and of each split the number of images and a digest of names, sizes
            and boxes; the same wherever the images are.
    """

    config: DataConfig
    labels: NDArray[np.float32]
    loader: DetectionLoader
    evaluation: EvaluationSet
    description: dict[str, Any]
    pixels: Tensor | None = None

    def images_of(self, batch: Batch) -> Tensor:
        """Those of a training batch, uint8 [B, 3, H, W]."""
        if batch.planned is None:
            return batch.images
        assert self.pixels is not None
        return batch.planned.make(self.pixels)


def _describe(records: Sequence[ImageRecord]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for record in records:
        digest.update(f"{record.path.name} {record.width} {record.height}".encode("utf-8", "surrogateescape"))
        digest.update(record.boxes.tobytes())
    return {"images": len(records), "digest": digest.hexdigest()}


def smallest_batch(config: TrainConfig, process_group: ProcessGroup) -> int:
    """Images that a process needs for a training step, 1 or 2.

    BatchNorm needs two values per channel. At 32 pixels the smallest map has one per image, and only synchronised
    BatchNorm sees the images of the other processes.

    Raises:
        UserError: the batch of a process is smaller.
    """
    if config.imgsz > MAX_STRIDE or (process_group.is_distributed and config.sync_bn):
        return 1
    if config.batch < 2 * process_group.size:
        each = " in each process, not synchronised" if process_group.is_distributed else ""
        raise UserError(
            f"imgsz: expected at least {2 * MAX_STRIDE} for a batch of one image{each} (at {MAX_STRIDE} pixels "
            f"BatchNorm has one value per channel), got {config.imgsz}"
        )
    return 2


def open_training_data(config: TrainConfig, process_group: ProcessGroup) -> TrainingData:
    """Check the labels of both splits and make their loaders.

    Raises:
        UserError: one image for BatchNorm at the smallest image size.
        DataError: the data file, an image or a label cannot be used.
    """
    smallest = smallest_batch(config, process_group)
    data = load_data_config(config.data)
    workers = default_workers(process_group.size, config.batch) if config.workers is None else config.workers
    local_batch = config.batch // process_group.size
    if not process_group.is_main:
        process_group.barrier()  # Rank 0 checks the labels and caches the result for the others.
    records, report = load_split(data, "train", for_training=True)
    evaluation = open_evaluation_set(
        data,
        "val",
        image_size=config.imgsz,
        batch_size=2 * local_batch,
        workers=workers,
        rect=config.rect,
        process_group=process_group,
    )
    if process_group.is_main:
        process_group.barrier()
    log.info(f"train: {report.summary()}", extra={"lines": True})
    log.info(f"val: {evaluation.report.summary()}", extra={"lines": True})
    if config.imgsz <= MAX_STRIDE and len(records) < 2:
        raise DataError(
            f"{data.file}: train: expected at least 2 images at {MAX_STRIDE} pixels (with one, BatchNorm has one value "
            f"per channel), got {len(records)}; use --imgsz {2 * MAX_STRIDE} or more"
        )
    if not evaluation.has_objects:
        log.warning("val: no objects, so AP is not defined: the last epoch counts as the best, and no patience applies")
    dataset = DetectionDataset(
        records,
        image_size=config.imgsz,
        augment=config.augment,
        cache="disk" if config.cache == "disk" else None,
        seed=config.seed,
        augmentations=[path for path in config.augmentations.split(",") if path],
        augmentations_before=[path for path in config.augmentations_before.split(",") if path],
    )
    pixels = None
    if config.augment_on == "gpu":
        _check_no_pixels_needed(config, records)
        pixels = hold_images(dataset, process_group.device)
    cached = [*(records if pixels is None else []), *evaluation.records]
    sizes = [(record.height, record.width) for record in cached]
    cache = choose_cache(config.cache or "off", sizes, config.imgsz, local_processes(process_group.size))
    evaluation.loader.dataset.keep_images(cache)
    if pixels is None:
        dataset.keep_images(cache)
    loader = create_loader(
        dataset,
        batch_size=local_batch,
        workers=workers,
        shuffle=True,
        seed=config.seed,
        rank=process_group.rank,
        world_size=process_group.size,
        smallest=smallest,
        pin_memory=process_group.device.type == "cuda",
    )
    log.info(f"loader: {loader.memory}")
    labels = np.concatenate([record.boxes for record in records]) if records else np.zeros((0, 5), np.float32)
    description = {
        "names": list(data.names.values()),
        "batches": len(loader),
        "train": _describe(records),
        "val": _describe(evaluation.records),
    }
    return TrainingData(data, labels, loader, evaluation, description, pixels)


def _check_no_pixels_needed(config: TrainConfig, records: Sequence[ImageRecord]) -> None:
    """Raise `UserError` for augmentations that need pixels on the host."""
    own = config.augmentations or config.augmentations_before
    if own:
        raise UserError(f"augment_on: expected cpu with augmentations of your own ({own}), got gpu")
    mosaics = config.augment.mosaic > 0 and config.close_mosaic < config.epochs
    if mosaics and config.augment.copy_paste > 0 and any(record.polygons for record in records):
        raise UserError(
            "augment_on: expected cpu with copy-paste of polygons, which these labels have, got gpu; "
            "use --copy-paste 0, or --augment-on cpu"
        )
