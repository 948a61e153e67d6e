"""The rows of the data table: training samples of this library or of Ultralytics, each in a process of one thread.

Ultralytics' data set is used by the names that its users call: `build_yolo_dataset`, items, its `collate_fn`, and
`build_dataloader`.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from . import peer_imports
from .worker import serve

STAGES = ("decode", "augment", "collate", "sample")
"""Seconds of a source image from its file, of a sample from images in memory, of a sample in a batch, of all."""


class Samples(Protocol):
    """Training samples of a data file; `stages`: what can be timed, by the number of the sample."""

    package: str
    stages: dict[str, Callable[[int], object]]
    batch: int

    def batches(self, workers: int) -> Any: ...


class OurSamples:
    """The data set of the trainer: images from files, or all of them in memory."""

    package = ""

    def __init__(self, data: str, size: int, batch: int, store: str) -> None:
        from yolov9_fast._lazy import require
        from yolov9_fast.data import AugmentConfig, DetectionDataset, load_data_config, load_split
        from yolov9_fast.data.dataset import SampleKey
        from yolov9_fast.data.images import read_resized
        from yolov9_fast.data.sample import collate

        require("cv2").setNumThreads(0)
        records, _ = load_split(load_data_config(Path(data)), "train", for_training=True)
        self.batch = batch
        cache: Any = "ram" if store == "memory" else None
        self._dataset = dataset = DetectionDataset(records, image_size=size, augment=AugmentConfig(), cache=cache)
        count = len(records)

        def decode(number: int) -> object:
            record = records[number % count]
            return read_resized(record.path, (record.height, record.width), size, training=True)

        def sample(number: int) -> Any:
            return dataset[SampleKey(number % count, number // count)]

        if store == "memory":
            for index in range(count):
                sample(index)
        same = [sample(index) for index in range(batch)]
        self.stages: dict[str, Callable[[int], object]] = {"collate": lambda _: collate(same)}
        self.stages |= {"augment": sample} if store == "memory" else {"decode": decode, "sample": sample}

    def batches(self, workers: int) -> Any:
        from yolov9_fast.data import create_loader

        loader = create_loader(self._dataset, batch_size=self.batch, workers=workers, shuffle=True)
        epoch = 0
        while True:
            loader.set_epoch(epoch)
            for batch in loader:
                yield batch.images
            epoch += 1


class UltralyticsSamples:
    """Ultralytics' data set with the augmentation that YOLOv9 was published with, as far as it has options for it."""

    def __init__(self, data: str, size: int, batch: int, store: str) -> None:
        peer_imports.prepare()
        self.package = peer_imports.version("ultralytics")
        made = importlib.import_module("ultralytics.data")
        settings = importlib.import_module("ultralytics.cfg").get_cfg()
        published = {"scale": 0.9, "mixup": 0.15, "copy_paste": 0.3, "hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4}
        for name, value in {"imgsz": size, "cache": "ram" if store == "memory" else False, **published}.items():
            setattr(settings, name, value)
        described = importlib.import_module("ultralytics.data.utils").check_det_dataset(data)
        self._build_loader, self.batch = made.build_dataloader, batch
        self._dataset = dataset = made.build_yolo_dataset(settings, described["train"], batch, described, mode="train")
        count = len(dataset)
        if store == "memory":
            for index in range(count):
                dataset[index]
        same = [dataset[index % count] for index in range(batch)]

        def sample(number: int) -> Any:
            return dataset[number % count]

        self.stages: dict[str, Callable[[int], object]] = {
            "collate": lambda _: dataset.collate_fn([dict(one) for one in same]),
            "augment" if store == "memory" else "sample": sample,
        }

    def batches(self, workers: int) -> Any:
        loader = self._build_loader(self._dataset, self.batch, workers, shuffle=True, rank=-1)
        while True:
            for batch in loader:
                yield batch["img"]


FORMS: dict[str, type[Any]] = {"ours": OurSamples, "ultralytics": UltralyticsSamples}


class DataWorker:
    """Answers `open`, `round`, `loader` of one row."""

    def __init__(self) -> None:
        torch.set_num_threads(1)

    def open(self, *, form: str, data: str, size: int, batch: int, store: str) -> dict[str, Any]:
        self._samples: Samples = FORMS[form](data, size, batch, store)
        self._number = 0
        return {"package": self._samples.package, "stages": list(self._samples.stages)}

    def round(self, *, count: int) -> dict[str, float]:
        """Seconds of the processor by stage, the mean of `count` samples in a row."""
        seconds = {}
        for name, call in self._samples.stages.items():
            start = time.process_time()
            for number in range(self._number, self._number + count):
                call(number)
            share = (time.process_time() - start) / count
            seconds[name] = share / self._samples.batch if name == "collate" else share
        self._number += count
        return seconds

    def loader(self, *, workers: int, seconds: float) -> float:
        """Images a second of the loader by the wall clock, from its fifth batch on."""
        batches = self._samples.batches(workers)
        for _ in range(4):
            next(batches)
        start, images = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            images += len(next(batches))
        return images / (time.perf_counter() - start)


def enlarged_copy(data: Path, folder: Path, side: int) -> Path:
    """A copy of the split train in YOLO's layout, its images scaled to `side` pixels as JPEG files of quality 90."""
    from yolov9_fast._lazy import require
    from yolov9_fast.data import load_data_config, load_split, read_image
    from yolov9_fast.data.images import resize_long_side

    cv2 = require("cv2")
    config = load_data_config(data)
    images, labels = folder / "images" / "train", folder / "labels" / "train"
    for made in (images, labels):
        made.mkdir(parents=True, exist_ok=True)
    for number, record in enumerate(load_split(config, "train", for_training=True)[0]):
        image = read_image(record.path)
        image = image if side == 0 else resize_long_side(image, side, training=False)
        cv2.imwrite(str(images / f"{number:05d}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 90])
        rows = "".join(f"{int(row[0])} " + " ".join(f"{v:.6f}" for v in row[1:]) + "\n" for row in record.boxes)
        (labels / f"{number:05d}.txt").write_text(rows)
    names = "".join(f"  {index}: {name!r}\n" for index, name in config.names.items())
    file = folder / "data.yaml"
    file.write_text(
        f"path: {folder.resolve()}\ntrain: images/train\nval: images/train\nnc: {config.num_classes}\nnames:\n{names}"
    )
    return file


def image_facts(data: Path) -> dict[str, Any]:
    """Number, median size in pixels and mean bytes of the training images."""
    from yolov9_fast.data import load_data_config, load_split

    records, _ = load_split(load_data_config(data), "train", for_training=True)
    height, width = np.median([(record.height, record.width) for record in records], axis=0)
    size = float(np.mean([record.path.stat().st_size for record in records]))
    return {"images": len(records), "median_size": [int(width), int(height)], "mean_bytes": size}


def main(words: Sequence[str]) -> int:
    return serve(DataWorker)
