"""The loader: reproducible batches with any number of workers; ranks share the batches of one process."""

from __future__ import annotations

import contextlib
import multiprocessing.resource_sharer
import os
import re
import signal
import socket
import struct
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.data.drawing import dataset_folder
from yolov9_fast.data import (
    AugmentConfig,
    Batch,
    DetectionDataset,
    DetectionLoader,
    ImageRecord,
    create_loader,
    load_data_config,
    load_split,
)
from yolov9_fast.data.augment import LabelledImage
from yolov9_fast.data.loader import _report_unless_reader_left
from yolov9_fast.data.watch import state
from yolov9_fast.errors import DataError, ProcessError, UserError


@pytest.fixture
def records(tmp_path: Path) -> list[ImageRecord]:
    return load_split(load_data_config(dataset_folder(tmp_path)), "train", for_training=True)[0]


def training_set(records: list[ImageRecord]) -> DetectionDataset:
    return DetectionDataset(records, image_size=64, augment=AugmentConfig())


def equal(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) and a.indices == b.indices
        for a, b in zip(first, second, strict=True)
    )


def epochs(loader: DetectionLoader, plan: list[tuple[int, bool]]) -> list[list[Batch]]:
    result = []
    for epoch, mosaic in plan:
        loader.set_epoch(epoch, mosaic=mosaic)
        result.append(list(loader))
    loader.close()
    return result


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_last_batch_that_is_too_small_is_filled_from_the_start_of_the_order(
    records: list[ImageRecord], world_size: int
) -> None:
    dataset, size = training_set(records), 11 if world_size == 1 else 5
    parts = [
        [
            batch.indices
            for batch in create_loader(
                dataset, batch_size=size, shuffle=True, rank=rank, world_size=world_size, smallest=2
            )
        ]
        for rank in range(world_size)
    ]
    assert [[len(batch) for batch in part] for part in parts] == [[size, 2]] * world_size
    order = [index for part in parts for index in part[0]]
    last = [index for part in parts for index in part[1]]
    missing = [index for index in range(12) if index not in order]
    assert sorted(last) == sorted([*missing, *order[: 2 * world_size - len(missing)]])


def test_batch_numbers_the_targets_by_image(records: list[ImageRecord]) -> None:
    dataset = DetectionDataset(records, image_size=64, augment=None)
    batches = list(create_loader(dataset, batch_size=5, shuffle=False))
    assert [len(batch.indices) for batch in batches] == [5, 5, 2]
    batch = batches[1]
    assert batch.images.shape == (5, 3, 64, 64)
    assert batch.images.dtype == torch.uint8
    assert batch.indices == [5, 6, 7, 8, 9]
    for position, index in enumerate(batch.indices):
        assert torch.equal(batch.targets[batch.targets[:, 0] == position, 1:], dataset[index].targets)


def test_batches_of_persistent_workers_depend_on_epoch_and_mosaic_alone(records: list[ImageRecord]) -> None:
    plan = [(0, True), (1, True), (2, False)]
    alone = epochs(create_loader(training_set(records), batch_size=4, shuffle=True), plan)
    helped = epochs(create_loader(training_set(records), batch_size=4, shuffle=True, workers=2), plan)
    assert all(equal(a, b) for a, b in zip(alone, helped, strict=True))
    assert not equal(alone[0], alone[1])
    [with_mosaic] = epochs(create_loader(training_set(records), batch_size=4, shuffle=True), [(2, True)])
    assert not equal(with_mosaic, alone[2])


def test_mosaic_ends_in_running_workers(records: list[ImageRecord]) -> None:
    [expected] = epochs(create_loader(training_set(records), batch_size=4, shuffle=True), [(0, False)])
    loader = create_loader(training_set(records), batch_size=4, shuffle=True, workers=1)
    assert not equal(list(loader), expected)
    [after] = epochs(loader, [(0, False)])
    assert equal(after, expected)


def test_an_unfinished_pass_does_not_affect_the_next(records: list[ImageRecord]) -> None:
    loader = create_loader(training_set(records), batch_size=2, shuffle=True, workers=1)
    [expected] = epochs(create_loader(training_set(records), batch_size=2, shuffle=True), [(1, True)])
    next(iter(loader))
    [after] = epochs(loader, [(1, True)])
    assert equal(after, expected)


