"""Detection in single images: letterbox to the smallest rectangle, network, NMS, boxes in pixels of the image."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from yolov9_fast.data import Frame, letterbox, open_source, scale_boxes_to_original, to_tensor
from yolov9_fast.engine.config import check_numbers
from yolov9_fast.engine.device import (
    autocast,
    inference_model,
    prepare_images,
    resolve_amp,
    round_image_size,
    single_device,
)
from yolov9_fast.errors import DataError, UserError
from yolov9_fast.models import DetectionModel, load_checkpoint
from yolov9_fast.ops._nms import nms, warn_if_cut


@dataclass(frozen=True)
class Prediction:
    """The objects found in one image.

    Attributes:
        path: the file, address or webcam; "" for an array.
        boxes: float32 [n, 6]: x1, y1, x2, y2 in pixels of the image, score, class index; in descending
            order of score.
        names: class index → name.
        shape: height and width of the image.
        seconds: time for this image, from letterbox to boxes.
        frame: number within a video, 0 for an image.
    """

    path: str
    boxes: NDArray[np.float32]
    names: dict[int, str]
    shape: tuple[int, int]
    seconds: float
    frame: int = 0

    def __len__(self) -> int:
        return len(self.boxes)

    def counts(self) -> dict[str, int]:
        """Class name → number of objects, in the order of the classes."""
        number = Counter(int(index) for index in self.boxes[:, 5])
        return {self.names[index]: number[index] for index in sorted(number)}

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `box` is x1, y1, x2, y2 in pixels."""
        return {
            "path": self.path,
            "frame": self.frame,
            "height": self.shape[0],
            "width": self.shape[1],
            "detections": [
                {
                    "class": int(row[5]),
                    "name": self.names[int(row[5])],
                    "score": round(float(row[4]), 5),
                    "box": [round(float(value), 2) for value in row[:4]],
                }
                for row in self.boxes
            ],
        }


class Predictor:
    """Finds objects in images: `Predictor("best.safetensors")("images/")`.

    Args:
        model: a network, which is copied, or a weights file of any known origin.
        image_size: long side in pixels, rounded up to a multiple of 32.
        conf, iou, max_det: of NMS; the published defaults of prediction.
        classes: keep only these, by index or name.
        agnostic: boxes of different classes suppress each other too.
        device: cpu, a GPU's number, or None for a GPU if there is one.
        amp: off, bf16, fp16 or auto.

    Raises:
        UserError: weights, device, class or threshold that cannot be used.
    """

    def __init__(
        self,
        model: DetectionModel | str | Path,
        image_size: int = 640,
        conf: float = 0.25,
        iou: float = 0.45,
        max_det: int = 1000,
        *,
        classes: Sequence[int | str] | None = None,
        agnostic: bool = False,
        device: str | None = None,
        amp: str = "off",
    ) -> None:
        self.image_size, self.conf, self.iou, self.max_det, self.agnostic = image_size, conf, iou, max_det, agnostic
        check_numbers(self, positive=("image_size", "max_det"), fractions=("conf", "iou"))
        self.device = single_device(device)
        loaded = model if isinstance(model, DetectionModel) else load_checkpoint(model)
        self.model = inference_model(loaded, self.device)
        self.names = dict(loaded.names)
        self.image_size = round_image_size(image_size)
        self.classes = None if classes is None else class_indices(classes, self.names)
        self.amp = resolve_amp(amp, self.device)

    def __call__(
        self, images: NDArray[np.uint8] | str | Path | Sequence[NDArray[np.uint8] | str | Path]
    ) -> list[Prediction]:
        """Predict on arrays (uint8 BGR [H, W, 3]) and anything `open_source` takes; one prediction per image or frame.

        Raises:
            DataError: nothing to read, or a file that cannot be read.
        """
        parts = [images] if isinstance(images, np.ndarray | str | Path) else images
        return [prediction for part in parts for prediction in self._predict(part)]

    def _predict(self, part: NDArray[np.uint8] | str | Path) -> Iterator[Prediction]:
        if isinstance(part, np.ndarray):
            yield self.detect(part)
            return
        for frame, prediction in self.stream(open_source(part)):
            if prediction is None:
                raise DataError(frame.error or f"{frame.path} cannot be read")
            yield prediction

    def stream(self, frames: Iterable[Frame]) -> Iterator[tuple[Frame, Prediction | None]]:
        """Each frame with its prediction, one at a time; None for a frame that could not be read."""
        for frame in frames:
            if frame.image is None:
                yield frame, None
            else:
                yield frame, self.detect(frame.image, path=frame.path, frame=frame.frame)

    @torch.inference_mode()
    def detect(self, image: NDArray[np.uint8], *, path: str = "", frame: int = 0) -> Prediction:
        """Predict on one image, uint8 BGR [H, W, 3]; raises `DataError` for another type or shape."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise DataError(f"image: expected uint8 BGR [H, W, 3], got {image.dtype} {list(image.shape)}")
        started = time.perf_counter()
        boxed = letterbox(image, self.image_size, rectangle=True)
        batch = prepare_images(to_tensor(boxed.image)[None], self.device, channels_last=True)
        with autocast(self.device, self.amp):
            maps = [level.float() for level in self.model.raw(batch, auxiliary=False).main]
        found = nms(
            self.model.decode(maps),
            conf=self.conf,
            iou=self.iou,
            multi_label=False,
            agnostic=self.agnostic,
            classes=self.classes,
            max_det=self.max_det,
        )
        rows = found.boxes[0, : int(found.count[0])].cpu()
        warn_if_cut(found)
        shape = (image.shape[0], image.shape[1])
        rows = scale_boxes_to_original(rows, boxed.ratio, boxed.pad, shape)
        return Prediction(path, rows.numpy(), self.names, shape, time.perf_counter() - started, frame)


def class_indices(classes: Sequence[int | str], names: dict[int, str]) -> list[int]:
    """Indices of classes given by index or name; raises `UserError` that lists the known ones."""
    by_name = {name: index for index, name in names.items()}
    result = []
    for item in classes:
        text = str(item)
        index = by_name[text] if text in by_name else int(text) if text.isdecimal() else -1
        if index not in names:
            known = ", ".join(f"{i} {name}" for i, name in list(names.items())[:100])
            raise UserError(f"classes: expected some of {known}, got {text!r}")
        result.append(index)
    return sorted(set(result))
