"""`--augment-on gpu`: the step makes the images, on the run's device; on a CPU the run is the same bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from yolov9_fast.data import AugmentConfig, ImageRecord
from yolov9_fast.engine import BatchResult, Callback, TrainConfig, Trainer
from yolov9_fast.engine.training_data import _check_no_pixels_needed
from yolov9_fast.errors import UserError

MakeConfig = Callable[..., TrainConfig]
AUGMENT = AugmentConfig(degrees=5.0, mixup=0.5, flipud=0.3)


class Images(Callback):
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_batch_end(self, trainer: Trainer, result: BatchResult) -> None:
        assert result.batch.planned is None
        self.seen.append(result.batch.images.clone())


def trained(config: TrainConfig) -> tuple[Trainer, list[Tensor]]:
    images = Images()
    trainer = Trainer(config, callbacks=[images])
    trainer.run()
    return trainer, images.seen


def assert_equal_runs(first: Trainer, second: Trainer) -> None:
    for one, other in (
        (first.model, second.model),
        (first.state.ema.model, second.state.ema.model),
    ):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    losses = [
        [{k: v for k, v in row.items() if "seconds" not in k} for row in run.state.rows] for run in (first, second)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "options", [{}, {"multi_scale": True, "batch": 6, "augment_preview": 2}], ids=["plain", "sizes"]
)
def test_weights_images_and_losses_are_those_of_the_ordinary_run(
    tiny_config: MakeConfig, options: dict[str, Any]
) -> None:
    """Three epochs of which the last is without mosaic; a batch of 6 leaves a short last one of 16 images."""
    runs = [trained(tiny_config(augment_on=where, augment=AUGMENT, name=where, **options)) for where in ("cpu", "gpu")]
    assert_equal_runs(runs[0][0], runs[1][0])
    assert len(runs[0][1]) == len(runs[1][1]) > 3
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    previews = [sorted(run.run_folder.path.glob("augment_preview*.jpg")) for run, _ in runs]
    assert [path.read_bytes() for path in previews[0]] == [path.read_bytes() for path in previews[1]]
    assert len(previews[0]) == options.get("augment_preview", 0)
    trainer = runs[1][0]
    assert trainer.training_data.pixels is not None
    assert trainer.config.augment_on == "gpu"


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tiny_config: MakeConfig) -> None:
    class Ends(Callback):
        def on_epoch_end(self, trainer: Trainer, result: Any) -> None:
            if result.epoch == 0:
                raise KeyboardInterrupt

    whole, _ = trained(tiny_config(augment_on="gpu", augment=AUGMENT, name="whole", workers=1))
    config = tiny_config(augment_on="gpu", augment=AUGMENT, name="part", workers=1)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, callbacks=[Ends()]).run()
    resumed = Trainer.resume(config.project, "part")
    resumed.run()
    assert_equal_runs(whole, resumed)


def records(polygons: bool) -> list[ImageRecord]:
    from pathlib import Path

    square = np.array([[0.2, 0.2], [0.4, 0.2], [0.4, 0.4]], np.float32)
    boxes = np.array([[0, 0.3, 0.3, 0.2, 0.2]], np.float32)
    return [ImageRecord(Path("a.jpg"), 32, 32, 1, boxes, [square] if polygons else None)]


def test_augmentations_of_pixels_on_the_host_are_refused(tiny_config: MakeConfig) -> None:
    expected = r"^augment_on: expected cpu with augmentations of your own \(my:blur\), got gpu$"
    for option in ("augmentations", "augmentations_before"):
        with pytest.raises(UserError, match=expected):
            _check_no_pixels_needed(tiny_config(augment_on="gpu", **{option: "my:blur"}), records(polygons=False))
    config = tiny_config(augment_on="gpu")
    with pytest.raises(UserError, match=r"^augment_on: expected cpu with copy-paste of polygons, which these labels"):
        _check_no_pixels_needed(config, records(polygons=True))
    for fine in (
        dataclasses.replace(config, augment=AugmentConfig(copy_paste=0)),
        dataclasses.replace(config, augment=AugmentConfig(mosaic=0)),
        dataclasses.replace(config, close_mosaic=3),
    ):
        _check_no_pixels_needed(fine, records(polygons=True))
    _check_no_pixels_needed(config, records(polygons=False))


def test_another_place_is_refused(tiny_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"^augment_on: expected one of cpu, gpu, got 'cuda'$"):
        tiny_config(augment_on="cuda")
