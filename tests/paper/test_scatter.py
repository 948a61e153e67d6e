"""Figures 1 and 5: the paper's points and a user's own among them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from yolov9_fast.cli.main import main
from yolov9_fast.errors import UserError
from yolov9_fast.models import create_model, save_weights
from yolov9_fast.models.profile import network_costs
from yolov9_fast.paper.scatter import parse_result


def test_a_result_is_read_from_its_words() -> None:
    row = parse_result("my-detector-s:7.2:27:47.1")
    assert (row.name, row.family) == ("my-detector-s", "my-detector")
    assert (row.parameters, row.gflops, row.ap) == (7.2, 27.0, 47.1)
    assert parse_result("a:b:1:2:3").name == "a:b", "a name may have colons"


@pytest.mark.parametrize("name", ["gelan-t", pytest.param("yolov9-t", marks=pytest.mark.slow)])
def test_weights_are_counted_as_they_are_deployed(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    path = save_weights(create_model(name, 80), tmp_path / "mine.safetensors")
    row = parse_result(f"{path}:38.3")
    cost = network_costs(name)[-1]
    assert (row.name, row.ap) == ("mine", 38.3)
    assert row.parameters == pytest.approx(cost.parameters / 1e6)
    assert row.gflops == pytest.approx(cost.gflops)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "expected NAME:PARAMETERS_IN_MILLIONS:GFLOPS:AP or WEIGHTS:AP, got 'fast'"),
        ("fast:1:2", "expected NAME"),
        (":1:2:3", "expected NAME"),
        ("fast:1:2:good", "'good' is not a number"),
        ("fast:0:2:40", "expected positive"),
        ("fast:1:inf:40", "expected positive"),
        ("fast:1:2:nan", "AP is in percent"),
        ("fast:1:2:140", "AP is in percent"),
        ("nowhere.safetensors:40", "nowhere.safetensors"),
    ],
)
def test_a_result_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_result(text)


@pytest.mark.parametrize(("target", "rows"), [("fig1", 38), ("fig5", 47)])
def test_the_commands_leave_figure_and_numbers(tmp_path: Path, target: str, rows: int) -> None:
    out = tmp_path / "figure.svg"
    assert main(["paper", target, "--out", str(out), "--mine", "mine-s:7:26:48.5", "--mine", "mine-m:19:70:52"]) == 0
    picture = out.read_text()
    assert "<svg" in picture
    numbers = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert len(numbers) == rows + 2
    assert numbers[-1] == {
        "source": "mine", "name": "mine-m", "family": "mine", "parameters": 19.0, "gflops": 70.0, "ap": 52.0,
    }  # fmt: skip
    with out.with_suffix(".csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["name"] for row in written] == [row["name"] for row in numbers]


def test_wrong_words_end_the_command_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figure.png"
    assert main(["paper", "fig1", "--out", str(out), "--mine", "fast:1:2"]) == 2
    assert "--mine: expected NAME" in capsys.readouterr().err
    assert not out.exists()
