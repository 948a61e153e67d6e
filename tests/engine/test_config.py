"""Options of a run: defaults, files, checks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from yolov9_fast.data import AugmentConfig
from yolov9_fast.engine.config import TrainConfig, config_from_dict, read_config, write_config
from yolov9_fast.engine.device import parse_device
from yolov9_fast.errors import UserError


def test_the_defaults_are_the_published_recipe() -> None:
    config = TrainConfig()
    assert (config.optimizer, config.lr0, config.lrf, config.momentum, config.weight_decay) == (
        "sgd",
        0.01,
        0.01,
        0.937,
        5e-4,
    )
    assert (config.warmup_epochs, config.warmup_momentum, config.warmup_bias_lr) == (3.0, 0.8, 0.1)
    assert (config.box, config.cls, config.dfl, config.clip, config.close_mosaic) == (7.5, 0.5, 1.5, 10.0, 15)
    augment = config.augment
    assert (augment.hsv_h, augment.hsv_s, augment.hsv_v, augment.translate, augment.scale) == (
        0.015,
        0.7,
        0.4,
        0.1,
        0.9,
    )
    assert (augment.mosaic, augment.mixup, augment.copy_paste, augment.fliplr) == (1.0, 0.15, 0.3, 0.5)


def test_a_written_config_reads_back_the_same(tmp_path: Path) -> None:
    config = TrainConfig(data="x.yaml", lr0=0.02, cache="ram", weights="w.pt", augment=AugmentConfig(mosaic=0.5))
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(("text", "cache"), [("off", "off"), ("null", None), ("ram", "ram"), ("'off'", "off")])
def test_the_cache_of_a_recipe(text: str, cache: str | None, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"cache: {text}\n")  # YAML takes off for false
    assert read_config(tmp_path / "recipe.yaml").cache == cache
    assert TrainConfig().cache == "auto"


def test_augmentation_options_may_be_among_the_others() -> None:
    config = config_from_dict({"epochs": 5, "mosaic": 0.0, "lr0": 1}, "recipe")
    assert (config.epochs, config.augment.mosaic, config.lr0) == (5, 0.0, 1.0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"epoch": 3}, "recipe: unknown option epoch"),
        ({"epochs": "three"}, "recipe: epochs: expected int, got 'three'"),
        ({"epochs": True}, "epochs: expected int, got True"),
        ([1], "expected a table"),
    ],
)
def test_a_wrong_recipe_is_named(data: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_from_dict(data, "recipe")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"batch": -1}, "batch: expected at least 1, got -1"),
        ({"lr0": float("nan")}, "lr0: expected a finite value of at least 0, got nan"),
        ({"lr0": float("inf")}, "lr0: expected a finite value of at least 0, got inf"),
        ({"workers": -1}, "workers: expected a finite value of at least 0, got -1"),
        ({"conf": 1.5}, r"conf: expected a value in \[0, 1\], got 1.5"),
        ({"amp": "fp8"}, "amp: expected one of auto, off, bf16, fp16, got 'fp8'"),
        ({"cache": "tape"}, "cache: expected one of auto, ram, disk, off, got 'tape'"),
    ],
)
def test_values_that_no_run_can_use_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**{"data": "x.yaml", **changes})  # type: ignore[arg-type]


def test_options_are_frozen_and_changed_copies_are_checked() -> None:
    config = TrainConfig(data="x.yaml")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 3  # type: ignore[misc]
    with pytest.raises(UserError, match="epochs: expected at least 1, got 0"):
        dataclasses.replace(config, epochs=0)


def test_a_recipe_needs_no_data_but_a_run_does() -> None:
    TrainConfig(data="x.yaml").require_data()
    with pytest.raises(UserError, match="data: expected a data file, got none"):
        TrainConfig().require_data()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "expected a table of options, got"),
        ("no", "expected a table of options, got False"),
        ("1: x\na: y\n~: z", "unknown option 1, None, a"),
        ("augment: 5", "augment: expected a table of options, got 5"),
        ("augment: [mosaic]", "augment: expected a table of options"),
        ("{[a]: b}", "unhashable"),
        ("epochs: 2024-99-99", "expected YAML"),
        ("epochs: 2024-01-31", "epochs: expected int, got datetime"),
        (f"epochs: {'9' * 5000}", "integer of 5,000 digits"),
        (f"lr0: 0x{'f' * 5000}", "integer of 5,002 digits"),
        ("name: 007", "name: expected str, got 7"),
        ("name: &a [*a]", "alias"),
        (f"name: {'[' * 10**5}", "options file: "),
        (f"name: [{'x' * 2**20}]", "name: expected str"),
        (f"{'x' * 1000}: 1", "unknown option"),
        ("epochs: [", "expected YAML"),
        ("epochs: 1\nepochs: 2", "'epochs' appears twice"),
    ],
)
def test_a_hostile_recipe_is_one_short_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_config(tmp_path / "recipe.yaml")
    assert str(caught.value).startswith(str(tmp_path / "recipe.yaml"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


FREE_TEXT = {
    *("augmentations", "augmentations_before", "auxiliary", "callbacks", "data", "loss_terms", "model", "name"),
    *("project", "weights"),
}


@pytest.mark.parametrize("name", sorted({field.name for field in dataclasses.fields(TrainConfig)} - FREE_TEXT))
def test_a_long_value_is_not_repeated(tmp_path: Path, name: str) -> None:
    (tmp_path / "recipe.yaml").write_text(f"{name}: {'x' * 5000}")
    with pytest.raises(UserError) as caught:
        parse_device(read_config(tmp_path / "recipe.yaml").device)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: None, "options file does not exist"),
        (lambda file: file.mkdir(), "got a folder"),
        (lambda file: os.mkfifo(file), "got a pipe"),
        (lambda file: file.symlink_to("/dev/urandom"), "got a device"),
        (lambda file: file.write_bytes(b"name: \xff"), "expected UTF-8 text"),
    ],
)
def test_what_is_no_recipe_file_is_named(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match=message):
        read_config(tmp_path / "recipe.yaml")


def test_an_empty_recipe_and_one_with_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xef\xbb\xbfepochs: 7")
    assert read_config(tmp_path / "recipe.yaml").epochs == 7
    (tmp_path / "recipe.yaml").write_bytes(b"\xef\xbb\xbf")
    assert read_config(tmp_path / "recipe.yaml") == TrainConfig()
