"""Batches in /dev/shm: their bound is true, and where there is too little there are fewer instead of a SIGBUS."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.data.drawing import dataset_folder
from yolov9_fast.data import AugmentConfig, DetectionDataset, create_loader, load_data_config, load_split
from yolov9_fast.data.shm import LoaderMemory, loader_memory

MIB = 2**20


def limited(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=free // 4096, f_frsize=4096))


@pytest.mark.parametrize(
    ("free", "workers", "prefetch"),
    [(1000, 8, 2), (18, 8, 2), (17, 8, 1), (10, 8, 1), (9, 7, 1), (3, 1, 1), (2, 0, 1), (0, 0, 1)],
)
def test_there_are_as_many_batches_as_fit(
    free: int, workers: int, prefetch: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limited(monkeypatch, free * MIB)
    found = loader_memory(8, MIB)
    assert found == LoaderMemory(workers, prefetch, MIB)
    assert found.largest <= free * MIB
    assert len(caplog.records) == ((workers, prefetch) != (8, 2))


def test_processes_of_a_machine_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 36 * MIB)
    assert loader_memory(8, MIB, 2).prefetch == 2
    assert loader_memory(8, MIB, 3).prefetch == 1


def test_the_line_says_what_is_free_and_what_would_be_needed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limited(monkeypatch, 64 * MIB)
    assert loader_memory(8, 18 * MIB).workers == 1
    assert caplog.messages == [
        "/dev/shm has 64 MiB free, too little for 8 loader processes with 2 batches of 18 MiB ahead: at most 324 MiB "
        "of shared memory; instead a loader process with a batch of 18 MiB ahead: at most 54 MiB of shared memory "
        "(Docker: --shm-size, --ipc=host)"
    ]


def test_an_unknown_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "statvfs", missing)
    assert loader_memory(8, 2**40) == LoaderMemory(8, 2, 2**40)


@pytest.mark.parametrize("free", [2**40, 80_000, 60_000, 10_000])
def test_batches_are_the_same_with_less_shared_memory(
    free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = load_split(load_data_config(dataset_folder(tmp_path)), "train", for_training=True)[0]
    dataset = DetectionDataset(records, image_size=64, augment=AugmentConfig())
    expected = [batch.images for batch in create_loader(dataset, batch_size=1, shuffle=True)]
    limited(monkeypatch, free)
    loader = create_loader(dataset, batch_size=1, shuffle=True, workers=2)
    assert (
        loader.memory
        == {
            2**40: LoaderMemory(2, 2, 12288),
            80_000: LoaderMemory(2, 2, 12288),
            60_000: LoaderMemory(2, 1, 12288),
            10_000: LoaderMemory(0, 1, 12288),
        }[free]
    )
    assert all((a == b.images).all() for a, b in zip(expected, loader, strict=True))
    loader.close()
