"""Evaluation of a detector on a labelled split: COCO AP by pycocotools, loss, confusion matrix, detections."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from yolov9_fast.data import (
    Batch,
    DataConfig,
    DetectionDataset,
    DetectionLoader,
    ImageRecord,
    LabelReport,
    category_ids,
    coco_ground_truth,
    create_loader,
    load_split,
    open_annotations,
    scale_boxes_to_original,
)
from yolov9_fast.engine.clock import PhaseClock
from yolov9_fast.engine.device import computing_on
from yolov9_fast.engine.distributed import ProcessGroup
from yolov9_fast.engine.host_copy import HostCopy
from yolov9_fast.engine.inference import Inference
from yolov9_fast.engine.interrupts import progress_bar
from yolov9_fast.errors import UserError
from yolov9_fast.losses import DetectionLoss
from yolov9_fast.metrics import CocoMetrics, ConfusionMatrix, detections_to_coco, evaluate_coco
from yolov9_fast.models import DetectionModel
from yolov9_fast.models.class_names import class_order, name_differences
from yolov9_fast.nn import DetectionOutput
from yolov9_fast.ops._nms import Detections, nms, warn_if_cut

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationSet:
    """A split that can be evaluated: its images, its ground truth as COCO data, and the COCO category of each class."""

    split: str
    names: dict[int, str]
    records: list[ImageRecord]
    report: LabelReport
    ground_truth: dict[str, Any]
    categories: list[int]
    loader: DetectionLoader

    @property
    def has_objects(self) -> bool:
        """Whether AP is defined: there is an object that is not a crowd."""
        return any(not annotation.get("iscrowd") for annotation in self.ground_truth["annotations"])


@dataclass
class ValidationResult:
    """What an evaluation measured.

    Attributes:
        metrics: COCO metrics; None on other ranks than 0.
        loss: term → loss of the main branch, the mean over all images; None without a criterion.
        detections: COCO results of all images on rank 0, of this process's share elsewhere; each with the `file_name`
            of its image: as in the COCO JSON, or relative to the dataset's root.
        confusion: of all images on rank 0, of this process's share elsewhere.
        images: number of images in the split.
        seconds: phase → seconds (`PhaseClock`).
    """

    metrics: CocoMetrics | None
    loss: dict[str, float] | None
    detections: list[dict[str, Any]]
    confusion: ConfusionMatrix
    images: int
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def fitness(self) -> float:
        """0.1 · AP50 + 0.9 · AP, by which the best epoch is chosen; 0 without objects."""
        assert self.metrics is not None
        return float(np.nan_to_num(0.1 * self.metrics.ap50 + 0.9 * self.metrics.ap))


def open_evaluation_set(
    data: DataConfig,
    split: str,
    *,
    image_size: int,
    batch_size: int,
    workers: int = 0,
    rect: bool = True,
    process_group: ProcessGroup | None = None,
) -> EvaluationSet:
    """Read a split's images and labels and make its loader, for `process_group`; by default one process on a CPU.

    Raises:
        DataError: no such split, or nothing usable in it.
    """
    coco = open_annotations(data, split)
    records, report = load_split(data, split, for_training=False, coco=coco)
    dataset = DetectionDataset(
        records,
        image_size=image_size,
        augment=None,
        rect=rect,
        batch_size=batch_size,
    )
    group = process_group or ProcessGroup(0, 1, torch.device("cpu"))
    loader = create_loader(
        dataset,
        batch_size=batch_size,
        workers=workers,
        shuffle=False,
        rank=group.rank,
        world_size=group.size,
        pin_memory=group.device.type == "cuda",
    )
    ground_truth = coco_ground_truth(data, split, records, coco=coco)
    categories = category_ids(data, split, coco=coco)
    return EvaluationSet(split, data.names, records, report, ground_truth, categories, loader)


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def _labels_in_pixels(record: ImageRecord) -> np.ndarray:
    """[m, 5]: class, x1, y1, x2, y2 in pixels of the original image."""
    boxes = record.boxes.astype(np.float64)
    size = np.array([record.width, record.height], np.float64)
    centre, half = boxes[:, 1:3] * size, boxes[:, 3:5] * size / 2
    return np.concatenate((boxes[:, :1], centre - half, centre + half), 1)


def _matched_classes(model: DetectionModel, evaluation: EvaluationSet) -> tuple[Tensor, Tensor]:
    """The model's class of each class of the data, and the data's class of each class of the model: float32 [nc]."""
    order = class_order(model.names, evaluation.names)
    if order is None:
        differences = name_differences(model.names, evaluation.names)
        log.warning(f"{evaluation.split}: {differences}; the weights' classes are taken by index")
        order = list(range(model.num_classes))
    elif order != sorted(order):
        log.info(f"{evaluation.split}: the weights have the data's classes in another order: they are matched by name")
    model_class = torch.tensor(order)
    return model_class.float(), model_class.argsort().float()


def validate(
    model: DetectionModel,
    evaluation: EvaluationSet,
    *,
    conf: float = 0.001,
    iou: float = 0.7,
    max_det: int = 300,
    amp: str = "off",
    criterion: DetectionLoss | None = None,
    process_group: ProcessGroup | None = None,
    channels_last: bool = False,
    progress: bool = True,
    title: str = "val",
    capture: str = "auto",
) -> ValidationResult:
    """Evaluate `model` with the published settings: class-wise multi-label NMS, 300 detections, COCO AP.

    Every process evaluates its share of the images; rank 0 gathers and computes the metrics.

    Args:
        model: in either mode, which it keeps; only its main branch is computed. Where `model.names` are the data's
            names in another order, the classes are matched by name; other names are a warning, and the classes are
            taken by index. The results have the data's classes.
        conf, iou, max_det: of NMS.
        amp: off, bf16 or fp16.
        criterion: also compute the main branch's loss: each of its terms by name, weighted by images.
        capture: auto records the network on a GPU as a CUDA graph for each shape of batches that repeats; or off.
    """
    device = next(model.parameters()).device
    process_group = process_group or ProcessGroup(0, 1, device)
    if model.num_classes != len(evaluation.names):
        raise UserError(f"model: expected {len(evaluation.names)} classes as the data has, got {model.num_classes}")
    clock = PhaseClock("data", "forward", "nms", "metrics", device=device)
    run = _Evaluation(model, evaluation, conf, iou, max_det, amp, criterion, channels_last, device, clock, capture)
    with (
        progress_bar(evaluation.loader, title, shown=progress and process_group.is_main) as bar,
        _evaluating(model),
        computing_on(device, fixed_sizes=not evaluation.loader.dataset.rect),
    ):
        # A GPU computes a batch while the host reads the detections of the one before.
        unread: tuple[Batch, HostCopy] | None = None
        for batch in bar:
            clock.end("data")
            copy = run.begin(batch)
            if unread is not None:
                run.finish(*unread)
            unread = batch, copy
            clock.end("nms")
        if unread is not None:
            run.finish(*unread)
            clock.end("nms")
    losses = process_group.sum(run.losses)
    detections, confusion = run.detections, run.confusion
    gathered = process_group.gather_objects((detections, confusion.matrix))
    metrics = None
    if process_group.is_main:
        detections = [d for part, _ in gathered for d in part]
        confusion.matrix = sum(matrix for _, matrix in gathered)
        metrics = evaluate_coco(
            evaluation.ground_truth,
            detections,
            names=evaluation.names,
            category_ids=evaluation.categories,
            image_ids=[record.image_id for record in evaluation.records],
        )
        clock.end("metrics")
    means = (losses[:-1] / losses[-1].clamp_min(1)).tolist()
    losses_by_name = None if criterion is None else dict(zip(criterion.names, means, strict=True))
    return ValidationResult(metrics, losses_by_name, detections, confusion, len(evaluation.records), clock.seconds)


class _Evaluation:
    """What `validate` does to one batch: `begin` orders the work of the device, `finish` reads its results.

    Attributes:
        losses: each term of `criterion` summed over images, then the number of images, float64.
        detections, confusion: of the batches finished so far.
    """

    def __init__(
        self,
        model: DetectionModel,
        evaluation: EvaluationSet,
        conf: float,
        iou: float,
        max_det: int,
        amp: str,
        criterion: DetectionLoss | None,
        channels_last: bool,
        device: torch.device,
        clock: PhaseClock,
        capture: str,
    ) -> None:
        self._evaluation, self._criterion = evaluation, criterion
        self._clock = clock
        self._inference = Inference("evaluation", model, device, amp=amp, channels_last=channels_last, capture=capture)
        self._nms: dict[str, Any] = {"conf": conf, "iou": iou, "max_det": max_det}
        self._model_class, self._data_class = _matched_classes(model, evaluation)
        terms = 0 if criterion is None else len(criterion.names)
        self.losses = torch.zeros(terms + 1, dtype=torch.float64, device=device)
        self.detections: list[dict[str, Any]] = []
        self.confusion = ConfusionMatrix(model.num_classes)

    def begin(self, batch: Batch) -> HostCopy:
        """Loss and detections of a batch, without waiting for a GPU."""
        images = batch.images
        maps, prediction = self._inference(images)
        if self._criterion is not None:
            targets = batch.targets.clone()
            targets[:, 1] = self._model_class[targets[:, 1].long()]
            # They stay on the CPU, where they are checked and sorted.
            items = self._criterion.evaluate(DetectionOutput(maps), targets, (images.shape[2], images.shape[3])).items
            items = items.double() * len(images)
            self.losses += torch.cat((items, items.new_full((1,), len(images))))
        self._clock.end("forward")
        found = nms(prediction, **self._nms)
        assert found.candidates is not None
        return HostCopy(found.boxes, found.count, found.candidates)

    def finish(self, batch: Batch, copy: HostCopy) -> None:
        """Take the detections of a batch."""
        boxes, counts, candidates = copy.wait()
        for position, (rows, count) in enumerate(zip(boxes, counts.tolist(), strict=True)):
            record = self._evaluation.records[batch.indices[position]]
            rows = rows[:count].clone()
            rows[:, :4] = scale_boxes_to_original(
                rows[:, :4], batch.ratios[position], batch.pads[position], batch.original_shapes[position]
            )
            rows[:, 5] = self._data_class[rows[:, 5].long()]
            results = detections_to_coco(rows.numpy(), record.image_id, self._evaluation.categories)
            self.detections.extend(result | {"file_name": record.file_name} for result in results)
            self.confusion.update(rows, torch.from_numpy(_labels_in_pixels(record)).float())
        warn_if_cut(Detections(boxes, counts, candidates))
