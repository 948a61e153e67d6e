"""Augmentations from outside the package: arguments, results, errors, worker processes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import Generator

from tests.data.drawing import dataset_folder
from yolov9_fast.data import (
    Augmentation,
    AugmentConfig,
    DetectionDataset,
    ImageRecord,
    LabelledImage,
    SampleKey,
    create_loader,
    load_data_config,
    load_split,
)
from yolov9_fast.errors import DataError, UserError


@pytest.fixture
def records(tmp_path: Path) -> list[ImageRecord]:
    return load_split(load_data_config(dataset_folder(tmp_path)), "train", for_training=True)[0]


def make(records: list[ImageRecord], *augmentations: Augmentation | str) -> DetectionDataset:
    return DetectionDataset(records, image_size=64, augment=AugmentConfig(), augmentations=augmentations)


def noise(labelled: LabelledImage, rng: Generator) -> LabelledImage:
    labelled.image[:8] = rng.integers(256, size=labelled.image[:8].shape)
    return labelled


def mirror(labelled: LabelledImage, rng: Generator) -> LabelledImage:
    width = labelled.size[1]
    boxes = labelled.boxes.copy()
    boxes[:, [0, 2]] = width - labelled.boxes[:, [2, 0]]
    return LabelledImage(labelled.image[:, ::-1], labelled.classes, boxes)


def test_the_image_is_rgb_and_augmented(records: list[ImageRecord]) -> None:
    seen: list[LabelledImage] = []

    def keep(labelled: LabelledImage, rng: Generator) -> LabelledImage:
        seen.append(LabelledImage(labelled.image.copy(), labelled.classes.copy(), labelled.boxes.copy()))
        return labelled

    plain, kept = make(records)[3], make(records, keep)[3]
    assert torch.equal(plain.image, kept.image)
    assert torch.equal(plain.targets, kept.targets)
    np.testing.assert_array_equal(seen[0].image, plain.image.permute(1, 2, 0).numpy())
    assert seen[0].image.dtype == np.uint8
    np.testing.assert_array_equal(seen[0].classes, plain.targets[:, 0].numpy())


def test_what_it_returns_becomes_the_sample(records: list[ImageRecord]) -> None:
    plain, mirrored = make(records)[3], make(records, mirror)[3]
    assert torch.equal(mirrored.image, plain.image.flip(2))
    torch.testing.assert_close(mirrored.targets[:, 1], 1 - plain.targets[:, 1])
    assert torch.equal(make(records, mirror, mirror)[3].image, plain.image)


def test_its_draws_depend_on_seed_epoch_and_index_alone(records: list[ImageRecord]) -> None:
    first, second = make(records, noise), make(records, noise)
    second[0]
    assert torch.equal(first[3].image, second[3].image)
    assert torch.equal(first[3].image[:, 8:], make(records)[3].image[:, 8:])
    assert not torch.equal(first[3].image[:, :8], second[SampleKey(3, epoch=1)].image[:, :8])


def test_batches_are_the_same_with_and_without_workers(records: list[ImageRecord]) -> None:
    batches = []
    for workers in (0, 2):
        loader = create_loader(make(records, noise), batch_size=4, workers=workers, shuffle=True)
        batches.append(list(loader))
        loader.close()
    for alone, shared in zip(*batches, strict=True):
        assert torch.equal(alone.images, shared.images)
        assert torch.equal(alone.targets, shared.targets)


def test_an_import_path_reaches_a_spawned_worker(
    records: list[ImageRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blackout.py").write_text("def black(labelled, rng):\n    labelled.image[:] = 0\n    return labelled\n")
    monkeypatch.chdir(tmp_path)
    dataset = make(records, "blackout:black")
    assert not dataset[0].image.any()
    (tmp_path / "dataset.pickle").write_bytes(pickle.dumps(dataset))
    code = "import pickle; print(int(pickle.load(open('dataset.pickle', 'rb'))[0].image.max()))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout.strip() == "0", done.stderr


def changed(**fields: object) -> Callable[[LabelledImage], object]:
    return lambda labelled: LabelledImage(**{**vars(labelled), **fields})  # type: ignore[arg-type]


BOX = np.array([[4, 4, 20, 20]], np.float32)
CLASS = np.zeros(1, np.float32)


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        (lambda _: None, "expected a LabelledImage, got NoneType"),
        (changed(image=None), "image: expected uint8 [64, 64, 3], got NoneType"),
        (lambda x: changed(image=x.image / 255)(x), "image: expected uint8 [64, 64, 3], got float64 [64, 64, 3]"),
        (lambda x: changed(image=x.image[1:])(x), "image: expected uint8 [64, 64, 3], got uint8 [63, 64, 3]"),
        (changed(boxes=None), "boxes: expected float32 [0, 4], got NoneType"),
        (changed(boxes=BOX[:, :3], classes=CLASS), "boxes: expected float32 [1, 4], got float32 [1, 3]"),
        (changed(boxes=BOX, classes=np.zeros(2)), "classes: expected float32 [1], got float64 [2]"),
        (changed(boxes=BOX * np.nan, classes=CLASS), "boxes: expected finite numbers, got NaN or infinity"),
        (
            changed(boxes=BOX * 4, classes=CLASS),
            "boxes: expected 0 <= x1 < x2 <= 64 and 0 <= y1 < y2 <= 64, got [16.0, 16.0, 80.0, 80.0]",
        ),
        (
            changed(boxes=BOX * 0, classes=CLASS),
            "boxes: expected 0 <= x1 < x2 <= 64 and 0 <= y1 < y2 <= 64, got [0.0, 0.0, 0.0, 0.0]",
        ),
        (changed(boxes=BOX, classes=CLASS - 1), "classes: expected whole numbers from 0, got -1.0"),
        (changed(boxes=BOX, classes=CLASS + 0.5), "classes: expected whole numbers from 0, got 0.5"),
    ],
)
def test_a_wrong_result_is_one_line_that_names_the_augmentation(
    records: list[ImageRecord], result: Callable[[LabelledImage], object], problem: str
) -> None:
    def broken(labelled: LabelledImage, rng: Generator) -> LabelledImage:
        return result(labelled)  # type: ignore[return-value]

    with pytest.raises(DataError) as error:
        make(records, broken)[0]
    assert str(error.value) == f"augmentation broken: {problem}"


def nothing(labelled: LabelledImage, rng: Generator) -> LabelledImage:
    return None  # type: ignore[return-value]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_message_of_a_worker_is_the_same_line(records: list[ImageRecord], workers: int) -> None:
    loader = create_loader(make(records, nothing), batch_size=4, workers=workers, shuffle=False)
    with pytest.raises(DataError) as error:
        next(iter(loader))
    loader.close()
    assert str(error.value) == "augmentation nothing: expected a LabelledImage, got NoneType"


def test_only_training_has_augmentations(records: list[ImageRecord]) -> None:
    with pytest.raises(ValueError, match=r"^augmentations: expected none with augment=None"):
        DetectionDataset(records, image_size=64, augment=None, augmentations=[mirror])


@pytest.mark.parametrize("path", ["no_such_module:f", "json:no_such_function", "json", ":"])
def test_an_import_path_of_nothing_is_a_user_error(records: list[ImageRecord], path: str) -> None:
    with pytest.raises(UserError, match=r"^augmentations: "):
        make(records, path)
