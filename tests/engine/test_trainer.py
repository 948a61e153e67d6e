"""Runs of the trainer: their files, that they are reproducible, and errors."""

from __future__ import annotations

import csv
import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from yolov9_fast.data import AugmentConfig
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.engine.run_files import load_state
from yolov9_fast.engine.trainer import Trainer, TrainingDivergedError, train
from yolov9_fast.errors import CheckpointError, DataError, UserError
from yolov9_fast.models import DetectionModel, load_checkpoint

Make = Callable[..., TrainConfig]


def _rows(run: Path) -> list[dict[str, str]]:
    with (run / "results.csv").open() as file:
        return list(csv.DictReader(file))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _without_seconds(state: dict[str, Any]) -> dict[str, Any]:
    import json

    rows = [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in json.loads(state["rows"])]
    return {**state, "rows": rows}


def test_a_run_writes_weights_state_table_and_plots(tiny_config: Make) -> None:
    config = tiny_config(epochs=2, plots=True, tensorboard=True, save_period=1)
    result = train(config)
    run = Path(config.project) / "exp"
    assert result is not None
    assert result.metrics is not None
    names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    expected = """config.yaml results.csv results.png labels.png train_batch0.jpg predictions.json metrics.json
        per_class.txt confusion_matrix.png PR_curve.png F1_curve.png P_curve.png R_curve.png weights/last.safetensors
        weights/best.safetensors weights/epoch1.safetensors weights/state.pt"""
    assert set(expected.split()) <= names
    assert any(name.startswith("events.out") for name in names)
    rows = _rows(run)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(float(row[key]) > 0 for row in rows for key in ("train/box", "val/box", "val/cls", "val/dfl", "seconds"))
    assert all(0 < float(row["seconds_waiting"]) <= float(row["seconds/data"]) for row in rows)
    model = load_checkpoint(run / "weights/last.safetensors")
    state = load_state(run / "weights/state.pt")
    assert all(torch.equal(v, state["ema"][k]) for k, v in model.state_dict().items())
    assert list(model.names.values())


@pytest.mark.slow
def test_the_network_learns(tiny_config: Make, device: str) -> None:
    plain = AugmentConfig(mosaic=0.0, mixup=0.0, copy_paste=0.0, scale=0.0, translate=0.0)
    train(tiny_config(device=device, epochs=20, optimizer="adamw", lr0=0.01, warmup_epochs=0.0, augment=plain))
    rows = _rows(Path(tiny_config().project) / "exp")
    first, last = (sum(float(row[f"train/{name}"]) for name in ("box", "dfl")) for row in (rows[1], rows[-1]))
    assert last < 0.7 * first


def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(tiny_config: Make, device: str) -> None:
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = tiny_config(epochs=1, name=name, seed=seed, device=device)
        train(config)
        states.append(load_state(Path(config.project) / name / "weights/state.pt"))
    assert _same(states[0]["model"], states[1]["model"])
    assert not _same(states[0]["model"], states[2]["model"])


def test_an_existing_run_is_never_overwritten(tiny_config: Make) -> None:
    for _ in range(2):
        config = tiny_config(epochs=1)
        train(config)
    assert {p.name for p in Path(config.project).iterdir()} == {"exp", "exp-2"}


@pytest.mark.parametrize(
    "stop_at", ["batch", *(pytest.param(at, marks=pytest.mark.slow) for at in ("first batch", "validation"))]
)
def test_a_run_stopped_during_an_epoch_resumes_to_the_same_end(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch, stop_at: str, device: str
) -> None:
    """With 40 images per step, epochs of 16 leave pending gradients, which are part of the state."""
    options = {"nominal_batch": 40, "warmup_epochs": 0.0, "device": device}
    uninterrupted = tiny_config(name="uninterrupted", **options)
    train(uninterrupted)
    broken = tiny_config(name="broken", **options)
    trainer = Trainer(broken)
    owner, method, call = {
        "first batch": (trainer, "_image_size", 2),
        "batch": (trainer.step, "_update", 1),
        "validation": (trainer, "_validate", 2),
    }[stop_at]
    original, calls = getattr(owner, method), []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(owner, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    project = Path(uninterrupted.project)
    Trainer.resume(project, "broken").run()
    states = [_without_seconds(load_state(project / n / "weights/state.pt")) for n in ("uninterrupted", "broken")]
    assert _same(*states)
    assert any(g is not None for g in states[0]["gradients"])
    assert [r["metrics/ap"] for r in _rows(project / "uninterrupted")] == [
        r["metrics/ap"] for r in _rows(project / "broken")
    ]


def test_a_finished_run_and_a_missing_run_cannot_be_resumed(tiny_config: Make) -> None:
    config = tiny_config(epochs=1)
    with pytest.raises(UserError, match="nothing to resume"):
        Trainer.resume(config.project)
    train(config)
    with pytest.raises(UserError, match="has finished its 1 epochs"):
        Trainer.resume(config.project)


def test_a_damaged_state_is_refused(tiny_config: Make) -> None:
    config = tiny_config(epochs=1)
    train(config)
    path = Path(config.project) / "exp/weights/state.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a readable training state"):
        Trainer.resume(config.project)


def _make_nan(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, iterations: set[int]) -> None:
    """Make the network's input NaN at some iterations."""
    original, calls = trainer.model.forward, []

    def forward(images: torch.Tensor) -> Any:
        calls.append(1)
        return original(images * float("nan") if len(calls) - 1 in iterations else images)

    monkeypatch.setattr(trainer.model, "forward", forward)


