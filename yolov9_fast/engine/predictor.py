"""Detection in single images: letterbox to the smallest rectangle, network, NMS, boxes in pixels of the image."""

from __future__ import annotations

import contextlib
import logging
import operator
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from yolov9_fast._capture import check_mode
from yolov9_fast._untrusted import shown
from yolov9_fast.data import Frame, letterbox, scale_boxes_to_original, to_tensor
from yolov9_fast.engine.config import check_numbers
from yolov9_fast.engine.device import (
    computing_on,
    inference_model,
    prepare_determinism,
    resolve_amp,
    round_image_size,
    single_device,
)
from yolov9_fast.engine.host_copy import HostCopy
from yolov9_fast.engine.inference import Inference
from yolov9_fast.engine.inputs import frames_of
from yolov9_fast.errors import DataError, UserError
from yolov9_fast.models import DetectionModel, load_checkpoint
from yolov9_fast.ops._nms import Detections, nms, warn_if_cut

log = logging.getLogger(__name__)


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
        model: a network, which is copied and computes in float32, or a weights file of any known origin.
        image_size: long side in pixels, rounded up to a multiple of 32.
        conf, iou, max_det: of NMS; the published defaults of prediction.
        classes: keep only these, by index or name; one or several.
        agnostic: boxes of different classes suppress each other too.
        device: cpu, a GPU's number, a `torch.device`, or None for a GPU if there is one.
        amp: off, bf16, fp16 or auto.
        deterministic: the same images give the same bits, in every run on such a device.
        capture: auto records the network on a GPU as a CUDA graph for each shape of images that repeats; or off.

    Raises:
        UserError: model, device, class, threshold or word that cannot be used.
    """

    def __init__(
        self,
        model: DetectionModel | str | os.PathLike[str],
        image_size: int = 640,
        conf: float = 0.25,
        iou: float = 0.45,
        max_det: int = 1000,
        *,
        classes: int | str | Iterable[int | str] | None = None,
        agnostic: bool = False,
        device: str | int | torch.device | None = None,
        amp: str = "off",
        deterministic: bool = False,
        capture: str = "auto",
    ) -> None:
        self.image_size, self.conf, self.iou, self.max_det, self.agnostic = image_size, conf, iou, max_det, agnostic
        check_numbers(self, positive=("image_size", "max_det"), fractions=("conf", "iou"), optional=False)
        self.image_size = round_image_size(image_size)
        self.device, self.deterministic = single_device(device), deterministic
        if deterministic:
            prepare_determinism(self.device)
        self.amp = resolve_amp(amp, self.device)
        self._capture = check_mode(capture)
        if not isinstance(model, DetectionModel | str | os.PathLike):
            raise UserError(f"model: expected a DetectionModel or a weights file, got {type(model).__name__}")
        loaded = model if isinstance(model, DetectionModel) else load_checkpoint(Path(model))
        self.names = dict(loaded.names)
        self.classes = None if classes is None else class_indices(classes, self.names)
        self.model = inference_model(loaded, self.device, self.amp)
        self._inference = self._new_inference()

    def _new_inference(self) -> Inference:
        return Inference("prediction", self.model, self.device, amp=self.amp, capture=self._capture)

    def __call__(self, images: Any) -> list[Prediction]:
        """One prediction per image or frame, in order.

        Args:
            images: one of these, or an iterable of them:
                anything that `open_source` takes, except webcams, which never end;
                an array, uint8 BGR [H, W, 3] or [B, H, W, 3];
                a tensor, RGB [3, H, W], [H, W, 3] or a batch of either, uint8 or floating in 0..1;
                a PIL image; an encoded image file as bytes or as a file opened in binary mode.

        Raises:
            DataError: something else, nothing to read, or a file that cannot be read. Of a video that can be read in
                part the rest is a warning.
        """
        result: list[Prediction] = []
        for frame, prediction in self.stream(frames_of(images)):
            if prediction is not None:
                result.append(prediction)
            elif frame.is_video and result and result[-1].path == frame.path:
                log.warning("%s", frame.error)
            else:
                raise DataError(frame.error or f"{frame.path} cannot be read")
        return result

    def stream(self, frames: Iterable[Frame]) -> Iterator[tuple[Frame, Prediction | None]]:
        """Each frame with its prediction, one at a time; None for a frame that could not be read."""
        for frame in frames:
            if not isinstance(frame, Frame):
                raise DataError(f"frames: expected those of `open_source`, got {type(frame).__name__}")
            if frame.image is None:
                yield frame, None
            else:
                yield frame, self.detect(frame.image, path=frame.path, frame=frame.frame)

    @torch.inference_mode()
    def detect(self, image: NDArray[np.uint8], *, path: str = "", frame: int = 0) -> Prediction:
        """Predict on one image, uint8 BGR [H, W, 3]; raises `DataError` for another type or shape."""
        if not isinstance(image, np.ndarray):
            raise DataError(f"image: expected a uint8 BGR array [H, W, 3], got {type(image).__name__}")
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise DataError(f"image: expected uint8 BGR [H, W, 3], got {image.dtype} {list(image.shape)}")
        with computing_on(self.device, deterministic=self.deterministic):
            return self._detect(image, path, frame)

    def _detect(self, image: NDArray[np.uint8], path: str, frame: int) -> Prediction:
        started = time.perf_counter()
        boxed = letterbox(image, self.image_size, rectangle=True)
        if (self._inference.model, self._inference.amp) != (self.model, self.amp):
            self._inference = self._new_inference()
        _, prediction = self._inference(to_tensor(boxed.image)[None])
        found = nms(
            prediction,
            conf=self.conf,
            iou=self.iou,
            multi_label=False,
            agnostic=self.agnostic,
            classes=self.classes,
            max_det=self.max_det,
        )
        assert found.candidates is not None
        boxes, count, candidates = HostCopy(found.boxes, found.count, found.candidates).wait()
        warn_if_cut(Detections(boxes, count, candidates))
        rows = boxes[0, : int(count[0])]
        shape = (image.shape[0], image.shape[1])
        rows = scale_boxes_to_original(rows, boxed.ratio, boxed.pad, shape)
        return Prediction(path, rows.numpy(), self.names, shape, time.perf_counter() - started, frame)


def class_indices(classes: int | str | Iterable[int | str], names: dict[int, str]) -> list[int]:
    """Indices of classes given by index or name, one or several.

    Raises:
        UserError: one that is not among `names`, or none at all; lists the known ones.
    """
    by_name = {name: index for index, name in names.items()}
    known = ", ".join(f"{i} {name}" for i, name in list(names.items())[:100])
    result = []
    for item in classes if isinstance(classes, Iterable) and not isinstance(classes, str) else [classes]:
        index = (
            by_name.get(item, int(item) if item.isdecimal() and len(item) < 10 else -1) if isinstance(item, str) else -1
        )
        if not isinstance(item, str | bool):
            with contextlib.suppress(TypeError):
                index = operator.index(item)
        if index not in names:
            raise UserError(f"classes: expected some of {known}, got {shown(item)}")
        result.append(index)
    if not result:
        raise UserError(f"classes: expected some of {known}, got none")
    return sorted(set(result))
