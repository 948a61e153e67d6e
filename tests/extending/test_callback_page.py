"""What docs/extending/callback.md says, done exactly so."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.extending.conftest import Train, same_weights
from tests.extending.pages import code_blocks, commands, write_files
from yolov9_fast import engine
from yolov9_fast.cli.main import main
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.engine.run_files import RunFolder, load_state
from yolov9_fast.errors import UserError

PAGE = "callback.md"
[COMMAND] = commands(PAGE)


@pytest.fixture(autouse=True)
def page_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    write_files(PAGE, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("target", None)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_python_code_trains_with_the_callback(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(f"path: {tiny_data.parent}\n{tiny_data.read_text()}")
    exec(code_blocks(PAGE, "python")[1], {})
    assert [float(row["weights/norm"]) > 0 for row in rows(tmp_path / "runs/train/exp")] == [True, True]


def test_the_command_trains_with_the_callback_and_changes_no_weights(train: Train) -> None:
    with_callback, plain = train(COMMAND, "with_callback"), train(["train"], "plain")
    assert "callbacks: target:TargetAP" in (with_callback / "config.yaml").read_text()
    assert all(float(row["weights/norm"]) > 0 for row in rows(with_callback))
    assert "weights/norm" not in rows(plain)[0]
    assert same_weights(with_callback, plain)


def test_a_reached_target_ends_the_run(
    tiny_config: Callable[..., TrainConfig], caplog: pytest.LogCaptureFixture
) -> None:
    from target import TargetAP  # type: ignore[import-not-found]

    config = tiny_config(epochs=5)
    with caplog.at_level("INFO"):
        engine.train(config, callbacks=[TargetAP(0.0)])
    assert "after 1 epochs: stopped" in caplog.text
    assert load_state(RunFolder(Path(config.project) / "exp").state)["epoch"] == 0


def test_a_run_resumes_with_it(train: Train, tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text("""
import target

class Interrupted(target.TargetAP):
    def on_epoch_start(self, trainer, epoch):
        if epoch == 1 and not trainer.resumed:
            raise KeyboardInterrupt
""")
    with pytest.raises(AssertionError):
        train(["train", "--callbacks", "interrupted:Interrupted"], "broken")
    assert main(["train", "--resume", "runs/broken"]) == 0
    assert [bool(row["weights/norm"]) for row in rows(tmp_path / "runs/broken")] == [True, True]
    assert same_weights(tmp_path / "runs/broken", train(COMMAND, "uninterrupted"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent:Thing", "callbacks: cannot import 'absent'"),
        ("target:Absent", "callbacks: 'target:Absent': module target has no function Absent"),
        ("builtins:dict", "callbacks: expected builtins:dict to make a Callback, got dict"),
    ],
)
def test_a_wrong_import_path_is_one_clear_error(
    path: str, message: str, tiny_config: Callable[..., TrainConfig]
) -> None:
    with pytest.raises(UserError, match=message):
        engine.Trainer(tiny_config(callbacks=path))
