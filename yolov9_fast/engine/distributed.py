"""Data-parallel training: the process group that `torchrun` starts, or a single process."""

from __future__ import annotations

import contextlib
import inspect
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

    def parallel(self, module: nn.Module) -> nn.Module:
        """`module` with gradients that are averaged over the processes in each backward.

        Buffers are not broadcast in each forward: synchronised BatchNorm gives every process the same, and without it a
        process normalises its batches by their own statistics, of which those of rank 0 are validated and saved. The
        graph is not declared static: torch then fails where the first backward accumulates only, as in a run that is
        resumed between two updates.
        """
        if not self.is_distributed:
            return module
        kind = nn.parallel.DistributedDataParallel
        # Until torch 2.12 it is `broadcast_buffers`, which is deprecated.
        renamed = "forward_sync_buffers" in inspect.signature(kind).parameters
        options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        devices = [self.device.index] if self.device.type == "cuda" else None
        return kind(module, device_ids=devices, gradient_as_bucket_view=True, **options)

    @torch.no_grad()
    def average_gradients(self, module: nn.Module) -> None:
        """Replace every gradient by its mean over the processes."""
        if self.is_distributed:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.size

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
