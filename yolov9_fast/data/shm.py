"""How many batches wait in /dev/shm, through which loader processes send them, and whether they fit there.

A container often has 64 MiB of it. A process that writes more is ended by SIGBUS, without a word.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

_log = logging.getLogger(__name__)

_FOLDER = "/dev/shm"
_PREFETCH = 2
# Those that the trainer holds while the next is copied.
_IN_USE = 2


@dataclass(frozen=True)
class LoaderMemory:
    """What the batches of a loader may take.

    `workers`: loader processes; `prefetch`: batches that each prepares ahead; `batch`: bytes of one.
    """

    workers: int
    prefetch: int
    batch: int

    @property
    def largest(self) -> int:
        """Bytes of shared memory that batches take at most."""
        return (self.workers * self.prefetch + _IN_USE) * self.batch if self.workers else 0

    def __str__(self) -> str:
        if not self.workers:
            return "no loader processes, no shared memory"
        processes = "a loader process" if self.workers == 1 else f"{self.workers} loader processes"
        batches = "a batch" if self.prefetch == 1 else f"{self.prefetch} batches"
        return (
            f"{processes} with {batches} of {_mebibytes(self.batch)} ahead: "
            f"at most {_mebibytes(self.largest)} of shared memory"
        )


def loader_memory(workers: int, batch: int, sharers: int = 1) -> LoaderMemory:
    """Processes and batches that fit in /dev/shm; logs a warning where these are fewer than asked for.

    Args:
        workers: loader processes asked for.
        batch: bytes of a batch.
        sharers: training processes of this machine, which have as many each.
    """
    wanted, free = LoaderMemory(workers, _PREFETCH, batch), _free()
    if not workers or free is None or wanted.largest * sharers <= free:
        return wanted
    places = max(free // (batch * sharers) - _IN_USE, 0)
    found = LoaderMemory(min(workers, places), min(places // workers, _PREFETCH) or 1, batch)
    _log.warning(
        f"{_FOLDER} has {_mebibytes(free)} free, too little for {wanted}; instead {found} "
        "(Docker: --shm-size, --ipc=host)"
    )
    return found


def _free() -> int | None:
    try:
        status = os.statvfs(_FOLDER)
    except (OSError, AttributeError):
        return None
    return status.f_bavail * status.f_frsize


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB" if count >= 2**20 else f"{count / 2**20:.2g} MiB"
