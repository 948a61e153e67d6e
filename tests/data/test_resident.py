"""Images that stay on a device: samples are plans, and what is made of them is what the loader would have sent."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
import torch

from tests.data.drawing import dataset_folder
from yolov9_fast.data import (
    AugmentConfig,
    DetectionDataset,
    ImageRecord,
    SampleKey,
    create_loader,
    load_data_config,
    load_split,
    resident,
)
from yolov9_fast.data.resident import hold_images
from yolov9_fast.data.sample import Batch
from yolov9_fast.errors import DataError

CPU = torch.device("cpu")
CONFIGS = {
    "published": AugmentConfig(),
    "everything": AugmentConfig(degrees=20, shear=8, perspective=0.0005, flipud=0.5, mixup=0.5, mosaic=0.7),
    "no mosaic": AugmentConfig(mosaic=0),
    "no colours": AugmentConfig(hsv_h=0, hsv_s=0, hsv_v=0, mixup=1),
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[ImageRecord]:
    folder = dataset_folder(tmp_path_factory.mktemp("images"))
    return load_split(load_data_config(folder), "train", for_training=True)[0]


def dataset_of(records: list[ImageRecord], name: str = "everything") -> DetectionDataset:
    return DetectionDataset(records, image_size=64, augment=CONFIGS[name], seed=5)


def batches(dataset: DetectionDataset, epoch: int, *, mosaic: bool = True, workers: int = 0) -> list[Batch]:
    loader = create_loader(dataset, batch_size=3, workers=workers, shuffle=True)
    loader.set_epoch(epoch, mosaic=mosaic)
    found = list(loader)
    loader.close()
    return found


def assert_same(sent: list[Batch], planned: list[Batch], pixels: torch.Tensor) -> None:
    assert len(sent) == len(planned) > 1
    for one, other in zip(sent, planned, strict=True):
        assert one.planned is None
        assert other.planned is not None
        assert other.images.shape == (len(other.indices), 3, 0, 0)
        assert torch.equal(other.planned.make(pixels), one.images)
        assert torch.equal(other.targets, one.targets)
        assert other.indices == one.indices
        assert other.original_shapes == one.original_shapes
        assert other.ratios == one.ratios
        assert other.pads == one.pads


@pytest.mark.parametrize("name", CONFIGS)
def test_planned_batches_become_those_that_the_loader_sends(records: list[ImageRecord], name: str) -> None:
    sending, planning = (dataset_of(records, name) for _ in range(2))
    pixels = hold_images(planning, CPU)
    assert pixels is not None
    forms = set()
    for epoch, mosaic in ((0, True), (1, True), (2, False)):
        planned = batches(planning, epoch, mosaic=mosaic)
        assert_same(batches(sending, epoch, mosaic=mosaic), planned, pixels)
        forms |= {batch.planned.form for batch in planned if batch.planned}
    # One form with and without mosaic and mixup; a short last batch has its own.
    assert len({form._replace(batch=0) for form in forms}) == 1
    assert len(forms) == (2 if len(records) % 3 else 1)


@pytest.mark.slow
def test_planned_batches_come_from_workers_too(records: list[ImageRecord]) -> None:
    sending, planning = (dataset_of(records) for _ in range(2))
    pixels = hold_images(planning, CPU)
    assert pixels is not None
    assert_same(batches(sending, 0), batches(planning, 0, workers=2), pixels)


@pytest.mark.parametrize("part", [1, 20_000, 1 << 28])
def test_images_lie_one_after_the_other_whatever_is_decoded_at_once(
    records: list[ImageRecord], part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "_PART", part)
    dataset = dataset_of(records)
    images = [np.empty((*dataset.resized(index), 3), np.uint8) for index in range(len(records))]
    for index, image in enumerate(images):
        dataset.read(index, image)
    expected = np.concatenate([image.reshape(-1) for image in images])
    pixels = hold_images(dataset, CPU)
    assert pixels is not None
    assert np.array_equal(pixels.numpy(), expected)
    assert dataset.offsets()[-1] == len(expected)


def test_images_that_do_not_fit_stay_with_the_loader_and_one_line_says_so(
    records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "yolov9_fast")
    dataset = dataset_of(records)
    needed = int(dataset.offsets()[-1])
    monkeypatch.setattr(resident, "available_memory", lambda: 2 * needed - 1)
    assert hold_images(dataset, CPU) is None
    (line,) = caplog.messages
    assert line.startswith(f"{len(records)} images at 64 px need ")
    assert line.endswith(" GiB: images are augmented on the CPU")
    assert dataset[SampleKey(0)].planned is None
    monkeypatch.setattr(resident, "available_memory", lambda: 2 * needed)
    assert hold_images(dataset, CPU) is not None


def test_an_image_that_cannot_be_read_ends_it_with_its_name(records: list[ImageRecord]) -> None:
    records = [*records[:2], ImageRecord(records[0].path.with_name("none.jpg"), 8, 8, 9, records[0].boxes)]
    dataset = dataset_of(records)
    with pytest.raises(DataError, match=r"none\.jpg"):
        hold_images(dataset, CPU)


def test_a_batch_keeps_its_plan_when_it_is_sent(records: list[ImageRecord]) -> None:
    dataset = dataset_of(records)
    pixels = hold_images(dataset, CPU)
    assert pixels is not None
    (batch, *_) = batches(dataset, 0)
    again: Batch = pickle.loads(pickle.dumps(batch))
    assert batch.planned is not None
    assert again.planned is not None
    assert again.planned.form == batch.planned.form
    assert torch.equal(again.planned.make(pixels), batch.planned.make(pixels))
    assert again.planned.shape == (3, 3, 64, 64)
