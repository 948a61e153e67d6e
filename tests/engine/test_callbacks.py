"""Events of a run: their order, what they may change, and what an exception in a callback leaves."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from yolov9_fast.engine.callbacks import BatchResult, Callback, CallbackList, EpochResult
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.engine.run_files import RunFolder, load_state
from yolov9_fast.engine.trainer import Trainer, train
from yolov9_fast.engine.validator import ValidationResult

Make = Callable[..., TrainConfig]


class Recorder(Callback):
    """Every event with the epoch that the saved state has then."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def _record(self, event: str, trainer: Trainer) -> None:
        self.events.append((event, load_state(trainer.run_folder.state)["epoch"]))

    def on_train_start(self, trainer: Trainer) -> None:
        self._record("train start", trainer)

    def on_epoch_start(self, trainer: Trainer, epoch: int) -> None:
        self._record(f"epoch {epoch} start", trainer)

    def on_batch_end(self, trainer: Trainer, result: BatchResult) -> None:
        self._record(f"batch {result.iteration}", trainer)

    def on_validation_end(self, trainer: Trainer, result: EpochResult) -> None:
        self._record(f"validation {result.epoch}", trainer)

    def on_epoch_end(self, trainer: Trainer, result: EpochResult) -> None:
        self._record(f"epoch {result.epoch} end", trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        self._record("train end", trainer)

    def on_evaluation_end(self, trainer: Trainer, result: ValidationResult) -> None:
        self._record("evaluation end", trainer)

    def close(self) -> None:
        self.events.append(("close", -9))


class Fails(Callback):
    """Raises at one event of one epoch."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self._fail)
        self.called = 0

    def _fail(self, *arguments: Any) -> None:
        self.called += 1
        if self.called == 2:
            raise ZeroDivisionError("division by zero")


def _run(config: TrainConfig) -> RunFolder:
    return RunFolder(Path(config.project) / config.name)


def test_events_come_in_order_and_an_epoch_is_saved_before_it_ends(tiny_config: Make) -> None:
    recorder = Recorder()
    train(tiny_config(epochs=2), callbacks=[recorder])
    assert recorder.events == [
        ("train start", -1),
        ("epoch 0 start", -1),
        ("batch 0", -1),
        ("batch 1", -1),
        ("validation 0", -1),
        ("epoch 0 end", 0),
        ("epoch 1 start", 0),
        ("batch 2", 0),
        ("batch 3", 0),
        ("validation 1", 0),
        ("epoch 1 end", 1),
        ("train end", 1),
        ("evaluation end", 1),
        ("close", -9),
    ]


def test_a_batch_result_describes_its_batch(tiny_config: Make) -> None:
    results: list[BatchResult] = []

    class Keep(Callback):
        def on_batch_end(self, trainer: Trainer, result: BatchResult) -> None:
            results.append(result)

    train(tiny_config(epochs=2, nominal_batch=16, warmup_epochs=0.0), callbacks=[Keep()])
    assert [(r.epoch, r.index, r.iteration) for r in results] == [(0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3)]
    assert [r.update for r in results] == [False, True, False, True]
    assert not any(r.skipped for r in results)
    assert all(r.batch.images.dtype == torch.uint8 and len(r.batch.images) == 8 for r in results)
    assert all(r.loss.shape == (3,) and bool(torch.isfinite(r.loss).all()) for r in results)


@pytest.mark.parametrize("value", [2.5, torch.tensor(2.5), np.float32(2.5)], ids=["float", "tensor", "numpy"])
def test_numbers_added_after_validation_are_saved_with_the_epoch(tiny_config: Make, value: Any) -> None:
    class AddColumn(Callback):
        def on_validation_end(self, trainer: Trainer, result: EpochResult) -> None:
            result.row["my/number"] = value

    config = tiny_config(epochs=1)
    train(config, callbacks=[AddColumn()])
    with _run(config).results.open() as file:
        assert [row["my/number"] for row in csv.DictReader(file)] == ["2.5"]


def test_a_callback_can_stop_the_run(tiny_config: Make, caplog: pytest.LogCaptureFixture) -> None:
    class Stop(Callback):
        def on_epoch_end(self, trainer: Trainer, result: EpochResult) -> None:
            if result.epoch == 1:
                trainer.stop("good enough")

    config = tiny_config(epochs=9)
    with caplog.at_level("INFO"):
        assert train(config, callbacks=[Stop()]) is not None
    assert "good enough" in caplog.text
    assert load_state(_run(config).state)["epoch"] == 1


OTHER_EVENTS = [pytest.param(name, marks=pytest.mark.slow) for name in ("on_epoch_start", "on_validation_end")]


@pytest.mark.parametrize("event", ["on_batch_end", "on_epoch_end", *OTHER_EVENTS])
def test_an_exception_names_its_callback_and_the_run_resumes_to_the_same_end(tiny_config: Make, event: str) -> None:
    options = {"epochs": 3, "nominal_batch": 40, "warmup_epochs": 0.0}
    uninterrupted, failed = (tiny_config(name=name, **options) for name in ("uninterrupted", "failed"))
    train(uninterrupted)
    recorder = Recorder()
    with pytest.raises(ZeroDivisionError) as caught:
        train(failed, callbacks=[recorder, Fails(event)])
    assert caught.value.__notes__ == [
        f"raised by the callback Fails.{event}; continue the run with: "
        f"yolov9-fast train --resume --project {failed.project} --name failed"
    ]
    assert recorder.events[-1][0] == "close"
    Trainer.resume(failed.project, "failed").run()
    expected, resumed = (load_state(_run(config).state) for config in (uninterrupted, failed))
    assert resumed["epoch"] == 2
    for part in ("model", "ema"):
        assert all(torch.equal(value, resumed[part][key]) for key, value in expected[part].items())
    assert resumed["best_fitness"] == expected["best_fitness"]


def test_callbacks_may_be_given_when_a_run_is_resumed(tiny_config: Make) -> None:
    config = tiny_config(epochs=2)
    with pytest.raises(ZeroDivisionError):
        train(config, callbacks=[Fails("on_epoch_start")])
    recorder = Recorder()
    Trainer.resume(config.project, callbacks=[recorder]).run()
    assert recorder.events[:2] == [("train start", 0), ("epoch 1 start", 0)]


def test_callbacks_are_called_in_their_order(tiny_config: Make) -> None:
    calls: list[str] = []

    class First(Callback):
        def on_train_end(self, trainer: Trainer) -> None:
            calls.append("first")

    class Second(Callback):
        def on_train_end(self, trainer: Trainer) -> None:
            calls.append("second")

    trainer = Trainer(tiny_config())
    CallbackList([First(), Second()]).call(Callback.on_train_end, trainer)
    assert calls == ["first", "second"]
