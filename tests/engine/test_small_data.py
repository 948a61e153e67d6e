"""Runs on little: one value per channel for BatchNorm, and a validation split without objects."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from yolov9_fast.cli.main import main
from yolov9_fast.engine.callbacks import BatchResult, Callback
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.engine.distributed import ProcessGroup
from yolov9_fast.engine.run_files import load_state
from yolov9_fast.engine.trainer import Trainer
from yolov9_fast.engine.training_data import smallest_batch
from yolov9_fast.errors import DataError, UserError
from yolov9_fast.models import load_checkpoint, save_weights

Make = Callable[..., TrainConfig]


@pytest.fixture
def own_data(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the data that a test may change."""
    shutil.copytree(tiny_data.parent, tmp_path / "own")
    return tmp_path / "own" / tiny_data.name


def _keep(data: Path, count: int) -> None:
    for image in sorted((data.parent / "images" / "train").iterdir())[count:]:
        image.unlink()


class Sizes(Callback):
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_batch_end(self, trainer: Trainer, result: BatchResult) -> None:
        self.sizes.append(len(result.batch.images))


@pytest.mark.parametrize(("images", "batch", "sizes"), [(5, 4, [4, 2]), (3, 2, [2, 2]), (4, 4, [4])])
def test_the_last_image_at_32_pixels_gets_a_companion(
    tiny_config: Make, own_data: Path, images: int, batch: int, sizes: list[int]
) -> None:
    _keep(own_data, images)
    seen = Sizes()
    trainer = Trainer(tiny_config(data=str(own_data), imgsz=32, batch=batch, epochs=1), callbacks=[seen])
    trainer.run()
    assert seen.sizes == sizes
    assert all(bool(torch.isfinite(value).all()) for value in trainer.model.state_dict().values())


def test_a_last_image_at_64_pixels_stays_alone(tiny_config: Make, own_data: Path) -> None:
    _keep(own_data, 5)
    seen = Sizes()
    Trainer(tiny_config(data=str(own_data), batch=4, epochs=1), callbacks=[seen]).run()
    assert seen.sizes == [4, 1]


@pytest.mark.parametrize("imgsz", [32, 20])
def test_a_batch_of_one_image_at_32_pixels_is_refused_before_the_run_has_a_folder(
    tiny_config: Make, imgsz: int
) -> None:
    config = tiny_config(imgsz=imgsz, batch=1)
    with pytest.raises(UserError, match=r"^imgsz: expected at least 64 for a batch of one image .*, got 32$"):
        Trainer(config)
    assert not Path(config.project).exists()


def test_a_training_set_of_one_image_at_32_pixels_is_refused(tiny_config: Make, own_data: Path) -> None:
    _keep(own_data, 1)
    with pytest.raises(DataError, match="expected at least 2 images at 32 pixels"):
        Trainer(tiny_config(data=str(own_data), imgsz=32, batch=4))
    Trainer(tiny_config(data=str(own_data), imgsz=64, batch=4, epochs=1)).run()


def test_a_block_that_pools_to_one_pixel_ends_a_run_with_one_line(
    tiny_config: Make, own_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _keep(own_data, 5)
    trainer = Trainer(tiny_config(data=str(own_data), batch=4, epochs=1))
    forward, norm = trainer.model.forward, torch.nn.BatchNorm2d(3)

    def pooled(images: torch.Tensor) -> Any:
        norm(images.mean((2, 3), keepdim=True))
        return forward(images)

    monkeypatch.setattr(trainer.model, "forward", pooled)
    with pytest.raises(UserError, match="batch: expected more images: with 1 of 64 × 64 pixels a BatchNorm has one"):
        trainer.run()


@pytest.mark.parametrize(
    ("processes", "batch", "imgsz", "sync_bn", "expected"),
    [
        (2, 2, 32, True, 1),
        (2, 4, 32, False, 2),
        (2, 2, 64, False, 1),
        (2, 2, 32, False, "in each process, not synchronised"),
        (1, 1, 32, True, "for a batch of one image"),
        (1, 2, 32, True, 2),
        (1, 1, 64, True, 1),
    ],
)
def test_images_that_a_process_needs(
    tiny_config: Make, processes: int, batch: int, imgsz: int, sync_bn: bool, expected: int | str
) -> None:
    config = tiny_config(imgsz=imgsz, batch=batch, sync_bn=sync_bn)
    group = ProcessGroup(0, processes, torch.device("cpu"))
    if isinstance(expected, int):
        assert smallest_batch(config, group) == expected
    else:
        with pytest.raises(UserError, match=expected):
            smallest_batch(config, group)


@pytest.mark.parametrize(("imgsz", "sizes"), [(32, {32}), (64, {64, 96}), (96, {64, 96, 128})])
def test_multi_scale_draws_no_size_of_one_value_per_channel(tiny_config: Make, imgsz: int, sizes: set[int]) -> None:
    trainer = Trainer(tiny_config(multi_scale=True, imgsz=imgsz))
    assert {trainer._image_size(iteration) for iteration in range(40)} == sizes


def test_without_objects_in_validation_the_last_epoch_is_the_best(
    tiny_config: Make, own_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for label in (own_data.parent / "labels" / "val").iterdir():
        label.write_text("")
    config = tiny_config(data=str(own_data), epochs=3, patience=1)
    with caplog.at_level(logging.WARNING):
        trainer = Trainer(config)
        assert caplog.text.count("val: no objects, so AP is not defined") == 1
        trainer.run()
    assert caplog.text.count("no objects") == 1
    assert len(trainer.state.rows) == 3
    state = load_state(trainer.run_folder.state)
    assert (state["best_epoch"], state["stopped"]) == (2, "")
    best, last = (load_checkpoint(path).state_dict() for path in (trainer.run_folder.best, trainer.run_folder.last))
    assert all(torch.equal(value, last[key]) for key, value in best.items())


def test_val_without_objects_says_that_ap_is_not_defined(
    tiny_config: Make, own_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in (own_data.parent / "labels" / "val").iterdir():
        label.unlink()
    weights = save_weights(Trainer(tiny_config()).model, tmp_path / "w.safetensors")
    words: list[Any] = ["--weights", weights, "--data", own_data, "--imgsz", 64, "--workers", 0, "--device", "cpu"]
    assert main(["val", *map(str, words), "--no-plots", "--project", str(tmp_path / "val")]) == 0
    assert f"{own_data}: val: no objects, so AP is not defined" in capsys.readouterr().err
