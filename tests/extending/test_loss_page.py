"""What docs/extending/loss.md says, done exactly so."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from tests.extending.conftest import Train, same_weights
from tests.extending.pages import code_blocks, commands, write_files
from yolov9_fast.losses import DetectionLoss
from yolov9_fast.nn import DetectionOutput

PAGE = "loss.md"
[COMMAND] = commands(PAGE)


@pytest.fixture(autouse=True)
def page_files(tmp_path: Path) -> None:
    write_files(PAGE, tmp_path)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_command_trains_with_the_term(train: Train) -> None:
    with_term, plain = train(COMMAND, "with_term"), train(["train"], "plain")
    assert "loss_terms: entropy:entropy=0.1" in (with_term / "config.yaml").read_text()
    for row in rows(with_term):
        assert float(row["train/entropy"]) < 0
        assert float(row["val/entropy"]) < 0
    assert "train/entropy" not in rows(plain)[0]
    assert not same_weights(with_term, plain)


def test_the_criterion_of_the_page_lowers_certain_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, DetectionLoss] = {}
    exec(code_blocks(PAGE, "python")[1], names)
    gradients = []
    for criterion in (names["criterion"], DetectionLoss(5)):
        maps = [torch.full((1, 69, 64 // stride, 64 // stride), 4.0, requires_grad=True) for stride in (8, 16, 32)]
        criterion(DetectionOutput(maps), torch.tensor([[0, 0, 0.5, 0.5, 0.8, 0.8]]), 64).total.backward()
        gradients.append(torch.cat([level.grad.flatten() for level in maps if level.grad is not None]))
    assert names["criterion"].names == ("box", "cls", "dfl", "entropy")
    assert (gradients[0] >= gradients[1]).all()
    assert (gradients[0] > gradients[1]).any()
