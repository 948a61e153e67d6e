"""`yolov9-fast paper TABLE`: counts, trained cells, files, and what is said about wrong input."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from yolov9_fast.cli.main import main
from yolov9_fast.models import load_graph
from yolov9_fast.paper import ablation
from yolov9_fast.paper.published import PublishedRow
from yolov9_fast.paper.rows import Row, check_counts, mean_and_spread, paired_difference, printed
from yolov9_fast.paper.systems import System


def row(name: str, ap: dict[int, float], group: str = "g", **published: float) -> Row:
    results = [{"seed": seed, "last": {"ap": value, "ap50": value, "ap75": value}} for seed, value in ap.items()]
    paper = PublishedRow(name, **published)
    return Row(System(group, name, load_graph("gelan-t"), published=paper), 2.44, 9.82, 2.5, results)


@pytest.mark.slow
def test_every_table_agrees_with_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    """Every cell of parameters and GFLOPs that the paper prints for tables 1 to 6, within its last digit."""
    assert main(["paper", "tables", "--dry"]) == 0
    text = capsys.readouterr().out
    assert "differs" not in text
    for name in ("table1", "table2", "table3", "table4", "table5", "table6"):
        assert f"{name} " in text
    assert "6.2 (6.2)" in text
    assert "94.0 (94.0)" in text
    assert "189.0" in text


def test_a_wrong_count_is_found_and_an_exception_is_named() -> None:
    good, edge = row("a", {}, parameters=2.4, gflops=9.8), row("b", {}, parameters=2.5, gflops=9.9)
    wrong = row("c", {}, parameters=2.7)
    assert check_counts([good, edge]) == []
    assert check_counts([wrong]) == ["differs: g c: parameters 2.4, published 2.7"]
    known = System("g", "d", load_graph("gelan-t"), published=PublishedRow("d", parameters=2.7), exception="why")
    assert check_counts([Row(known, 2.44, 9.8, 2.5)]) == ["exception: g d: parameters 2.4, published 2.7: why"]


def test_spread_is_the_sample_deviation_and_differences_pair_the_seeds() -> None:
    mean, deviation = mean_and_spread([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2)
    assert deviation == pytest.approx(0.1)
    assert math.isnan(mean_and_spread([0.5])[1])
    base, other = row("a", {0: 0.10, 1: 0.20, 2: 0.30}), row("b", {2: 0.33, 0: 0.11, 1: 0.22})
    mean, error = paired_difference(other, base)
    assert mean == pytest.approx(0.02)
    assert error == pytest.approx(0.01 / math.sqrt(3))
    text = printed("table5", [base, other])
    assert "20.00 ± 10.00" in text
    assert "+2.00 ± 0.58" in text


@pytest.mark.slow
def test_a_table_is_trained_once_and_written(
    few_pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("nominal_batch: 4\nclass_tower: 16\nworkers: 0\n")
    words = ["paper", "table4", "--size", "t", "--row", "none", "--row", "pfh", "--seeds", "2", "--device", "cpu"]
    words += ["--data", str(few_pictures), "--epochs", "1", "--imgsz", "64", "--batch", "4"]
    words += ["--config", str(recipe), "--project", str(tmp_path / "out")]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "GELAN-T  PFH" in text
    assert "APs ± sd" in text
    content = json.loads((tmp_path / "out" / "table4.json").read_text())
    assert [entry["row"] for entry in content["rows"]] == ["–", "PFH"]
    for entry in content["rows"]:
        values = [cell["last"]["ap"] for cell in entry["cells"]]
        assert len(values) == 2
        assert entry["mean"]["ap"] == pytest.approx(sum(values) / 2)
    assert content["recipe"]["class_tower"] == 16
    assert content["recipe"]["data"] == "data.yaml"
    assert str(tmp_path) not in json.dumps(content)
    assert (tmp_path / "out" / "table4.png").stat().st_size > 1000
    monkeypatch.setattr("yolov9_fast.paper.cells._train", lambda cell: pytest.fail("trained again"))
    assert main(words) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("table5", "data: expected a data file, got none (--data FILE.yaml)"),
        ("table5 --data missing.yaml", "missing.yaml: data file does not exist"),
        ("table5 --data missing.yaml --seeds 0", "--seeds: expected at least 1, got 0"),
        ("table5 --data missing.yaml --epochs 0", "epochs: expected at least 1, got 0"),
        ("table2 --dry --block nothing", "unknown block 'nothing'"),
        ("tables", "give --dry"),
    ],
)
def test_wrong_input_is_one_clear_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_rows_and_sizes_that_are_not_there_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", "table4", "--dry", "--size", "x"]) == 2
    assert main(["paper", "table4", "--dry", "--size", "t", "--row", "XYZ"]) == 2
    assert main(["paper", "table9"]) == 2
    assert "invalid choice" in capsys.readouterr().err


def test_an_untrainable_row_is_counted_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], few_pictures: Path, tmp_path: Path
) -> None:
    only = System("chain", "old", load_graph("gelan-t"), untrainable="its loss is another one")
    monkeypatch.setitem(ablation.TABLES, "table5", lambda sizes=None: [only])
    assert main(["paper", "table5", "--data", str(few_pictures), "--project", str(tmp_path)]) == 2
    assert "old is not trained: its loss is another one" in capsys.readouterr().out
