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


def before(records: list[ImageRecord], *augmentations: Augmentation | str, **options: object) -> DetectionDataset:
    config = AugmentConfig(mixup=0.5, copy_paste=1)
    return DetectionDataset(records, image_size=64, augment=config, augmentations_before=augmentations, **options)


def test_source_images_are_rgb_at_the_size_of_training_with_their_objects(records: list[ImageRecord]) -> None:
    seen: list[LabelledImage] = []

    def keep(labelled: LabelledImage, rng: Generator) -> LabelledImage:
        seen.append(labelled)
        return labelled

    plain, kept = before(records), before(records, keep)
    for key in (SampleKey(3), SampleKey(3, 1), SampleKey(4, 2), SampleKey(3, 0, mosaic=False)):
        seen.clear()
        assert torch.equal(plain[key].image, kept[key].image)
        assert torch.allclose(plain[key].targets, kept[key].targets, atol=1e-5)
        members = [member for view in plain.plan(key).views for member in view.members]
        assert len(seen) == 2 * len(members)  # the sample, and its targets
        for labelled, member in zip(seen, members, strict=False):
            source = plain._store.get(member)
            np.testing.assert_array_equal(labelled.image, source[:, :, ::-1])
            np.testing.assert_array_equal(labelled.classes, records[member].boxes[:, 0])
            assert (labelled.boxes >= 0).all()


@pytest.mark.parametrize("cache", [None, "ram"])
def test_changed_source_images_and_objects_become_the_mosaic(records: list[ImageRecord], cache: str | None) -> None:
    def empty(labelled: LabelledImage, rng: Generator) -> LabelledImage:
        return LabelledImage(np.full_like(labelled.image, 114), labelled.classes[:0], labelled.boxes[:0])

    plain = before(records, cache=cache)
    made = before(records, empty, cache=cache)
    for index in range(4):
        sample = made[index]
        assert not len(sample.targets)
        assert len(sample.image.unique()) <= 3  # grey, by the colours of this sample
    for index in range(4):  # what is kept stays as it was
        np.testing.assert_array_equal(made._store.get(index), plain._store.get(index))


def test_draws_before_do_not_move_those_of_the_sample(records: list[ImageRecord]) -> None:
    plain, made = before(records), before(records, noise)
    for index in range(4):
        first, second = plain.plan(SampleKey(index)), made.plan(SampleKey(index))
        assert [view.tiles for view in first.views] == [view.tiles for view in second.views]
        assert all((a.matrix == b.matrix).all() for a, b in zip(first.views, second.views, strict=True))
    one = made.plan(SampleKey(0)).views[0]
    assert len({image[:8].tobytes() for image in one.images}) == len(one.images)
    assert not np.array_equal(one.images[0][:8], made.plan(SampleKey(0, 1)).views[0].images[0][:8])


def test_samples_with_changed_sources_are_the_same_from_any_process(records: list[ImageRecord]) -> None:
    batches = []
    for workers in (0, 2):
        loader = create_loader(before(records, noise, mirror), batch_size=3, workers=workers, shuffle=True)
        batches.append(list(loader))
        loader.close()
    assert all(torch.equal(a.images, b.images) for a, b in zip(*batches, strict=True))
    assert all(torch.equal(a.targets, b.targets) for a, b in zip(*batches, strict=True))


def test_what_a_function_before_gets_wrong_is_one_line(records: list[ImageRecord]) -> None:
    def smaller(labelled: LabelledImage, rng: Generator) -> LabelledImage:
        return LabelledImage(labelled.image[1:], labelled.classes, labelled.boxes)

    def points(labelled: LabelledImage, rng: Generator) -> LabelledImage:
        return LabelledImage(labelled.image, labelled.classes, labelled.boxes, [np.zeros((3, 3), np.float32)])

    with pytest.raises(DataError, match=r"augmentation smaller: image: expected uint8 \[\d+, \d+, 3\], got uint8"):
        before(records, smaller)[0]
    with pytest.raises(DataError, match="augmentation points: polygons: expected an empty list, or of"):
        before(records, points)[0]
    with pytest.raises(UserError, match="augmentations_before: "):
        before(records, "nothing_there:f")
    with pytest.raises(ValueError, match="augmentations_before: expected none with augment=None, got 1"):
        DetectionDataset(records, image_size=64, augment=None, augmentations_before=[noise])
