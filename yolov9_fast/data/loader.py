"""The loader: batches in an order that depends on (seed, epoch) alone, cut alike for one process and for many."""

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
) -> DetectionLoader:
    """A loader of batches of `batch_size` per process.

    Rank r of `world_size` gets the r-th contiguous part of each global batch of batch_size · world_size samples, so
    that the ranks together see what one process would. With `shuffle` a last global batch that the ranks cannot share
    evenly is filled up from the start of the order; without it no sample is given twice and ranks may have unequal
    numbers of batches.
    """
    return DetectionLoader(
        dataset,
        BatchOrder(
            dataset, batch_size, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size, drop_last=drop_last
        ),
        workers,
    )


class DetectionLoader:
    """Iterable over `Batch`; `set_epoch` before each pass chooses its draws. Worker processes live until `close`."""

    def __init__(self, dataset: DetectionDataset, order: BatchOrder, workers: int) -> None:
        if workers < 0:
            raise ValueError(f"workers must not be negative, got {workers}")
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
            # Each pass draws a seed for the workers: from here, so that the trainer's global generator is left alone.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        if self._loader is None:
            raise RuntimeError("this loader is closed")
        return _naming_deaths(iter(self._loader))

    def set_epoch(self, epoch: int, *, mosaic: bool = True) -> None:
        """Choose the order and the random draws of the next pass; without `mosaic` also no mixup and no copy-paste."""
        self._order.epoch, self._order.mosaic = epoch, mosaic
        self.dataset.set_epoch(epoch)

    def close(self) -> None:
        """End the worker processes."""
        self._loader = None


def _naming_deaths(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches; a worker's death, which shows in many ways, becomes one error that says what to do."""
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
                f"a loader process died, perhaps for lack of memory ({error}); try fewer --workers, or 0"
            ) from error
        yield batch


class BatchOrder(Sampler[list[SampleKey]]):
    """Batches of sample keys for one rank; see `create_loader`."""

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
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0..{world_size - 1}, got {rank}")
        if dataset.rect and (shuffle or batch_size != dataset.batch_size):
            raise ValueError(
                f"a rect dataset needs shuffle=False and its own batch_size {dataset.batch_size}, "
                f"got {shuffle=}, {batch_size=}"
            )
        self.epoch, self.mosaic = 0, True
        self._dataset = dataset
        self._base = np.asarray(dataset.order)
        self._batch_size, self._shuffle, self._seed = batch_size, shuffle, seed
        self._rank, self._world_size, self._drop_last = rank, world_size, drop_last

    def __len__(self) -> int:
        return len(self._cuts())

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = self._base
        if self._shuffle:
            order = np.random.default_rng((self._seed, self.epoch)).permutation(order)
        epoch, mosaic = self.epoch, self.mosaic and self._dataset.mosaic_enabled
        for start, end in self._cuts():
            yield [SampleKey(epoch, mosaic, int(order[position % len(order)])) for position in range(start, end)]

    def _cuts(self) -> list[tuple[int, int]]:
        """(start, end) of this rank's batches in the global order; `end` may pass its length where it wraps around."""
        total, whole = len(self._base), self._batch_size * self._world_size
        cuts = []
        for start in range(0, total, whole):
            count = min(whole, total - start)
            if count < whole and self._drop_last:
                break
            part = math.ceil(count / self._world_size) if self._shuffle else self._batch_size
            first = start + self._rank * part
            last = first + part if self._shuffle else min(first + part, start + count)
            if last > first:
                cuts.append((first, last))
        return cuts


def _prepare_worker(_: int) -> None:
    # Workers are the parallelism; OpenCV's own threads would fight over the cores and may hang after a fork.
    require("cv2").setNumThreads(0)
    # Ctrl-C reaches every process of the terminal; the trainer decides when the workers may stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
