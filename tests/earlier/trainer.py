"""The earlier commit's own trainer around a model, without a data set, folders and files."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from tests.earlier import part


def batch_of(count: int, size: int, classes: int) -> Any:
    """As the loader gives it: uint8 images, and two objects of the last class in each."""
    image = torch.arange(count).repeat(2).float()
    others = torch.tensor([classes - 1, 0.5, 0.5, 0.25, 0.25]).expand(2 * count, 5)
    images = torch.zeros(count, 3, size, size, dtype=torch.uint8)
    shapes = [(size, size)] * count
    return part("data").Batch(
        images,
        torch.cat((image[:, None], others), 1),
        list(range(count)),
        shapes,
        [(1.0, 1.0)] * count,
        [(0, 0)] * count,
    )


class Batches:
    """What the trainer asks of its loader."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def set_epoch(self, epoch: int, mosaic: bool) -> None: ...

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def trainer_of(model: Any, device: Any, amp: str, batches: Batches, rank: int = 0, size: int = 1) -> Any:
    """The commit's trainer around a model, without files; it updates at its first batch."""
    module = part("engine.trainer")
    trainer = module.Trainer.__new__(module.Trainer)
    trainer.config = part("engine.config").TrainConfig(plots=False)
    trainer.world = part("engine.distributed").World(rank, size, device)
    trainer.amp, trainer.loader, trainer._resuming = amp, batches, False
    trainer.data = SimpleNamespace(num_classes=model.num_classes, names={})
    trainer._interrupt = SimpleNamespace(check=lambda: None)
    module.build_model = lambda *args, **options: model
    trainer._build()
    trainer.state.last_step = -trainer.schedule.accumulate
    return trainer