def test_seed_changes_the_order(records: list[ImageRecord]) -> None:
    dataset = DetectionDataset(records, image_size=64, augment=None)
    orders = [[b.indices for b in create_loader(dataset, batch_size=4, shuffle=True, seed=seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(chain.from_iterable(orders[2])) == list(range(12))


def test_loading_leaves_the_global_generators_alone(records: list[ImageRecord]) -> None:
    state = torch.get_rng_state()
    list(create_loader(training_set(records), batch_size=4, shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("batch_size", "world_size"), [(3, 2), (2, 3), (5, 2), (4, 3)])
def test_ranks_together_get_the_batches_of_one_process(
    records: list[ImageRecord], batch_size: int, world_size: int
) -> None:
    dataset = DetectionDataset(records, image_size=64, augment=None)
    one = [b.indices for b in create_loader(dataset, batch_size=batch_size * world_size, shuffle=True, seed=3)]
    ranks = [
        [
            b.indices
            for b in create_loader(
                dataset, batch_size=batch_size, shuffle=True, seed=3, rank=rank, world_size=world_size
            )
        ]
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    start = one[0]
    for batch, *parts in zip(one, *ranks, strict=True):
        together = list(chain.from_iterable(parts))
        assert together[: len(batch)] == batch
        assert together[len(batch) :] == start[: len(together) - len(batch)]
        assert len({len(part) for part in parts}) == 1


@pytest.mark.parametrize("batch_size", [1, 3, 5, 7])
def test_evaluation_ranks_share_the_images_without_duplicates(records: list[ImageRecord], batch_size: int) -> None:
    dataset = DetectionDataset(records, image_size=64, augment=None, rect=True, batch_size=batch_size)
    loaders = [create_loader(dataset, batch_size=batch_size, shuffle=False, rank=r, world_size=2) for r in range(2)]
    batches = [batch for loader in loaders for batch in loader]
    assert sorted(chain.from_iterable(batch.indices for batch in batches)) == list(range(12))
    assert [len(loader) for loader in loaders] == [sum(1 for _ in loader) for loader in loaders]


def test_drop_last_gives_full_batches_only(records: list[ImageRecord]) -> None:
    dataset = DetectionDataset(records, image_size=64, augment=None)
    loader = create_loader(dataset, batch_size=5, shuffle=True, drop_last=True)
    assert [len(batch.indices) for batch in loader] == [5, 5]
    assert len(loader) == 2


def _signal_a_worker(records: list[ImageRecord], number: signal.Signals) -> str:
    """The error of a pass during which one of two workers got a signal; no worker is left."""
    loader = create_loader(training_set(records), batch_size=1, shuffle=True, workers=2)
    batches = iter(loader)
    next(batches)
    workers = loader._watch.workers
    os.kill(workers[0].pid or 0, number)
    with pytest.raises(ProcessError) as caught:
        list(batches)
    for worker in workers:
        worker.join(5)
        assert not worker.is_alive()
    loader.close()
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(workers[0].pid), "PID")


def test_killed_worker_is_an_error_and_no_hang(records: list[ImageRecord]) -> None:
    error = _signal_a_worker(records, signal.SIGKILL)
    assert error == "a loader process died (PID by SIGKILL); if memory ran out, try fewer --workers, or 0"


@pytest.mark.slow
def test_stopped_worker_is_an_error_after_the_time_limit(
    records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YOLOV9_FAST_MAX_SILENT_SECONDS", "1")
    assert re.fullmatch(r"no batch for \d s: loader process PID \(stopped\)", _signal_a_worker(records, signal.SIGSTOP))


def test_closing_ends_a_stopped_worker(records: list[ImageRecord]) -> None:
    loader = create_loader(training_set(records), batch_size=4, shuffle=True, workers=1)
    list(loader)
    [worker] = loader._watch.workers
    os.kill(worker.pid or 0, signal.SIGSTOP)
    while state(worker) != "stopped":
        time.sleep(0.01)
    loader.close()
    worker.join(5)
    assert not worker.is_alive()


def test_a_slow_worker_is_named_and_not_ended(
    records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("YOLOV9_FAST_MAX_SILENT_SECONDS", "1")
    dataset = DetectionDataset(records[:1], image_size=64, augment=AugmentConfig(), augmentations=[_wait])
    [batch] = create_loader(dataset, batch_size=1, shuffle=True, workers=1)
    assert batch.indices == [0]
    assert re.search(r"no batch for 1 s: waiting for loader process \d+ \(sleeping\)", caplog.text)


def _wait(labelled: LabelledImage, rng: object) -> LabelledImage:
    time.sleep(2.5)
    return labelled


def test_the_error_of_a_sample_is_one_line_from_any_process(records: list[ImageRecord]) -> None:
    dataset = training_set(records)
    for record in records:
        record.path.unlink()
    messages = set()
    for workers in (0, 1):
        with pytest.raises(DataError) as caught:
            list(create_loader(dataset, batch_size=4, shuffle=True, workers=workers))
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert re.fullmatch(r"\S+: image file is missing", messages.pop())


def _leave_after(sent: bytes) -> Any:
    """A reader of a file descriptor that is interrupted after it has sent these bytes of the first message."""

    def detach(descriptor: Any) -> int:
        address, _ = descriptor._id
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(address)
            connection.sendall(sent)
        raise KeyboardInterrupt

    return detach


@pytest.mark.parametrize("sent", [b"", struct.pack("!i", 20), struct.pack("!i", 20) + b"short"])
def test_interrupt_while_a_batch_is_received_prints_nothing(
    records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], sent: bytes
) -> None:
    loader = create_loader(training_set(records), batch_size=1, shuffle=True, workers=1)
    batches = iter(loader)
    next(batches)
    [worker] = loader._watch.workers
    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing.resource_sharer.DupFd, "detach", _leave_after(sent))
        with pytest.raises(KeyboardInterrupt):
            list(batches)
    # The thread that was left goes on: the next descriptor is answered after the error of this one.
    with contextlib.suppress(StopIteration):
        next(batches)
    loader.close()
    worker.join(5)
    assert capfd.readouterr() == ("", "")


def test_other_errors_of_a_workers_threads_are_printed(capfd: pytest.CaptureFixture[str]) -> None:
    _report_unless_reader_left(ValueError, ValueError("planted"), None)
    assert capfd.readouterr().err == "ValueError: planted\n"


def test_worker_survives_ctrl_c(records: list[ImageRecord]) -> None:
    loader = create_loader(training_set(records), batch_size=1, shuffle=True, workers=1)
    batches = iter(loader)
    next(batches)
    [process] = loader._watch.workers
    os.kill(process.pid or 0, signal.SIGINT)
    assert sum(1 for _ in batches) == 11
    loader.close()


def test_closed_loader_raises_and_its_workers_have_ended(records: list[ImageRecord]) -> None:
    loader = create_loader(training_set(records), batch_size=4, shuffle=True, workers=1)
    batches = iter(loader)
    list(batches)
    [process] = loader._watch.workers
    del batches
    loader.close()
    process.join(5)
    assert not process.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        iter(loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"workers": -1}, "workers"),
    ],
)
def test_wrong_option_is_named(records: list[ImageRecord], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_loader(training_set(records), **{"batch_size": 2, "shuffle": True, **options})


def test_too_many_workers_are_refused_before_one_starts(records: list[ImageRecord]) -> None:
    with pytest.raises(UserError, match="workers: expected at most 512 processes, got 999,999,999"):
        create_loader(training_set(records), batch_size=2, workers=999_999_999, shuffle=False)


def test_rect_dataset_needs_its_own_batches(records: list[ImageRecord]) -> None:
    dataset = DetectionDataset(records, image_size=64, augment=None, rect=True, batch_size=4)
    with pytest.raises(ValueError, match="expected shuffle=False and batch_size=4 with rect"):
        create_loader(dataset, batch_size=3, shuffle=False)


def test_a_signal_while_workers_start_comes_when_they_can_be_ended(
    records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    loader = create_loader(training_set(records), batch_size=1, shuffle=True, workers=1)
    monkeypatch.setattr(DataLoader, "__iter__", _interrupted(DataLoader.__iter__))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(loader)
    finally:
        signal.signal(signal.SIGINT, before)
    [worker] = loader._watch.workers  # it is known, so it can be ended
    loader.close()
    worker.join(5)
    assert not worker.is_alive()
    assert capfd.readouterr().err == ""


def _interrupted(function: Any) -> Any:
    def call(loader: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # without the hold the signal is raised here, by whichever thread takes it
        return function(loader)

    return call


@pytest.mark.parametrize("workers", [0, 2])
def test_the_time_in_which_batches_are_waited_for_is_counted(records: list[ImageRecord], workers: int) -> None:
    def slow(labelled: LabelledImage, rng: Any) -> LabelledImage:
        time.sleep(0.05)
        return labelled

    dataset = DetectionDataset(records, image_size=64, augment=AugmentConfig(), augmentations=[slow])
    loader = create_loader(dataset, batch_size=6, workers=workers, shuffle=True)
    start = time.perf_counter()
    for _ in loader:
        time.sleep(0.5)  # which is not waiting
    seconds = time.perf_counter() - start
    loader.close()
    assert 0.3 <= loader.waited <= seconds - 1.0
