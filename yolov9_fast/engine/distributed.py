"""Several processes by torch.distributed, started by `torchrun`; everything works with one process too."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from yolov9_fast.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.size > 1

    def barrier(self) -> None:
        if self.is_distributed:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any process."""
        if not self.is_distributed:
            return flag
        value = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, on every process."""
        if self.is_distributed:
            values = values.clone()
            dist.all_reduce(values)
        return values

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
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    @torch.no_grad()
    def broadcast_state(self, module: nn.Module) -> None:
        """Give every process rank 0's parameters and buffers."""
        if self.is_distributed:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, src=0)


def parse_device(device: str | None, local_rank: int = 0) -> torch.device:
    """`cpu`, a CUDA index as `0`, a list `0,1` (one process each), or None for a GPU where there is one.

    Raises:
        UserError: a device that this machine lacks.
    """
    if device in (None, "", "auto"):
        device = str(local_rank) if torch.cuda.is_available() else "cpu"
    assert device is not None
    if device == "cpu":
        return torch.device("cpu")
    numbers = [part for part in device.removeprefix("cuda:").split(",") if part]
    if not numbers or not all(part.isdigit() for part in numbers):
        raise UserError(f"unknown device {device!r}: expected cpu, or CUDA indices such as 0 or 0,1")
    if not torch.cuda.is_available():
        raise UserError(f"device {device!r} asked for, but this PyTorch sees no CUDA GPU; use --device cpu")
    index = int(numbers[local_rank] if len(numbers) > 1 else numbers[0])
    if len(numbers) == 1 and local_rank:
        index = local_rank
    if index >= torch.cuda.device_count():
        raise UserError(f"CUDA device {index} asked for, but there are {torch.cuda.device_count()}")
    return torch.device("cuda", index)


def join_world(device: str | None) -> World:
    """Join the process group that `torchrun` describes in the environment, or be alone.

    Raises:
        UserError: several devices named without `torchrun`, or a device that is absent.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = parse_device(device, local_rank)
    if size == 1:
        return World(0, 1, chosen)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return World(dist.get_rank(), dist.get_world_size(), chosen)


def leave_world() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
