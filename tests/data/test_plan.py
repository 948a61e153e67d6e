"""Plan and operator against the pipeline image by image: the same draws and objects bit for bit, the same pixels."""

from __future__ import annotations

import numpy as np
import pytest

import yolov9_fast as yf
from tests.data import pipeline
from tests.data.drawing import dataset_folder
from yolov9_fast.data import AugmentConfig, DetectionDataset, ImageRecord, SampleKey, load_data_config, load_split
from yolov9_fast.data.geometry import normalised_from_corners

CONFIGS = {
    "published": AugmentConfig(),
    "everything": AugmentConfig(
        degrees=20, shear=8, perspective=0.0005, flipud=0.5, mixup=0.5, mosaic=0.7, copy_paste=1
    ),
    "affine": AugmentConfig(degrees=45, shear=15, flipud=0.5, mixup=1, copy_paste=0),
    "nothing": AugmentConfig(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    "no colours": AugmentConfig(hsv_h=0, hsv_s=0, hsv_v=0, mosaic=0.5, fliplr=1),
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[ImageRecord]:
    folder = dataset_folder(tmp_path_factory.mktemp("images"))
    found = load_split(load_data_config(folder), "train", for_training=True)[0]
    for record in found[::2]:  # every second image with polygons
        corners = np.array([[-0.5, -0.5], [0.5, -0.4], [0.45, 0.5], [-0.5, 0.5]], np.float32)
        record.polygons = [corners * row[3:] + row[1:3] for row in record.boxes]
    return found


@pytest.mark.parametrize("cache", [None, "ram"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_planned_sample_is_that_of_the_pipeline(records: list[ImageRecord], name: str, cache: None) -> None:
    dataset = DetectionDataset(records, image_size=96, augment=CONFIGS[name], cache=cache, seed=5)
    pasted = mixed = 0
    for epoch in range(4):
        for index in range(len(records)):
            key = SampleKey(index, epoch, mosaic=epoch != 3)
            expected = pipeline.training_sample(dataset, key)
            plan = dataset.plan(key)
            pasted += sum(bool(view.pasted) for view in plan.views)
            mixed += len(plan.views) == 2
            assert np.array_equal(plan.objects.classes, expected.classes)
            assert np.array_equal(plan.objects.boxes, expected.boxes)
            assert plan.objects.boxes.dtype == np.float32
            sample = dataset[key]
            rows = np.concatenate((expected.classes[:, None], normalised_from_corners(expected.boxes, 96, 96)), axis=1)
            assert np.array_equal(sample.targets.numpy(), rows)
            with yf.backend("eager", "augment"):
                pixels = dataset[key].image.numpy()
            far = np.abs(pixels.astype(int) - expected.image[:, :, ::-1].transpose(2, 0, 1))
            assert far.max() <= (1 if name == "everything" else 0), (key, far.max(), (far > 0).mean())
            far = np.abs(sample.image.numpy().astype(int) - pixels)
            assert far.max() <= 2
            assert (far > 1).mean() <= 0.001
    config = CONFIGS[name]
    assert (mixed > 0) == (config.mixup > 0)
    assert (pasted > 0) == (config.copy_paste > 0)


def test_what_follows_draws_from_the_same_generator(records: list[ImageRecord]) -> None:
    """An augmentation from outside gets the numbers that it got when pixels were made between the draws."""
    dataset = DetectionDataset(records, image_size=64, augment=AugmentConfig(), seed=2)
    first, second = (dataset.plan(SampleKey(3)).rng.random() for _ in range(2))
    assert first == second
    assert first not in (dataset.plan(SampleKey(4)).rng.random(), dataset.plan(SampleKey(3, 1)).rng.random())


def test_a_plan_reads_no_image(records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = DetectionDataset(records, image_size=64, augment=AugmentConfig())
    monkeypatch.setattr(dataset, "_store", None)
    plan = dataset.plan(SampleKey(0))
    assert plan.objects.boxes.shape == (len(plan.objects.classes), 4)
