"""The loader: batches in an order that depends on (seed, epoch) alone, the same for one process and for several."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import signal
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data._utils import signal_handling

from yolov9_fast._lazy import require
from yolov9_fast._signals import signals_held_back
from yolov9_fast.data.dataset import DetectionDataset, SampleKey
from yolov9_fast.data.sample import Batch, Sample, collate
from yolov9_fast.data.shm import loader_memory
from yolov9_fast.data.watch import WorkerWatch
from yolov9_fast.errors import ProcessError, UserError
from yolov9_fast.limits import above_limit, limit


def create_loader(
    dataset: DetectionDataset,
    *,
    batch_size: int,
    workers: int = 0,
    shuffle: bool,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = False,
    smallest: int = 1,
    pin_memory: bool = False,
) -> DetectionLoader:
    """A loader of batches of `batch_size` per process.

    Rank r of `world_size` gets the r-th contiguous part of each global batch of batch_size · world_size samples: all
    ranks together get the batches that one process would get. With `shuffle`, the last global batch is filled up from
    the start of the order until it divides evenly and each rank has at least `smallest` samples; without it, no sample
    is repeated and ranks may have different numbers of batches. `pin_memory`: in page-locked memory, which the GPU that
    is current when a pass begins reads without the host waiting for it. `workers` send their batches through shared
    memory; where it is too small they prepare fewer, or are fewer, with a warning.
    """
    return DetectionLoader(
        dataset,
        BatchOrder(
            dataset,
            batch_size,
            shuffle=shuffle,
            seed=seed,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
            smallest=smallest,
        ),
        workers,
        pin_memory,
        local_processes(world_size),
    )


def local_processes(world_size: int) -> int:
    """How many of a run's processes are on this machine; all, unless a launcher says otherwise."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) if world_size > 1 else 1


class DetectionLoader:
    """Iterable over `Batch`. Call `set_epoch` before each pass. Worker processes end with `close`.

    Attributes:
        dataset: the dataset.
        memory: processes, batches that they prepare ahead, and the shared memory that these take.
        waited: seconds in which this process has waited for batches, so far.

    Iterating raises the `UserError` of a sample that cannot be read, and `ProcessError` if a worker dies, or sends
    nothing for long (`SILENT_SECONDS` of `limits`).
    """

    def __init__(
        self, dataset: DetectionDataset, order: BatchOrder, workers: int, pin_memory: bool = False, sharers: int = 1
    ) -> None:
        if workers < 0:
            raise ValueError(f"workers: expected at least 0, got {workers}")
        if workers > limit("WORKERS"):
            raise UserError(f"workers: {above_limit('WORKERS', workers)}")
        self.dataset = dataset
        self.memory = loader_memory(workers, order.batch_size * dataset.sample_bytes(), sharers)
        workers = self.memory.workers
        self._order = order
        self.waited = 0.0
        self._watch = WorkerWatch()
        weakref.finalize(self, self._watch.close)
        self._loader: DataLoader[Sample | UserError] | None = DataLoader(
            _ErrorsAsItems(dataset),
            batch_sampler=order,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_prepare_worker if workers else None,
            persistent_workers=workers > 0,
            prefetch_factor=self.memory.prefetch if workers else None,
            pin_memory=pin_memory,
            # Each pass draws a seed for the workers: from this generator instead of the global one.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        if self._loader is None:
            raise RuntimeError("this loader is closed")
        return self._batches(self._loader)

    def _batches(self, loader: DataLoader[Sample | UserError]) -> Iterator[Batch]:
        iterator: Iterator[Batch | UserError] | None = None
        while True:
            try:
                start = time.perf_counter()
                with self._watch.waiting():
                    if iterator is None:
                        iterator = self._start(loader)
                    batch = next(iterator, None)
                self.waited += time.perf_counter() - start
            except (ConnectionError, EOFError, FileNotFoundError, RuntimeError) as error:
                self._raise_death(iterator, error)
                raise
            if batch is None:
                return
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def _start(self, loader: DataLoader[Sample | UserError]) -> Iterator[Batch | UserError]:
        """Begin a pass, the first with new workers."""
        if loader.num_workers == 0 or self._watch.workers:
            return iter(loader)
        with signals_held_back():
            # A worker inherits this process's handlers of signals, and takes its own before it receives any.
            before = set(multiprocessing.active_children())
            masked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
            try:
                iterator = iter(loader)
                _leave_deaths_to_the_waiting(iterator)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, masked)
                self._watch.start([child for child in multiprocessing.active_children() if child not in before])
        return iterator

    def _raise_death(self, iterator: Any, error: Exception) -> None:
        """Raise `ProcessError` and end all workers, if one has died."""
        workers = self._watch.workers
        ended = wait([worker.sentinel for worker in workers], timeout=1.0) if workers else []
        dead = [worker for worker in workers if worker.sentinel in ended]
        for worker in dead:
            worker.join(5)
        if not dead:
            return
        # A process that died may hold a lock for which torch's orderly shutdown would wait.
        if iterator is not None:
            iterator._shutdown = True
        reason = self._watch.silent
        if not reason:
            endings = ", ".join(f"{worker.pid} {_ending(worker)}" for worker in dead)
            reason = f"a loader process died ({endings}); if memory ran out, try fewer --workers, or 0"
        for worker in workers:
            worker.kill()
        raise ProcessError(reason) from error

    def set_epoch(self, epoch: int, *, mosaic: bool = True) -> None:
        """Choose the order and the random draws of the next pass; without `mosaic` also no mixup and no copy-paste."""
        self._order.epoch, self._order.mosaic = epoch, mosaic

    def keys(self) -> Iterator[SampleKey]:
        """The samples of the next pass, in its order."""
        return itertools.chain.from_iterable(self._order)

    def close(self) -> None:
        """End the worker processes."""
        self._watch.end_stopped()  # They would not end before they continue.
        self._loader = None
        self._watch.end_stopped()
        self._watch.close()


