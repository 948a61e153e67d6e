"""Times of calls on a GPU: what its kernels take, apart from what launching them takes.

Two events around a call on an idle device measure the gaps between its launches: for short kernels that is the time of
the host. Here the device is kept busy until all launches of the call wait in its queue.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

HOLD_BYTES = 256 * 2**20
"""More than any L2 cache holds."""
_MOST_PASSES = 512
"""The queue of a device takes about 1,024 launches; then the host waits."""


class DeviceTime(NamedTuple):
    """Seconds of one call: between the events around it, and of the host until its last launch was made.

    `queued`: all launches waited when the first began, so that `device` is the time of the kernels, without gaps.
    Otherwise the call waits for the device itself or has too many launches, and `device` holds the gaps too.
    """

    device: float
    host: float
    queued: bool


class DeviceTimer:
    """Times one function, call by call, on the current stream of `device`.

    Args:
        device: a GPU.
        hold: launches what keeps the device busy before a call; repeated until that lasts long enough. `overwrite`
            makes one that also leaves nothing of the call's tensors in the caches.
    """

    def __init__(self, device: torch.device, hold: Callable[[], object]) -> None:
        self._device, self._hold = device, hold
        self._passes = 1
        self._hopeless = False

    def __call__(self, call: Callable[[], object]) -> DeviceTime:
        """Call it once; again, behind more work, while the device was too early."""
        while True:
            found = self._time(call)
            if found.queued or self._hopeless:
                return found
            if self._passes < _MOST_PASSES:
                self._passes *= 2
            else:
                self._passes, self._hopeless = 1, True

    def _time(self, call: Callable[[], object]) -> DeviceTime:
        stream = torch.cuda.current_stream(self._device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self._passes):
            self._hold()
        begin.record(stream)
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        queued = not begin.query()
        end.record(stream)
        end.synchronize()
        return DeviceTime(begin.elapsed_time(end) / 1e3, host, queued)


def overwrite(device: torch.device) -> Callable[[], object]:
    """A `hold` that overwrites 256 MiB on `device`."""
    return torch.empty(HOLD_BYTES // 4, device=device).zero_
