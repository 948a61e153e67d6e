"""A tiny network and data set to train on, and the command line that uses them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.engine.conftest import tiny_config, tiny_data, tiny_graph
from yolov9_fast.cli.main import main
from yolov9_fast.models import load_checkpoint

__all__ = ["tiny_config", "tiny_data", "tiny_graph"]

Train = Callable[..., Path]


@pytest.fixture(autouse=True)
def forget_modules(tmp_path: Path) -> Iterator[None]:
    """Modules that a test wrote and imported are imported again by the next test that has modules of the same names."""
    yield
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def train(tiny_data: Path, tiny_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """`train(words, name)` runs `yolov9-fast WORDS` on tiny data in `tmp_path` and returns the run's folder."""
    monkeypatch.chdir(tmp_path)
    small = f"""--data {tiny_data} --model {tiny_graph} --epochs 2 --imgsz 64 --batch 8 --device cpu --workers 0
        --class-tower 8 --no-plots --no-tensorboard --project runs"""

    def run(words: list[str], name: str, *more: str) -> Path:
        assert main([*words, *small.split(), "--name", name, *more]) == 0
        return tmp_path / "runs" / name

    return run


def same_weights(first: Path, second: Path) -> bool:
    """Whether two runs ended with the same weights."""
    a, b = (load_checkpoint(run / "weights/last.safetensors").state_dict() for run in (first, second))
    return all(torch.equal(value, b[name]) for name, value in a.items())
