"""Folders of runs: whose they are, and what a run leaves that was killed before its first state."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from yolov9_fast.atomic import TemporaryFile
from yolov9_fast.engine import run_callbacks
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.engine.run_files import find_run, new_run, read_results, write_results
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


@pytest.mark.parametrize(
    ("project", "name", "message"),
    [
        ("a\0b", "exp", "NUL byte"),
        ("runs", "a\0b", "NUL byte"),
        ("x" * 300, "exp", "expected a path of at most"),
        ("runs", "x" * 300, "expected a path of at most"),
        ("r/" * 3000, "exp", "expected a path of at most"),
        ("\ud800", "exp", "expected a path"),
        ("~nobody-of-this-name/runs", "exp", "expected a path.*home"),
    ],
)
def test_what_is_no_path_is_named(project: str, name: str, message: str) -> None:
    for function in (new_run, find_run):
        with pytest.raises(UserError, match=f"project and name: .*{message}") as caught:
            function(project, name)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to("nowhere"), "runs(/below)? (is a broken link|does not exist)"),
        (lambda path: path.symlink_to(path), "levels of symbolic links"),
        (lambda path: path.write_text(""), "Not a directory|runs is a file"),
        (lambda path: os.mkfifo(path), "Not a directory|runs is a pipe"),
    ],
)
def test_a_project_that_can_have_no_folders_is_an_error_at_once(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "runs")
    for project in (tmp_path / "runs", tmp_path / "runs" / "below"):
        with pytest.raises(UserError, match=f"cannot create the run folder .*({message})"):
            new_run(project, "exp")
        with pytest.raises(UserError, match="nothing to resume"):
            find_run(project)


def test_a_name_that_is_a_broken_link_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "exp").symlink_to("nowhere")
    assert new_run(tmp_path, "exp").path == tmp_path / "exp-2"


def test_a_name_too_long_for_its_number_is_an_error(tmp_path: Path) -> None:
    name = "x" * 254
    (new_run(tmp_path, name).path / "file").touch()
    with pytest.raises(UserError, match=r"cannot create the run folder .*File name too long"):
        new_run(tmp_path, name)


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = new_run("~/runs", "exp")
    assert run.path == tmp_path / "runs" / "exp"
    run.weights.mkdir()
    for file in (run.state, run.config):
        file.touch()
    assert find_run("~/runs").path == find_run("~/runs", "exp").path == run.path


def test_a_folder_of_runs_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match="folder of runs cannot be read: Permission denied"):
        find_run(tmp_path)


@pytest.mark.parametrize("text", ["a,b\n1,x\n", "a,b\n1,2,3\n", "a\n" + "x" * 200_000 + "\n", "a\n\x00\n"])
def test_a_table_of_results_that_is_damaged_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(UserError, match=r"results\.csv: results: expected a table of numbers") as found:
        read_results(tmp_path / "results.csv")
    assert len(str(found.value)) < 500


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    write_results(tmp_path / "results.csv", [{"epoch": 1, "ap": 0.25}, {"epoch": 2}])
    first, second = read_results(tmp_path / "results.csv")
    assert first == {"epoch": 1, "ap": 0.25}
    assert second["ap"] != second["ap"]
    assert read_results(tmp_path / "none.csv") == []