class BatchOrder(Sampler[list[SampleKey]]):
    """Batches of `batch_size` sample keys of one rank; see `create_loader`."""

    def __init__(
        self,
        dataset: DetectionDataset,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        rank: int,
        world_size: int,
        drop_last: bool,
        smallest: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0..{world_size - 1}, got {rank}")
        if dataset.rect and (shuffle or batch_size != dataset.batch_size):
            raise ValueError(
                f"dataset: expected shuffle=False and batch_size={dataset.batch_size} with rect, "
                f"got {shuffle=}, {batch_size=}"
            )
        self.epoch, self.mosaic = 0, True
        self._base = np.asarray(dataset.order)
        self.batch_size, self._shuffle, self._seed = batch_size, shuffle, seed
        self._rank, self._world_size, self._drop_last, self._smallest = rank, world_size, drop_last, smallest

    def __len__(self) -> int:
        return len(self._cuts())

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = self._base
        if self._shuffle:
            order = np.random.default_rng((self._seed, self.epoch)).permutation(order)
        epoch, mosaic = self.epoch, self.mosaic
        for start, end in self._cuts():
            yield [SampleKey(int(order[position % len(order)]), epoch, mosaic) for position in range(start, end)]

    def _cuts(self) -> list[tuple[int, int]]:
        """(start, end) of this rank's batches in the global order, which is cyclic: `end` may exceed its length."""
        total, global_batch = len(self._base), self.batch_size * self._world_size
        cuts = []
        for start in range(0, total, global_batch):
            count = min(global_batch, total - start)
            if count < global_batch and self._drop_last:
                break
            part = max(math.ceil(count / self._world_size), self._smallest) if self._shuffle else self.batch_size
            first = start + self._rank * part
            last = first + part if self._shuffle else min(first + part, start + count)
            if last > first:
                cuts.append((first, last))
        return cuts


class _ErrorsAsItems(Dataset["Sample | UserError"]):
    """The samples of a dataset, or the error of one: raised in a worker, it would become the text of a traceback."""

    def __init__(self, dataset: DetectionDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, key: SampleKey) -> Sample | UserError:
        try:
            return self._dataset[key]
        except UserError as error:
            return type(error)(str(error))


def _collate(items: Sequence[Sample | UserError]) -> Batch | UserError:
    samples = [item for item in items if isinstance(item, Sample)]
    return collate(samples) if len(samples) == len(items) else next(i for i in items if isinstance(i, UserError))


def _prepare_worker(_: int) -> None:
    # The workers already use all cores, and OpenCV's threads may hang after a fork.
    require("cv2").setNumThreads(0)
    # Ctrl-C is sent to every process of the terminal; the trainer decides when the workers stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    sys.excepthook = _report_unless_reader_left


def _report_unless_reader_left(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """`sys.excepthook` of a worker, called by the thread that passes on the file descriptors of its batches.

    A trainer that is interrupted while it reads one leaves the connection; if anything else ends it, the trainer sees
    it too.
    """
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)


def _leave_deaths_to_the_waiting(iterator: Any) -> None:
    """Take the workers off torch's list: its handler of SIGCHLD raises at whatever line the program is."""
    if getattr(iterator, "_worker_pids_set", False):
        signal_handling._remove_worker_pids(id(iterator))  # type: ignore[attr-defined]
        iterator._worker_pids_set = False


def _ending(worker: BaseProcess) -> str:
    code = worker.exitcode or 0
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
