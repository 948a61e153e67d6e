"""`train`: flags, recipe files, resuming, processes."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from yolov9_fast.cli import train
from yolov9_fast.cli.main import main
from yolov9_fast.data import AugmentConfig
from yolov9_fast.engine.config import TrainConfig, option_fields, read_config, with_absolute_paths, write_config
from yolov9_fast.engine.run_files import RunFolder
from yolov9_fast.errors import UserError
from yolov9_fast.models import DetectionModel


def given(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    train.configure(parser)
    return vars(parser.parse_args(words))


def test_every_option_of_a_run_is_a_flag() -> None:
    parser = argparse.ArgumentParser()
    train.configure(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    fields = [*option_fields(), *dataclasses.fields(AugmentConfig)]
    assert {"--" + field.name.replace("_", "-") for field in fields} <= flags
    assert {"--no-plots", "--multi-scale", "--no-rect"} <= flags


def test_without_flags_the_options_are_the_published_recipe() -> None:
    assert train.config_from_flags(given("--data", "d.yaml")) == TrainConfig(data="d.yaml")


def test_flags_have_their_types() -> None:
    words = [
        "--data",
        "d.yaml",
        "--lr0",
        "1",
        "--epochs",
        "3",
        "--no-plots",
        "--hsv-h",
        "0",
        "--cache",
        "ram",
        "--class-tower",
        "64",
        "--device",
        "0,1",
    ]
    config = train.config_from_flags(given(*words))
    assert (config.lr0, config.epochs, config.plots, config.cache) == (1.0, 3, False, "ram")
    assert (config.augment.hsv_h, config.class_tower, config.device) == (0.0, 64, "0,1")


def test_flags_override_the_recipe_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("data: d.yaml\nlr0: 0.1\nepochs: 7\naugment: {mosaic: 0.5, mixup: 0.2}\n")
    config = train.config_from_flags(given("--config", str(file), "--epochs", "9", "--mixup", "0"))
    assert (config.lr0, config.epochs, config.batch) == (0.1, 9, TrainConfig.batch)
    assert (config.augment.mosaic, config.augment.mixup) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "data: expected a data file"),
        (["--data", "d.yaml", "--hsv-h", "3"], "hsv_h: expected 0..1"),
        (["--data", "d.yaml", "--batch", "0"], "batch: expected at least 1, got 0"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_a_value_that_no_run_can_use_is_named(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train.config_from_flags(given(*words))


def test_an_unknown_option_in_a_recipe_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("data: d.yaml\nlearning_rate: 0.1\n")
    with pytest.raises(UserError, match="learning_rate"):
        train.config_from_flags(given("--config", str(file)))


def test_the_launch_command_repeats_the_words_in_as_many_processes() -> None:
    command = train.launch_command(["train", "--device", "0,1", "--data", "d.yaml"], 2)
    assert command == [
        *(sys.executable, "-m", "yolov9_fast.engine.launch", "--standalone", "--nproc-per-node=2"),
        *("-m", "yolov9_fast", "train", "--device", "0,1", "--data", "d.yaml"),
    ]


def test_several_devices_start_a_process_each(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(train.os, "execv", lambda path, command: started.append(command))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(sys, "argv", ["yolov9-fast", "train", "--device", "1,3"])
    train.start_processes("1,3")
    assert started == [train.launch_command(["train", "--device", "1,3"], 2)]
    for device in (None, "cpu", "0"):
        train.start_processes(device)
    monkeypatch.setenv("WORLD_SIZE", "2")  # already one of several processes
    train.start_processes("1,3")
    assert len(started) == 1


def test_several_devices_without_a_gpu_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA GPU"):
        train.start_processes("0,1")


def test_there_is_nothing_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(tmp_path / "absent")]) == 2
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert main(["train", "--resume", "--project", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("error:") == 3


def test_a_run_trains_is_resumed_and_writes_its_files(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from yolov9_fast.engine.trainer import Trainer

    options = ["--model", "gelan-t", "--imgsz", "60", "--batch", "4", "--workers", "0", "--device", "cpu"]
    options += ["--no-plots", "--no-tensorboard", "--close-mosaic", "1", "--project", str(tmp_path), "--name", "run"]
    validate = Trainer._validate

    def stop_in_second(self: Trainer, model: DetectionModel, title: str, *arguments: Any) -> Any:
        if title == "epoch 2/2 val":
            raise KeyboardInterrupt
        return validate(self, model, title, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_validate", stop_in_second)
        assert main(["train", "--data", str(shapes), "--epochs", "2", *options]) == 130
    shown = capsys.readouterr()
    assert shown.err.count("interrupted") == 1
    assert f"--resume --project {tmp_path} --name run" in shown.err
    assert "Traceback" not in shown.err

    assert main(["train", "--resume", str(tmp_path / "run"), "--lr0", "1"]) == 2
    assert "got --lr0 1.0 (the run has 0.01)" in capsys.readouterr().err

    assert main(["train", "--data", str(shapes), "--epochs", "2", *options, "--resume"]) == 0
    assert "resuming" in capsys.readouterr().out
    with open(tmp_path / "run" / "results.csv", encoding="utf-8") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    assert (tmp_path / "run" / "weights" / "best.safetensors").is_file()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    assert "has finished" in capsys.readouterr().err


def _stored_run(folder: Path, **options: Any) -> RunFolder:
    run = RunFolder(folder)
    write_config(with_absolute_paths(TrainConfig(**{"data": "d.yaml", "imgsz": 96, **options})), run.config)
    return run


@pytest.mark.parametrize(
    "words",
    [
        ["--imgsz", "70"],
        ["--weights", "w.pt", "--model", "net.yaml", "--data", "d.yaml", "--project", "p", "--name", "n"],
        ["--data", "elsewhere.yaml", "--device", "cpu", "--workers", "3"],
        ["--hsv-h", "0.1"],
    ],
)
def test_a_run_accepts_the_command_that_started_it_and_data_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = _stored_run(tmp_path / "run", weights="w.pt", model="net.yaml", augment=AugmentConfig(hsv_h=0.1))
    assert train._unchanged_config(run, given("--resume", str(run.path), *words)) == read_config(run.config)


def test_the_recipe_of_the_starting_command_is_compared_too(tmp_path: Path) -> None:
    run = _stored_run(tmp_path / "run", lr0=0.1, class_tower=64)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: d.yaml\nimgsz: 70\nlr0: 0.5\nclass_tower: null\naugment: {mosaic: 1}\n")
    words = ["--resume", str(run.path), "--config", str(recipe)]
    assert train._unchanged_config(run, given(*words, "--lr0", "0.1")).lr0 == 0.1
    with pytest.raises(UserError, match=r"may change\), got --lr0 0\.5 \(the run has 0\.1\)$"):
        train._unchanged_config(run, given(*words))
    with pytest.raises(UserError, match="got --imgsz 100 "):
        train._unchanged_config(run, given("--resume", str(run.path), "--imgsz", "100"))


def test_ranks_other_than_0_print_errors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from yolov9_fast.cli.output import LOGGER, set_up_logging

    monkeypatch.setenv("RANK", "1")
    set_up_logging()
    assert not logging.getLogger(LOGGER).isEnabledFor(logging.WARNING)
    monkeypatch.setenv("RANK", "0")
    set_up_logging()
    assert logging.getLogger(LOGGER).isEnabledFor(logging.INFO)
