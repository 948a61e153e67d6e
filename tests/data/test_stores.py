"""Cached images: the same pixels, decoded once; a full disk or memory is a warning."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import cv2
import pytest
import torch

from tests.data.drawing import dataset_folder
from yolov9_fast.data import (
    AugmentConfig,
    DetectionDataset,
    ImageRecord,
    create_loader,
    load_data_config,
    load_split,
    stores,
)
from yolov9_fast.data import dataset as dataset_module
from yolov9_fast.data.cache import cache_folder
from yolov9_fast.data.shared import SharedBytes
from yolov9_fast.errors import DataError, UserError


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
    for index in range(5):  # a sample may not show all of its images
        kept._store.get(index)
    for _ in range(2):
        for index in range(5):
            assert torch.equal(kept[index].image, expected[index].image)
            assert torch.equal(kept[index].targets, expected[index].targets)
        monkeypatch.setattr(dataset_module, "read_resized", None)


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


def words(cache: str, free: int | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> tuple:
    monkeypatch.setattr(stores, "available_memory", lambda: free)
    caplog.clear()
    with caplog.at_level("INFO"):
        chosen = stores.choose_cache(cache, [(480, 640), (640, 480)], 320, copies=2)
    [message] = caplog.messages
    return chosen, message


def test_one_line_says_where_images_are_kept_and_why(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 2 * 2 * 240 * 320 * 3
    assert words("off", 2**40, caplog, monkeypatch) == (None, "cache: none (--cache off)")
    assert words("disk", 0, caplog, monkeypatch) == ("disk", "cache: decoded images on disk (--cache disk)")
    assert words("auto", 2 * needed, caplog, monkeypatch) == (
        "ram",
        "cache: in memory, 2 decoded images take 0.00 GiB of the 0.00 GiB that are free (--cache auto)",
    )
    assert words("auto", 2 * needed - 2, caplog, monkeypatch) == (
        None,
        "cache: none, 2 decoded images take 0.00 GiB, more than 50% of the 0.00 GiB of memory that are free "
        "(--cache auto)",
    )
    assert words("ram", 2 * needed - 2, caplog, monkeypatch)[0] == "ram"
    assert words("ram", needed, caplog, monkeypatch)[0] is None
    assert words("auto", None, caplog, monkeypatch)[0] is None
    assert words("ram", None, caplog, monkeypatch)[0] == "ram"


def counted(dataset: DetectionDataset, folder: Path) -> None:
    """Have `dataset` add a byte to a file of `folder` for each image that any process decodes."""
    decode = dataset._store._load

    def load(index: int, out: object = None) -> object:
        with open(folder / str(index), "ab") as file:
            file.write(b"1")
        return decode(index, out)

    dataset._store._load = load


def test_images_are_decoded_at_first_use_and_once_for_all_processes(records: list[ImageRecord], tmp_path: Path) -> None:
    plain = DetectionDataset(records, image_size=64, augment=AugmentConfig())
    kept = DetectionDataset(records, image_size=64, augment=AugmentConfig(), cache="ram")
    decoded = tmp_path / "decoded"
    decoded.mkdir()
    counted(kept, decoded)
    assert not list(decoded.iterdir())
    loader = create_loader(kept, batch_size=2, workers=2, shuffle=True)
    expected = create_loader(plain, batch_size=2, shuffle=True)
    for epoch in range(3):
        loader.set_epoch(epoch)
        expected.set_epoch(epoch)
        assert all(torch.equal(a.images, b.images) for a, b in zip(loader, expected, strict=True))
        if epoch == 1:
            counts = {file.name: file.stat().st_size for file in decoded.iterdir()}
    loader.close()
    assert all(count <= 2 for count in counts.values())  # two processes may need it at the same time
    assert {file.name: file.stat().st_size for file in decoded.iterdir()} == counts
    # What the loader's processes decoded is there in this one too.
    assert kept._store._filled.sum() == len(counts)


def _sees(store: stores.MemoryStore, index: int, queue: object) -> None:
    queue.put((store.pixels is not None, store.get(index).tobytes(), int(store._filled.sum())))


def test_a_spawned_process_shares_the_images(records: list[ImageRecord]) -> None:
    dataset = DetectionDataset(records, image_size=64, augment=AugmentConfig(), cache="ram")
    store = dataset._store
    image = store.get(1).tobytes()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_sees, args=(store, 2, queue))
    process.start()
    reached, other, filled = queue.get()
    process.join()
    assert (reached, filled) == (True, 2)
    assert store._filled.tolist() == [0, 1, 1, 0, 0]
    assert (store.get(1).tobytes(), store.get(2).tobytes()) == (image, other)


def test_a_process_that_cannot_reach_the_images_decodes(records: list[ImageRecord]) -> None:
    dataset = DetectionDataset(records, image_size=64, augment=AugmentConfig(), cache="ram")
    expected = dataset[0]
    state = dataset._store._memory.__getstate__()
    lost = object.__new__(SharedBytes)
    lost.__setstate__({**state, "place": "/proc/0/fd/3"})
    dataset._store._memory = lost
    dataset._store._divide()
    assert dataset._store.pixels is None
    assert torch.equal(dataset[0].image, expected.image)


def test_shared_memory_takes_memory_as_it_is_written_and_none_of_dev_shm() -> None:
    before = os.statvfs("/dev/shm").f_bfree
    memory = SharedBytes(2**37)  # more than any machine of a test has
    memory.array[2**36 : 2**36 + 2**24] = 1
    assert memory.array[2**36 + 5] == 1
    assert memory.array[0] == 0
    assert before - os.statvfs("/dev/shm").f_bfree < 1000


def test_a_damaged_image_is_an_error_at_each_use_and_is_not_kept(records: list[ImageRecord]) -> None:
    dataset = DetectionDataset(records, image_size=64, augment=None, cache="ram")
    content = records[0].path.read_bytes()
    records[0].path.write_bytes(content[: len(content) // 2])
    for _ in range(2):
        with pytest.raises(DataError, match="image file"):
            dataset[0]
    records[0].path.write_bytes(content)
    assert torch.equal(dataset[0].image, DetectionDataset(records, image_size=64, augment=None)[0].image)


@pytest.mark.slow
def test_twenty_thousand_images_start_within_seconds(tmp_path: Path) -> None:
    data = dataset_folder(tmp_path, count=20)
    split = load_split(load_data_config(data), "train", for_training=True)[0]
    records = [dataclasses.replace(split[number % len(split)], image_id=number) for number in range(20_000)]
    start = time.perf_counter()
    sizes = [(record.height, record.width) for record in records]
    assert stores.choose_cache("auto", sizes, 320) == "ram"
    dataset = DetectionDataset(records, image_size=320, augment=AugmentConfig(), cache="ram")
    loader = create_loader(dataset, batch_size=16, workers=2, shuffle=True)
    next(iter(loader))
    seconds = time.perf_counter() - start
    loader.close()
    assert seconds < 10
