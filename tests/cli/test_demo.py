"""`demo`: its folder, its report, its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from yolov9_fast.cli import demo
from yolov9_fast.cli.main import main
from yolov9_fast.errors import UserError


@pytest.mark.slow
def test_an_untrained_demo_writes_everything_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "TRAIN_IMAGES", 16)
    monkeypatch.setattr(demo, "VAL_IMAGES", 8)
    folder = tmp_path / "demo"
    assert main(["demo", "--epochs", "1", "--imgsz", "64", "--device", "cpu", "--project", str(folder)]) == 1
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1].startswith("AP50 0.0")
    assert "below 0.50" in shown.err
    text = (folder / "report.md").read_text()
    linked = [part.split(")")[0] for part in text.split("](")[1:]]
    assert len(linked) > 10
    missing = [link for link in linked if not (folder / link).exists()]
    assert not missing


def test_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    folder = demo.fresh_folder(tmp_path / "demo")
    (folder / "old.txt").write_text("old")
    demo.fresh_folder(folder)
    assert not (folder / "old.txt").exists()


def test_a_folder_with_other_content_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="expected a new folder or that of an earlier demo"):
        demo.fresh_folder(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_every_batch_makes_a_step_and_the_end_is_without_mosaic(tmp_path: Path) -> None:
    config = demo.demo_config(tmp_path / "data.yaml", tmp_path, epochs=12, imgsz=160, seed=3, device="cpu")
    assert config.nominal_batch == config.batch
    assert config.model == "yolov9-t"
    assert 0 < config.close_mosaic < config.epochs
    assert config.seed == 3
