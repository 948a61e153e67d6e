"""Memory that a training step frees stays with the process, so that the next step need not get it anew."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator

import torch

# Parameters of glibc's `mallopt`, from its manual.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_MEBIBYTE = 1 << 20
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


@contextlib.contextmanager
def keeping_freed_memory(device: torch.device) -> Iterator[bool]:
    """Within the block glibc returns no freed memory to the system, where `device` is a CPU; gives whether it does so.

    Otherwise the maps that a step frees go back to the system, which gives them anew to the next step, page by page and
    filled with zeros: some 17,000 page faults a step of yolov9-t (batch 8, 320 px). The process keeps its peak between
    steps. It is a setting of the whole process. At the end unused memory is returned, and the thresholds are the
    largest of those that glibc itself adapts to (32 MiB for a block, 64 MiB in all).

    Nothing is set under other C libraries, or where the user has set one of the variables MALLOC_TRIM_THRESHOLD_,
    MALLOC_MMAP_THRESHOLD_ and MALLOC_MMAP_MAX_ or a `glibc.malloc` tunable.
    """
    mallopt = _mallopt() if device.type == "cpu" and not _chosen_by_user() else None
    if mallopt is None:
        yield False
        return
    mallopt(_TRIM_THRESHOLD, -1)
    mallopt(_MMAP_MAX, 0)
    try:
        yield True
    finally:
        mallopt(_MMAP_MAX, 65536)
        mallopt(_MMAP_THRESHOLD, 32 * _MEBIBYTE)
        mallopt(_TRIM_THRESHOLD, 64 * _MEBIBYTE)
        ctypes.CDLL(None).malloc_trim(0)


def _chosen_by_user() -> bool:
    return any(name in os.environ for name in _VARIABLES) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's `mallopt`; None under another C library."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    if not all(hasattr(library, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim")):
        return None
    function: Callable[[int, int], int] = library.mallopt
    return function
