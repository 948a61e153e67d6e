"""The examples of docs/paper.md, run as they stand: a block and an auxiliary branch of a user's own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from yolov9_fast.cli.main import main
from yolov9_fast.models import load_checkpoint, pgi
from yolov9_fast.nn import registry

PAGE = Path(__file__).resolve().parents[2] / "docs" / "paper.md"
SHORT = [
    "--epochs",
    "1",
    "--imgsz",
    "64",
    "--batch",
    "4",
    "--workers",
    "0",
    "--device",
    "cpu",
    "--no-plots",
    "--no-tensorboard",
]


def example(name: str) -> str:
    found = re.search(rf"```python\n# {name}\.py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"docs/paper.md has no {name}.py"
    return found[1]


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's modules in the working folder."""
    monkeypatch.setattr(registry, "_specs", dict(registry._specs))
    monkeypatch.setattr(pgi, "_branches", dict(pgi._branches))
    for name in ("my_blocks", "my_branches"):
        (tmp_path / f"{name}.py").write_text(example(name), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("my_blocks", "my_branches"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["my_blocks", "my_branches"])
def test_an_example_is_short(name: str) -> None:
    lines = [line for line in example(name).splitlines() if line.strip()]
    assert len(lines) <= 20


@pytest.mark.slow
def test_a_block_of_ones_own(examples: Path, few_pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", "table2", "--dry", "--size", "t", "--import", "my_blocks", "--block", "depthwise"]) == 0
    assert "depthwise" in capsys.readouterr().out
    graph = "paper graph gelan-t --import my_blocks --block depthwise --out my-net.yaml"
    assert main(graph.split()) == 0
    train = ["train", "--import", "my_blocks", "--model", "my-net.yaml", "--data", str(few_pictures), *SHORT]
    assert main(train) == 0
    weights = examples / "runs" / "train" / "exp" / "weights" / "best.safetensors"
    val = f"val --import my_blocks --weights {weights} --data {few_pictures} --imgsz 64 --workers 0 --device cpu"
    assert main(val.split()) == 0
    command = [sys.executable, "-m", "yolov9_fast", *val.replace(" --import my_blocks", "").split()]
    other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert "unknown block 'depthwise'" in other.stderr


def test_a_branch_of_ones_own(examples: Path, few_pictures: Path) -> None:
    words = ["train", "--import", "my_branches", "--model", "gelan-t", "--auxiliary", "upwards"]
    assert main([*words, "--data", str(few_pictures), *SHORT]) == 0
    pgi._branches.pop("upwards")
    model = load_checkpoint(examples / "runs" / "train" / "exp" / "weights" / "best.safetensors")
    assert model.graph_name == "gelan-t+upwards"
    assert model.has_auxiliary


def test_a_module_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--import", "no_such_module"]) == 2
    assert "--import: cannot import 'no_such_module'" in capsys.readouterr().err