def test_steps_that_are_not_finite_are_skipped_and_counted(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, device: str
) -> None:
    trainer = Trainer(tiny_config(epochs=2, device=device))
    _make_nan(trainer, monkeypatch, {1})
    with caplog.at_level(logging.INFO):
        trainer.run()
    assert trainer.state.skipped_steps == 1
    assert "epoch 1: 1 of 2 optimiser steps skipped" in caplog.text
    assert all(bool(torch.isfinite(v).all()) for v in trainer.model.state_dict().values())
    assert _rows(trainer.run_folder.path)[0]["skipped_steps"] == "1"


def test_an_epoch_without_a_finite_step_ends_the_run(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny_config(epochs=2))
    _make_nan(trainer, monkeypatch, {2, 3})
    with pytest.raises(TrainingDivergedError, match="epoch 2: not one of 2 optimiser steps was finite"):
        trainer.run()
    assert load_state(trainer.run_folder.state)["epoch"] == 0


def test_a_full_disk_keeps_the_last_checkpoint_and_training_continues(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(tiny_config(epochs=3))
    original, state = os.fsync, trainer.state

    def full(descriptor: int) -> None:
        if state.epoch == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    seen: list[int] = []
    validate = trainer._validate

    def watch(model: DetectionModel, title: str, *arguments: Any) -> Any:
        if title == "epoch 3/3 val":
            seen.append(load_state(trainer.run_folder.state)["epoch"])
        return validate(model, title, *arguments)

    monkeypatch.setattr(trainer, "_validate", watch)
    with caplog.at_level(logging.ERROR):
        trainer.run()
    assert seen == [0]
    assert "epoch 2 was not saved" in caplog.text
    assert "No space left on device" in caplog.text
    assert load_state(trainer.run_folder.state)["epoch"] == 2
    assert not list(trainer.run_folder.weights.glob(".*"))


def test_a_full_disk_at_the_end_is_an_error(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny_config(epochs=1))

    def full(descriptor: int) -> None:
        if trainer.state.epoch == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        trainer.run()


def test_frozen_layers_do_not_change(tiny_config: Make) -> None:
    trainer = Trainer(tiny_config(epochs=1, freeze=2))
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.run()
    after = trainer.model.state_dict()
    changed = {int(k.split(".")[1]) for k, v in after.items() if not torch.equal(v, before[k])}
    assert not changed & {0, 1}
    assert 2 in changed


def test_freezing_everything_is_refused(tiny_config: Make) -> None:
    with pytest.raises(UserError, match="every parameter is frozen"):
        Trainer(tiny_config(freeze=99))


def test_patience_ends_a_run_that_does_not_improve(tiny_config: Make, caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(tiny_config(epochs=9, patience=2, lr0=0.0, warmup_epochs=0.0))
    with caplog.at_level(logging.INFO):
        trainer.run()
    assert len(trainer.state.rows) == trainer.state.best_epoch + 3 < 9
    assert "no improvement for 2 epochs" in caplog.text


def test_multi_scale_draws_sizes_by_seed_and_iteration(tiny_config: Make) -> None:
    trainer = Trainer(tiny_config(multi_scale=True, imgsz=128))
    sizes = [trainer._image_size(i) for i in range(30)]
    assert set(sizes) == {64, 96, 128, 160, 192}
    assert sizes == [trainer._image_size(i) for i in range(30)]


@pytest.mark.parametrize("amp", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_mixed_precision_trains(tiny_config: Make, amp: str, device: str) -> None:
    trainer = Trainer(tiny_config(epochs=8, amp=amp, device=device))
    trainer.run()
    assert trainer.state.ema.updates > 4
    assert all(bool(torch.isfinite(v).all()) for v in trainer.model.state_dict().values())


def test_lead_head_guided_training_runs(tiny_config: Make, device: str) -> None:
    assert train(tiny_config(epochs=1, lead_head_guided=True, device=device)) is not None


def test_an_odd_image_size_is_rounded_and_logged(tiny_config: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        trainer = Trainer(tiny_config(imgsz=70))
    assert trainer.config.imgsz == 96
    assert "image size 70 is not a multiple of 32: using 96" in caplog.text


def test_training_starts_from_weights_of_another_class_count(
    tiny_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    first = tiny_config(epochs=1, name="first")
    train(first)
    weights = Path(first.project) / "first/weights/last.safetensors"
    trainer = Trainer(tiny_config(name="second", weights=str(weights), class_tower=None))
    source = load_checkpoint(weights).state_dict()
    assert all(torch.equal(v, source[k]) for k, v in trainer.model.state_dict().items())


def test_fused_weights_are_unfused_and_calibrated(
    shared: Path, tiny_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    weights = shared / "data/weights/yolov9t_coco_fused.npz"
    with caplog.at_level(logging.INFO):
        trainer = Trainer(tiny_config(model="yolov9-t", weights=str(weights), class_tower=None))
    assert trainer.model.class_tower == 80
    assert trainer.model.box_groups == 1
    assert "is fused: BatchNorm statistics measured on" in caplog.text
    assert float(trainer.model.state_dict()["model.0.bn.running_var"].max()) != 1.0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": "missing.yaml"}, DataError, "missing.yaml"),
        ({"weights": "missing.pt"}, UserError, "weights: expected a file, got missing.pt"),
        ({"device": "cuda:0"}, UserError, "sees no CUDA GPU"),
        ({"device": "tpu"}, UserError, "device: expected cpu, or CUDA indices such as 0 or 0,1, got 'tpu'"),
        ({"model": "yolov9-z"}, UserError, "unknown network"),
        ({"box_groups": 3}, UserError, "box_groups: expected a divisor of 64, got 3"),
        ({"model": "yolov7", "class_tower": None}, UserError, "anchor-based head cannot be trained here"),
    ],
)
def test_wrong_options_are_one_clear_error(
    tiny_config: Make, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    if changes.get("device") == "cuda:0" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(error, match=message):
        Trainer(tiny_config(**changes))
