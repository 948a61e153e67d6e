"""Resuming a run: with other data, when it has finished, and when only its end is missing."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from yolov9_fast.engine.callbacks import BatchResult, Callback, EpochResult
from yolov9_fast.engine.config import TrainConfig, read_config
from yolov9_fast.engine.report import evaluation_files
from yolov9_fast.engine.resumption import RunFinishedError
from yolov9_fast.engine.run_files import RunFolder, load_state
from yolov9_fast.engine.trainer import Trainer, train
from yolov9_fast.errors import CheckpointError, UserError

Make = Callable[..., TrainConfig]


class StopAt(Callback):
    """Interrupts the run at the end of an epoch, as Ctrl-C does."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch_end(self, trainer: Trainer, result: EpochResult) -> None:
        if result.epoch == self.epoch:
            raise KeyboardInterrupt


class Watch(Callback):
    """Every batch's iteration and the optimiser's learning rate, and whether it stepped."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, bool]] = []
        self.rates: list[float] = []
        self.sizes: list[int] = []

    def on_batch_end(self, trainer: Trainer, result: BatchResult) -> None:
        self.batches.append((result.iteration, result.update))
        self.rates.append(trainer.state.optimizer.param_groups[1]["lr"])
        self.sizes.append(len(result.batch.images))


@pytest.fixture
def own_data(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the data that a test may change."""
    shutil.copytree(tiny_data.parent, tmp_path / "own")
    return tmp_path / "own" / tiny_data.name


def _interrupted(config: TrainConfig, epoch: int = 0) -> RunFolder:
    trainer = Trainer(config, callbacks=[StopAt(epoch)])
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    return trainer.run_folder


def _resume(run: RunFolder, **options: Any) -> Trainer:
    return Trainer.resume(run.path.parent, run.path.name, **options)


def _training_images(data: Path) -> list[Path]:
    return sorted((data.parent / "images" / "train").iterdir())


def _edit(data: Path, **changes: Any) -> None:
    data.write_text(yaml.safe_dump({**yaml.safe_load(data.read_text()), **changes}))


def _names(data: Path) -> list[str]:
    names = yaml.safe_load(data.read_text())["names"]
    return list(names.values()) if isinstance(names, dict) else names


