"""Data-parallel training: the process group that `torchrun` starts, or a single process."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from yolov9_fast.engine.device import parse_device, prepare_determinism
from yolov9_fast.engine.flat import FlatStorage
from yolov9_fast.engine.heartbeat import Heartbeat, start_heartbeat
from yolov9_fast.errors import DataError, ProcessError

_heartbeat: Heartbeat | None = None


@dataclass(frozen=True)
class ProcessGroup:
    """This process's `rank` among `size` processes, its device, and the collectives a run needs.

    Every method also works with one process.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes files."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there are several processes."""
        return self.size > 1

    def barrier(self) -> None:
        """Wait until every process has reached this call."""
        if self.is_distributed:
            # Without its device NCCL takes the GPU of the rank's number.
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, on every process."""
        if self.is_distributed:
            values = values.clone()
            dist.all_reduce(values)
        return values

    @torch.no_grad()
    def average(self, values: Tensor) -> None:
        """Replace by the mean over the processes, on every process."""
        if self.is_distributed:
            dist.all_reduce(values)
            values /= self.size

    def gather_objects(self, value: Any) -> list[Any]:
        """The value of every process on rank 0; elsewhere an empty list."""
        if not self.is_distributed:
            return [value]
        gathered: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, gathered, dst=0)
        return gathered or []

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value on every process."""
        if not self.is_distributed:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device if self.device.type == "cuda" else None)
        return values[0]

    @torch.no_grad()
    def broadcast_state(self, module: nn.Module) -> None:
        """Copy rank 0's parameters and buffers to every process."""
        if self.is_distributed:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, src=0)


class GradientSum:
    """A context of a backward in which gradients are collected and added up over the processes.

    The buffer is sent in a few parts, from the last layers to the first, each while the backward goes on. Every process
    sends them in the same order.

    Attributes:
        received: after the context, the indices of the parameters that had a gradient.
    """

    def __init__(self, flat: FlatStorage, parts: int = 4) -> None:
        self.flat = flat
        self.received: list[int] = []
        self._parts = _parts(flat, parts)
        self._part_of = {index: part for part, (_, indices) in enumerate(self._parts) for index in indices}
        self._waiting: list[int] | None = None
        self._sent = 0
        self._works: list[dist.Work] = []
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(functools.partial(self._arrived, index))
            for index, parameter in enumerate(flat.trained)
            if parameter.requires_grad
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> None:
        self.received, self._works, self._sent = [], [], 0
        self._waiting = [len(indices) for _, indices in self._parts]

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._waiting = None
        if kind is None:
            self._send(len(self._parts))  # parts with a parameter that got no gradient
        for work in self._works:
            work.wait()

    def _arrived(self, index: int, parameter: Tensor) -> None:
        if self._waiting is not None:
            self._waiting[self._part_of[index]] -= 1
            ready = self._sent
            while ready < len(self._parts) and self._waiting[ready] == 0:
                ready += 1
            self._send(ready)

    @torch.no_grad()
    def _send(self, end: int) -> None:
        """Send the parts that have not been sent up to `end`."""
        for place, indices in self._parts[self._sent : end]:
            self.received += self.flat.collect(indices)
            work = dist.all_reduce(self.flat.gradients[place], async_op=True)
            assert work is not None
            self._works.append(work)
        self._sent = max(self._sent, end)


def _parts(flat: FlatStorage, number: int) -> list[tuple[slice, list[int]]]:
    """Adjacent parts that cover the buffer, about `number`, with their parameters, in the order in which they are sent.

    A part has parameters of one group only. The largest group, of the convolutions' weights, is sent from its end, then
    the others.
    """
    starts = [0, *flat.ends[:-1]]
    largest = max(end - start for start, end in zip(starts, flat.ends, strict=True))
    parts: list[tuple[slice, list[int]]] = []
    for start, end in zip(starts, flat.ends, strict=True):
        inside = [i for i, part in enumerate(flat.slices) if start <= part.start < end]
        wanted = number if end - start == largest else 1
        of_part: dict[int, list[int]] = {}
        for index in inside:
            of_part.setdefault((flat.slices[index].start - start) * wanted // (end - start), []).append(index)
        firsts = [flat.slices[indices[0]].start for indices in of_part.values()]
        places = [slice(first, last) for first, last in zip(firsts, [*firsts[1:], end], strict=True)]
        own = list(zip(places, of_part.values(), strict=True))
        parts = own[::-1] + parts if wanted > 1 else parts + own
    return parts


def join_process_group(device: str | None, *, deterministic: bool = False) -> ProcessGroup:
    """Join the process group that `torchrun` describes in the environment; without one, a group of one process.

    Its GPU becomes the current device, before anything else uses CUDA. `deterministic`: also prepare for that.

    Raises:
        UserError: a device that this machine does not have.
    """
    global _heartbeat
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = parse_device(device, local_rank)
    if deterministic:
        prepare_determinism(chosen)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        return ProcessGroup(0, 1, chosen)
    if not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    if _heartbeat is None:
        _heartbeat = start_heartbeat(dist.get_rank(), dist.get_world_size())
    if dist.get_rank() > 0:
        logging.getLogger("yolov9_fast").setLevel(logging.ERROR)  # Messages come from rank 0.
    return ProcessGroup(dist.get_rank(), dist.get_world_size(), chosen)


def leave_process_group() -> None:
    """Leave the process group, if there is one."""
    global _heartbeat
    if _heartbeat is not None:
        _heartbeat.stop()
        _heartbeat = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def clear_endings(advice: str | Callable[[], str] = "") -> Iterator[None]:
    """A context in which what ends a run from outside is one line that ends with `advice`, or what it returns.

    Raises:
        ProcessError: in place of the error of a collective operation whose other process has ended.
        DataError, ProcessError, KeyboardInterrupt: those of the body, with the advice.
    """

    def advised(text: str) -> str:
        return "; ".join(filter(None, (text, advice if isinstance(advice, str) else advice())))

    if advice and _heartbeat is not None:
        _heartbeat.advice = advised("")
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.args = interrupt.args or ((advised(""),) if advice else ())
        raise
    except (DataError, ProcessError) as error:
        if not advice:
            raise
        raise type(error)(advised(str(error))) from error
    except RuntimeError as error:
        if not _is_communication_error(error):
            raise
        reason = re.sub(r"^\[[^]]*\]\s*", "", str(error)).split(". ")[0].strip()
        raise ProcessError(advised(f"{_other_process()} has ended or cannot be reached ({reason})")) from error


def _is_communication_error(error: RuntimeError) -> bool:
    return dist.is_available() and (isinstance(error, dist.DistError) or "/gloo/" in str(error))


def _other_process() -> str:
    if dist.is_initialized() and dist.get_world_size() == 2:
        return f"process {1 - dist.get_rank()}"
    return "another process"
