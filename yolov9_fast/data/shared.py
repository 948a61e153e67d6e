"""Memory that the processes of a run share: it belongs to no folder, and ends with the last of them."""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray


class SharedBytes:
    """`array`: uint8 [size], zeros at first; None in a spawned process that cannot reach it.

    Forked processes share it everywhere, spawned ones on Linux. It counts as memory, not as space of /dev/shm, and
    takes it page by page as it is written.
    """

    array: NDArray[np.uint8] | None

    def __init__(self, size: int) -> None:
        self._size = size
        self._file = os.memfd_create("yolov9_fast") if hasattr(os, "memfd_create") else -1
        if self._file >= 0:
            os.ftruncate(self._file, max(size, 1))
        self._map(self._file)

    def _map(self, file: int) -> None:
        self.array = np.frombuffer(mmap.mmap(file, max(self._size, 1)), dtype=np.uint8)[: self._size]

    def __getstate__(self) -> dict[str, Any]:
        # Whoever unpickles it is spawned by this process, which still has the file open.
        return {"size": self._size, "place": f"/proc/{os.getpid()}/fd/{self._file}" if self._file >= 0 else ""}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._size, self._file, self.array = state["size"], -1, None
        try:
            self._file = os.open(state["place"], os.O_RDWR)
        except OSError:
            return
        self._map(self._file)

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)