def test_a_run_whose_training_set_shrank_goes_on_learning(
    tiny_config: Make, own_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Counted by epochs × batches, the first iterations after the change would lie before the last step."""
    options = {"batch": 4, "nominal_batch": 4, "epochs": 3, "schedule": "constant"}
    run = _interrupted(tiny_config(data=str(own_data), **options), epoch=1)
    for image in _training_images(own_data)[4:]:
        image.unlink()
    watch = Watch()
    with caplog.at_level(logging.WARNING):
        trainer = _resume(run, callbacks=[watch])
    assert "train: 16 images before, now 4; batches per epoch: 4 before, now 1" in caplog.text
    before = trainer.state.optimizer.param_groups[1]["lr"]
    trainer.run()
    assert watch.batches == [(8, True)]
    assert watch.rates[0] > before, "the warm-up goes on where it was"
    assert load_state(run.state)["iteration"] == 9


def test_a_run_whose_training_set_grew_has_the_warm_up_that_it_began_with(
    tiny_config: Make, own_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"batch": 4, "nominal_batch": 4, "epochs": 60, "warmup_epochs": 60.0}
    extra = _training_images(own_data)[8:]
    kept = [image.rename(own_data.parent / image.name) for image in extra]
    run = _interrupted(tiny_config(data=str(own_data), **options))
    for image, place in zip(kept, extra, strict=True):
        image.rename(place)
    watch = Watch()
    with caplog.at_level(logging.WARNING):
        trainer = _resume(run, callbacks=[watch, StopAt(1)])
    assert "train: 8 images before, now 16" in caplog.text
    assert trainer.schedule.warmup_iterations == trainer.state.warmup_iterations == 120
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert [iteration for iteration, _ in watch.batches] == list(range(2, 6))


def test_changed_labels_are_told_and_unchanged_or_moved_data_is_not(
    tiny_config: Make, own_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = _interrupted(tiny_config(data=str(own_data), epochs=2))
    moved = tmp_path / "moved"
    shutil.move(own_data.parent, moved)
    with pytest.raises(UserError, match="does not exist"):
        _resume(run)
    with caplog.at_level(logging.WARNING):
        _resume(run, data=moved / own_data.name)
        assert not caplog.text
        label = next(path for path in sorted((moved / "labels" / "train").iterdir()) if path.read_text())
        label.write_text("0 0.5 0.5 0.1 0.1\n")
        _resume(run, data=moved / own_data.name)
    assert "the run continues on other data: train: other images or labels" in caplog.text


@pytest.mark.parametrize("change", ["order", "name", "count"])
def test_other_classes_are_refused_in_one_line(tiny_config: Make, own_data: Path, change: str) -> None:
    run = _interrupted(tiny_config(data=str(own_data), epochs=2))
    names = _names(own_data)
    changed = {"order": [names[1], names[0], *names[2:]], "name": [*names[:-1], "other"], "count": [*names, "other"]}
    _edit(own_data, names=changed[change])
    with pytest.raises(UserError) as caught:
        _resume(run)
    message = {
        "order": f"names: expected class 0 to be {names[0]!r} as in the run to resume, got {names[1]!r}",
        "name": f"names: expected class {len(names) - 1} to be {names[-1]!r} as in the run to resume, got 'other'",
        "count": f"names: expected the {len(names)} classes of the run to resume, got {len(names) + 1}",
    }
    assert str(caught.value) == f"{own_data}: {message[change]}"
    assert not isinstance(caught.value, CheckpointError)


def test_a_changed_batch_size_in_the_stored_options_loses_no_step(
    tiny_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    run = _interrupted(tiny_config(batch=4, nominal_batch=4, epochs=2, warmup_epochs=0.0))
    run.config.write_text(run.config.read_text().replace("\nbatch: 4\n", "\nbatch: 8\n"))
    watch = Watch()
    with caplog.at_level(logging.WARNING):
        _resume(run, callbacks=[watch]).run()
    assert watch.batches == [(4, True), (5, True)]
    assert "batches per epoch: 4 before, now 2" in caplog.text


def test_a_state_of_another_network_is_one_short_line(tiny_config: Make) -> None:
    run = _interrupted(tiny_config(epochs=2))
    run.config.write_text(run.config.read_text().replace("class_tower: 8", "class_tower: 16"))
    with pytest.raises(CheckpointError, match=r"state\.pt does not belong to this run: ") as caught:
        _resume(run)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    torch.save({"version": 2, "epoch": "one"}, run.state)
    with pytest.raises(CheckpointError, match="epoch: expected an integer"):
        _resume(run)
    torch.save({"version": 1, "epoch": 1}, run.state)
    with pytest.raises(CheckpointError, match="expected a training state of version 2, got 1"):
        _resume(run)
    torch.save([1], run.state)
    with pytest.raises(CheckpointError, match="expected a training state, got something else"):
        _resume(run)


def test_a_run_that_patience_ended_has_finished(tiny_config: Make) -> None:
    trainer = Trainer(tiny_config(epochs=9, patience=2, lr0=0.0, warmup_epochs=0.0))
    trainer.run()
    done = len(trainer.state.rows)
    state = trainer.run_folder.state.read_bytes()
    for _ in range(2):
        with pytest.raises(RunFinishedError) as caught:
            _resume(trainer.run_folder)
        assert str(caught.value) == (
            f"{trainer.run_folder.path} has finished after {done} of 9 epochs "
            f"(no improvement for 2 epochs; best was epoch {done - 2}); nothing to resume"
        )
    assert trainer.run_folder.state.read_bytes() == state


class StopInEpoch(Callback):
    def __init__(self, epoch: int, reason: str) -> None:
        self.epoch, self.reason = epoch, reason

    def on_epoch_end(self, trainer: Trainer, result: EpochResult) -> None:
        if result.epoch == self.epoch:
            trainer.stop(self.reason)


class Interrupt(Callback):
    """Interrupts the run at an event, once."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self._interrupt)

    def _interrupt(self, *arguments: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("patience", [0, 1])
def test_a_stopped_run_without_its_end_is_not_trained_further(tiny_config: Make, patience: int) -> None:
    config = tiny_config(epochs=5, patience=patience, lr0=0.0, warmup_epochs=0.0)
    stop = [] if patience else [StopInEpoch(1, "good enough")]
    trainer = Trainer(config, callbacks=[*stop, Interrupt("on_train_end")])
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    done = len(trainer.state.rows)
    resumed = _resume(trainer.run_folder)
    assert resumed.run() is not None
    assert len(resumed.state.rows) == done < 5
    reason = "no improvement for 1 epochs" if patience else r"\(good enough\)"
    with pytest.raises(RunFinishedError, match=reason):
        _resume(trainer.run_folder)


@pytest.mark.parametrize("event", ["on_train_end", "on_evaluation_end"])
def test_what_is_missing_at_the_end_of_a_run_is_made_up(
    tiny_config: Make, event: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole, broken = (tiny_config(epochs=2, plots=True, name=name) for name in ("whole", "broken"))
    train(whole)
    trainer = Trainer(broken, callbacks=[Interrupt(event)])
    with pytest.raises(KeyboardInterrupt) as interrupt:
        trainer.run()
    assert trainer.resume_command in str(interrupt.value)
    run = trainer.run_folder
    (run.path / "labels.png").unlink()  # as if it had been killed before
    ends: list[str] = []

    class End(Callback):
        def on_evaluation_end(self, trainer: Trainer, result: Any) -> None:
            ends.append("evaluation")

    with caplog.at_level(logging.INFO):
        assert _resume(run, callbacks=[End()]).run() is not None
    assert "2 of 2 epochs are done; the final evaluation is left to do" in caplog.text
    assert ends == ["evaluation"]
    other = Path(whole.project) / "whole"
    files = {str(path.relative_to(other)) for path in other.rglob("*") if path.is_file()}
    assert files == {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}
    assert files > {"labels.png", *evaluation_files(plots=True)}
    for name in ("predictions.json", "metrics.json", "per_class.txt", "confusion_matrix.png", "labels.png"):
        assert (other / name).read_bytes() == (run.path / name).read_bytes()
    states = load_state(RunFolder(other).state), load_state(run.state)
    assert [state["finished"] for state in states] == [True, True]
    assert all(torch.equal(value, states[1]["ema"][key]) for key, value in states[0]["ema"].items())
    with pytest.raises(RunFinishedError, match="has finished its 2 epochs; nothing to resume"):
        _resume(run)


def test_a_lost_file_of_the_final_evaluation_is_written_again(tiny_config: Make) -> None:
    config = tiny_config(epochs=1, plots=True)
    train(config)
    run = RunFolder(Path(config.project) / "exp")
    for name in ("metrics.json", "PR_curve.png", "results.png"):
        (run.path / name).unlink()
        _resume(run).run()
        assert (run.path / name).is_file()


def test_a_resumed_run_keeps_the_tensorboard_events_of_its_last_finished_epoch(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    purged: list[int | None] = []
    steps: list[int] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int | None = None) -> None:
            purged.append(purge_step)

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            steps.append(step)

        def flush(self) -> None: ...

        close = flush

    monkeypatch.setattr(tensorboard, "SummaryWriter", Writer)
    run = _interrupted(tiny_config(epochs=2, tensorboard=True))
    _resume(run).run()
    assert purged == [None, 2]
    assert sorted(set(steps)) == [1, 2]


def test_the_advised_command_is_one_for_a_shell_in_any_folder(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(tiny_config(epochs=2, project="runs/My Drive", name="it's $1"))
    words = shlex.split(trainer.resume_command)
    assert words == [
        *("yolov9-fast", "train", "--resume"),
        *("--project", str(tmp_path / "runs" / "My Drive"), "--name", "it's $1"),
    ]


def test_a_run_resumes_from_another_working_directory(
    tiny_config: Make, own_data: Path, tiny_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_graph, tmp_path / "net.yaml")
    run = _interrupted(tiny_config(data=f"own/{own_data.name}", model="net.yaml", project="runs", epochs=2))
    stored = read_config(run.config)
    assert stored.data == str(own_data)
    assert stored.model == str(tmp_path / "net.yaml")
    assert stored.project == str(tmp_path / "runs")
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    trainer = Trainer.resume(tmp_path / "runs")
    trainer.run()
    assert trainer.state.epoch == 1


def test_a_published_network_stays_a_name(tiny_config: Make) -> None:
    trainer = Trainer(tiny_config(model="gelan-t", epochs=1))
    trainer.callbacks.call(Callback.on_train_start, trainer)
    assert read_config(trainer.run_folder.config).model == "gelan-t"
