"""Results on their way from a GPU to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """Copies of tensors of one device for the host, begun at once without waiting for the device.

    While they are made the host can give the device further work. On a CPU the tensors themselves.
    """

    def __init__(self, *tensors: Tensor) -> None:
        # To page-locked memory: into other memory a copy is not asynchronous.
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._done: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> list[Tensor]:
        """The copies, in the order of the tensors; the only call that waits for the device."""
        if self._done is not None:
            self._done.synchronize()
        return self._copies
