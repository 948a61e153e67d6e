"""Folders of runs: whose they are, and what a run leaves that was killed before its first state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from yolov9_fast.atomic import TemporaryFile
from yolov9_fast.engine import run_callbacks
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.engine.run_files import find_run, new_run
from yolov9_fast.engine.trainer import Trainer
from yolov9_fast.errors import UserError


def _abandon(path: Path) -> None:
    """A temporary file of a process that does not exist any more."""
    temporary = TemporaryFile(path)
    temporary.file.close()


def test_a_folder_without_a_saved_run_is_used_again_and_others_are_not(tmp_path: Path) -> None:
    for left in ("", "weights/", "weights/state.pt"):
        folder = tmp_path / "exp"
        (folder / left).parent.mkdir(parents=True, exist_ok=True)
        if left.endswith("pt"):
            (folder / left).write_bytes(b"")
            _abandon(folder / left)
        assert new_run(tmp_path, "exp").path == folder
    for name in ("config.yaml", "notes.txt", "weights/last.safetensors"):
        folder = tmp_path / name.replace("/", "-")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
        assert new_run(tmp_path, folder.name).path == tmp_path / f"{folder.name}-2"


def test_a_folder_is_of_one_run_while_that_runs(tmp_path: Path) -> None:
    first = new_run(tmp_path, "exp")
    assert new_run(tmp_path, "exp").path == tmp_path / "exp-2"
    del first
    assert new_run(tmp_path, "exp").path == tmp_path / "exp"


@pytest.mark.parametrize("name", [None, "exp"])
def test_a_run_killed_before_its_first_state_says_so_and_can_be_started_again(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    config = tiny_config(epochs=1)

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    for function in ("save_state", "write_config"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(run_callbacks, function, killed)
            Trainer(config).run()
        with pytest.raises(UserError, match="the run ended before its first state was saved; start it again"):
            find_run(config.project, name)
    trainer = Trainer(config)
    trainer.run()
    assert trainer.run_folder.path == Path(config.project) / "exp"


def test_resuming_removes_what_a_killed_process_left(tiny_config: Callable[..., TrainConfig]) -> None:
    trainer = Trainer(tiny_config(epochs=1))
    trainer.run()
    run = trainer.run_folder
    for target in (run.state, run.results):
        _abandon(target)
    find_run(run.path.parent, "exp")
    assert not list(run.path.rglob(".*"))
