"""Cached images: the same pixels, decoded once; a full disk or memory is a warning."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest
import torch

from tests.data.drawing import dataset_folder
from yolov9_fast.data import AugmentConfig, DetectionDataset, ImageRecord, load_data_config, load_split, stores
from yolov9_fast.data import dataset as dataset_module
from yolov9_fast.data.cache import cache_folder
from yolov9_fast.errors import UserError


@pytest.fixture
def records(tmp_path: Path) -> list[ImageRecord]:
    return load_split(load_data_config(dataset_folder(tmp_path, count=5)), "train", for_training=True)[0]


@pytest.mark.parametrize("augment", [None, AugmentConfig()])
@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_cached_images_give_the_same_samples_without_decoding(
    records: list[ImageRecord], cache, augment: AugmentConfig | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = DetectionDataset(records, image_size=64, augment=augment)
    kept = DetectionDataset(records, image_size=64, augment=augment, cache=cache, cache_dir=tmp_path / "kept")
    expected = [plain[index] for index in range(5)]
    for _ in range(2):
        for index in range(5):
            assert torch.equal(kept[index].image, expected[index].image)
            assert torch.equal(kept[index].targets, expected[index].targets)
        monkeypatch.setattr(dataset_module, "read_image", None)


def test_too_little_memory_is_a_warning_and_nothing_is_cached(
    records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stores, "available_memory", lambda: 1000)
    dataset = DetectionDataset(records, image_size=64, augment=None, cache="ram")
    assert "5 images at 64 px need" in caplog.text
    assert isinstance(dataset._store, stores.NoStore)
    assert dataset[0].image.shape == (3, 64, 64)


def test_free_memory_is_known_here() -> None:
    free = stores.available_memory()
    assert free is None or free > 0


def test_damaged_file_is_written_again(records: list[ImageRecord], tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    dataset = DetectionDataset(records, image_size=64, augment=None, cache="disk", cache_dir=folder)
    expected = dataset[0].image
    [file] = folder.glob("*.npy")
    content = file.read_bytes()
    header = content.index(b"(")
    declared = content[:header] + b"(99999999999, 64, 3), }" + content[header + 23 :]
    for damage in (b"", content[:40], content[:-7], b"PK\x03\x04 no", declared, content.replace(b"), }", b"((((")):
        file.write_bytes(damage)
        assert torch.equal(dataset[0].image, expected)
        assert file.read_bytes() == content


def test_full_disk_is_one_warning(
    records: list[ImageRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("yolov9_fast.atomic.os.fsync", full)
    folder = tmp_path / "kept"
    dataset = DetectionDataset(records, image_size=64, augment=None, cache="disk", cache_dir=folder)
    for index in range(5):
        assert dataset[index].image.shape == (3, 64, 64)
    assert caplog.text.count("no longer cached on disk") == 1
    assert "No space left" in caplog.text
    assert list(folder.iterdir()) == []


def test_changed_image_is_not_read_from_the_cache(records: list[ImageRecord], tmp_path: Path) -> None:
    dataset = DetectionDataset(records, image_size=64, augment=None, cache="disk", cache_dir=tmp_path / "kept")
    before = dataset[0].image
    records[0].path.write_bytes(records[1].path.read_bytes())
    records[0].width, records[0].height = records[1].width, records[1].height
    again = DetectionDataset(records, image_size=64, augment=None, cache="disk", cache_dir=tmp_path / "kept")
    assert not torch.equal(again[0].image, before)


def test_another_decoder_decodes_again(
    records: list[ImageRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = DetectionDataset(records, image_size=64, augment=None, cache="disk", cache_dir=tmp_path / "kept")
    dataset[0]
    monkeypatch.setattr(cv2, "__version__", "4.10.0")
    again = DetectionDataset(records, image_size=64, augment=None, cache="disk", cache_dir=tmp_path / "kept")
    again[0]
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_a_cache_folder_under_a_file_is_one_warning_that_names_it(
    records: list[ImageRecord], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    dataset = DetectionDataset(records, image_size=64, augment=None, cache="disk", cache_dir=tmp_path / "file" / "kept")
    for index in range(5):
        assert dataset[index].image.shape == (3, 64, 64)
    (warning,) = caplog.messages
    assert str(tmp_path / "file" / "kept") in warning
    assert "damaged" not in warning


def test_a_cache_folder_that_is_no_path_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value, message in (
        ("YOLOV9_FAST_CACHE", "x" * 300, "YOLOV9_FAST_CACHE: expected a path"),
        ("YOLOV9_FAST_CACHE", "~nobody-of-this-name", "YOLOV9_FAST_CACHE: expected a path"),
        ("XDG_CACHE_HOME", "x" * 300, "YOLOV9_FAST_CACHE sets another"),
    ):
        monkeypatch.delenv("YOLOV9_FAST_CACHE", raising=False)
        monkeypatch.setenv(variable, value)
        with pytest.raises(UserError, match=message):
            cache_folder()


def test_without_a_home_the_cache_folder_must_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    for variable in ("YOLOV9_FAST_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(UserError, match=r"folder of cached files \(YOLOV9_FAST_CACHE sets another\): .*home"):
        cache_folder()
    monkeypatch.setenv("YOLOV9_FAST_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
