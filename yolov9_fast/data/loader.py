"""The loader: batches in an order that depends on (seed, epoch) alone, the same for one process and for several."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from yolov9_fast._lazy import require
from yolov9_fast.data.dataset import DetectionDataset, SampleKey
from yolov9_fast.data.sample import Batch, Sample, collate
from yolov9_fast.errors import DataError


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
) -> DetectionLoader:
    """A loader of batches of `batch_size` per process.

    Rank r of `world_size` gets the r-th contiguous part of each global batch of batch_size · world_size samples: all
    ranks together get the batches that one process would get. With `shuffle`, the last global batch is filled up from
    the start of the order until it divides evenly and each rank has at least `smallest` samples; without it, no sample
    is repeated and ranks may have different numbers of batches.
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
    )


class DetectionLoader:
    """Iterable over `Batch`. Call `set_epoch` before each pass. Worker processes end with `close`."""

    def __init__(self, dataset: DetectionDataset, order: BatchOrder, workers: int) -> None:
        if workers < 0:
            raise ValueError(f"workers: expected at least 0, got {workers}")
        self.dataset = dataset
        self._order = order
        self._loader: DataLoader[Sample] | None = DataLoader(
            dataset,
            batch_sampler=order,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=_prepare_worker if workers else None,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Each pass draws a seed for the workers: from this generator instead of the global one.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        if self._loader is None:
            raise RuntimeError("this loader is closed")
        return _with_clear_errors(iter(self._loader))

    def set_epoch(self, epoch: int, *, mosaic: bool = True) -> None:
        """Choose the order and the random draws of the next pass; without `mosaic` also no mixup and no copy-paste."""
        self._order.epoch, self._order.mosaic = epoch, mosaic

    def close(self) -> None:
        """End the worker processes."""
        self._loader = None


def _with_clear_errors(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches; a worker's `DataError` becomes one line, a worker's death one error however it shows."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except DataError as error:
            # A worker's error comes with its traceback, which ends with the message.
            raise DataError(str(error).rpartition("DataError: ")[2].strip()) from error
        except (ConnectionError, EOFError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"a loader process died, perhaps out of memory ({error}); try fewer --workers, or 0"
            ) from error
        yield batch


class BatchOrder(Sampler[list[SampleKey]]):
    """Batches of sample keys of one rank; see `create_loader`."""

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
        self._batch_size, self._shuffle, self._seed = batch_size, shuffle, seed
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
        total, global_batch = len(self._base), self._batch_size * self._world_size
        cuts = []
        for start in range(0, total, global_batch):
            count = min(global_batch, total - start)
            if count < global_batch and self._drop_last:
                break
            part = max(math.ceil(count / self._world_size), self._smallest) if self._shuffle else self._batch_size
            first = start + self._rank * part
            last = first + part if self._shuffle else min(first + part, start + count)
            if last > first:
                cuts.append((first, last))
        return cuts


def _prepare_worker(_: int) -> None:
    # The workers already use all cores, and OpenCV's threads may hang after a fork.
    require("cv2").setNumThreads(0)
    # Ctrl-C is sent to every process of the terminal; the trainer decides when the workers stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
