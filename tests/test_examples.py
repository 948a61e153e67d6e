"""Each script of examples/ runs as its first line says."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from yolov9_fast.data.rendered import SHAPES, render_dataset
from yolov9_fast.models import create_model, save_weights


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.mark.slow
def test_train(run, tmp_path: Path) -> None:
    text = run("train.py", "--epochs", 1, "--imgsz", 64, "--project", tmp_path)
    assert re.search(r"AP 0\.\d{3}, AP50 0\.\d{3}", text)
    assert list(tmp_path.rglob("best.safetensors"))


def test_predict(run, tmp_path: Path) -> None:
    weights = save_weights(create_model("gelan-t", len(SHAPES)), tmp_path / "weights.safetensors")
    pictures = render_dataset(tmp_path, train=1, val=2, size=64).parent / "images" / "val"
    text = run("predict.py", weights, pictures, "--conf", 0.0001)
    assert all(str(path) in text for path in pictures.iterdir())
    assert " at (" in text


def test_accelerate(run) -> None:
    text = run("accelerate.py")
    assert "2 conv" in text
    before, after = map(float, re.findall(r"([\d.]+) (?:before|accelerated)", text))
    assert before == pytest.approx(after, rel=1e-4)


def test_every_example_has_a_test() -> None:
    tested = {name.removeprefix("test_") + ".py" for name in globals() if name.startswith("test_")}
    assert {path.name for path in (ROOT / "examples").glob("*.py")} <= tested
