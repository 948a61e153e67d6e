"""The dataset: what a sample is, and that it depends on (seed, epoch, index) alone."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.drawing import box_of_colour, dataset_folder
from yolov9_fast.data import (
    AugmentConfig,
    DetectionDataset,
    ImageRecord,
    Sample,
    SampleKey,
    load_data_config,
    load_split,
    plan,
    scale_boxes_to_original,
)
from yolov9_fast.errors import DataError

PLAIN = AugmentConfig(hsv_h=0, hsv_s=0, hsv_v=0, translate=0, scale=0)


@pytest.fixture
def records(tmp_path: Path) -> list[ImageRecord]:
    return load_split(load_data_config(dataset_folder(tmp_path)), "train", for_training=True)[0]


def pixels(sample: Sample) -> np.ndarray:
    return sample.image.numpy()[::-1].transpose(1, 2, 0)


def pixel_boxes(sample: Sample) -> np.ndarray:
    height, width = sample.image.shape[1:]
    rows = sample.targets.numpy()
    scale = np.array([width, height])
    return np.concatenate(((rows[:, 1:3] - rows[:, 3:] / 2) * scale, (rows[:, 1:3] + rows[:, 3:] / 2) * scale), axis=1)


def same(first: Sample, second: Sample) -> bool:
    return torch.equal(first.image, second.image) and torch.equal(first.targets, second.targets)


def assert_boxes_match_pixels(sample: Sample, tolerance: float) -> None:
    labels = sample.targets[:, 0].tolist()
    for label, box in zip(labels, pixel_boxes(sample), strict=True):
        if label == max(labels):  # later classes are painted over earlier ones
            np.testing.assert_allclose(box, box_of_colour(pixels(sample), int(label)), atol=tolerance)


@pytest.mark.parametrize("rect", [False, True])
def test_evaluation_sample_is_letterboxed_and_its_boxes_scale_back(records: list[ImageRecord], rect: bool) -> None:
    dataset = DetectionDataset(records, image_size=128, augment=None, rect=rect, batch_size=4)
    for index, record in enumerate(records):
        sample = dataset[index]
        assert sample.image.dtype == torch.uint8
        assert sample.image.shape[1] % 32 == sample.image.shape[2] % 32 == 0
        assert rect or sample.image.shape == (3, 128, 128)
        assert sample.original_shape == (record.height, record.width)
        assert sample.index == index
        assert_boxes_match_pixels(sample, 1.0)
        back = scale_boxes_to_original(
            torch.from_numpy(pixel_boxes(sample)), sample.ratio, sample.pad, sample.original_shape
        )
        expected = record.boxes[:, 1:] * np.tile([record.width, record.height], 2)
        np.testing.assert_allclose((back[:, :2] + back[:, 2:]) / 2, expected[:, :2], atol=1e-3)
        np.testing.assert_allclose(back[:, 2:] - back[:, :2], expected[:, 2:], atol=1e-3)


def test_training_sample_without_mosaic_keeps_boxes_on_pixels(records: list[ImageRecord]) -> None:
    dataset = DetectionDataset(records, image_size=128, augment=PLAIN)
    for index in range(len(records)):
        sample = dataset[SampleKey(index, mosaic=False)]
        assert sample.image.shape == (3, 128, 128)
        assert_boxes_match_pixels(sample, 1.5)


def test_mosaic_sample_holds_objects_of_several_images(records: list[ImageRecord]) -> None:
    dataset = DetectionDataset(records, image_size=128, augment=AugmentConfig(scale=0.2, mixup=0))
    counts = [len(dataset[index].targets) for index in range(len(records))]
    assert np.mean(counts) > np.mean([len(record.boxes) for record in records])


def test_targets_are_inside_the_image(records: list[ImageRecord]) -> None:
    dataset = DetectionDataset(records, image_size=64, augment=AugmentConfig(degrees=10, shear=5, mixup=1.0))
    for index in range(len(records)):
        targets = dataset[index].targets
        assert targets.dtype == torch.float32
        assert targets.shape[1] == 5
        low, high = targets[:, 1:3] - targets[:, 3:] / 2, targets[:, 1:3] + targets[:, 3:] / 2
        assert (low >= -1e-5).all()
        assert (high <= 1 + 1e-5).all()
        assert (targets[:, 3:] > 0).all()


def test_sample_depends_on_seed_epoch_and_index_alone(records: list[ImageRecord]) -> None:
    def make(seed: int = 0) -> DetectionDataset:
        return DetectionDataset(records, image_size=64, augment=AugmentConfig(), seed=seed)

    first, second = make(), make()
    second[3]
    np.random.seed(5)
    torch.manual_seed(5)
    assert same(first[1], second[1])
    assert same(first[1], first[1])
    assert not same(first[1], make(seed=1)[1])
    assert not same(first[1], second[SampleKey(1, epoch=1)])
    assert same(second[SampleKey(1, epoch=1)], first[SampleKey(1, epoch=1)])


def test_without_mosaic_there_is_no_mixup_or_copy_paste(
    records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("called without mosaic")

    for name in ("mosaic", "mixup", "copy_paste"):
        monkeypatch.setattr(plan, name, refuse)
    dataset = DetectionDataset(records, image_size=64, augment=AugmentConfig(mixup=1.0, copy_paste=1.0))
    with pytest.raises(AssertionError):
        dataset[0]
    assert dataset[SampleKey(0, mosaic=False)].image.shape == (3, 64, 64)


def test_rectangular_canvases_fit_the_aspect_of_their_batch() -> None:
    empty = np.zeros((0, 5), np.float32)
    sizes = [(100, 50), (50, 100), (40, 100), (100, 40)]  # (width, height)
    made = [ImageRecord(Path(f"{i}.png"), width, height, i, empty) for i, (width, height) in enumerate(sizes)]
    dataset = DetectionDataset(made, image_size=640, augment=None, rect=True, batch_size=2)
    assert dataset.order == [3, 0, 1, 2]
    # 0.5 · 640 / 32 + 0.5 → 11 · 32 = 352; 1 · 640 / 32 + 0.5 → 21 · 32 = 672
    assert dataset._shapes == [(352, 672), (672, 352), (672, 352), (352, 672)]


def test_dataset_pickles_without_the_records_for_spawned_workers(records: list[ImageRecord]) -> None:
    dataset = DetectionDataset(records, image_size=64, augment=AugmentConfig())
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.records is None
    assert same(copy[2], dataset[2])


def test_image_that_changed_since_it_was_checked_is_an_error(records: list[ImageRecord]) -> None:
    dataset = DetectionDataset(records, image_size=64, augment=None)
    records[0].path.write_bytes(records[1].path.read_bytes())
    with pytest.raises(DataError, match=r"p000\.png: file changed while in use: expected 116x97 pixels, got 110x73"):
        dataset[0]
    records[1].path.unlink()
    with pytest.raises(DataError, match=r"p001\.png: image file is missing"):
        dataset[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 100}, "multiple of 32"),
        ({"seed": -1}, "seed"),
        ({"rect": True, "augment": AugmentConfig()}, "rect"),
        ({"cache": "tape"}, "cache"),
    ],
)
def test_wrong_option_is_named(records: list[ImageRecord], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectionDataset(records, **{"image_size": 64, "augment": None, **options})


def test_empty_dataset_is_an_error() -> None:
    with pytest.raises(DataError, match="at least one image"):
        DetectionDataset([], image_size=64, augment=None)
