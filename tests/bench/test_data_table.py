"""The table of training images: stages of a sample from files and from memory, a larger set, and what is absent."""

from __future__ import annotations

from pathlib import Path

import pytest
from yolov9_fast.bench import data_table, step_table
from yolov9_fast.bench.data_rows import enlarged_copy, image_facts
from yolov9_fast.bench.data_table import run_data_table
from yolov9_fast.bench.records import read

from yolov9_fast.cli.main import main
from yolov9_fast.data import load_data_config, load_split, read_image
from yolov9_fast.data.rendered import render_dataset
from yolov9_fast.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_dataset(tmp_path_factory.mktemp("data"), train=4, val=1, size=96)


def test_stages_are_measured_from_files_and_memory(data: Path, tmp_path: Path) -> None:
    options = {"sizes": [64], "batch": 2, "large": 0, "seconds": 0.0, "workers": 1, "out": tmp_path}
    path = run_data_table(data, rows=["files", "memory", "ultralytics-files"], **options)
    records = read(path)
    assert [r["shape"]["data"] for r in records if r.get("row") == "files"] == [data.stem]
    for record in (r for r in records if r["kind"] == "measure"):
        stages = {"files": {"decode", "collate", "sample"}, "memory": {"augment", "collate"}}[record["row"]]
        assert set(record["stages"]) == stages
        assert all(seconds > 0 for seconds in record["stages"].values())
        assert record["per_core"] == pytest.approx(1 / (record["median"] + record["stages"]["collate"]), rel=1e-4)
        assert record["loader"] > 0
        assert len(record["samples"]) == 3
    assert {r["reason"] for r in records if r["kind"] == "absent"} == {step_table.NO_PEERS}
    text = data_table.text(records)
    assert "| ours, files | this library |" in text
    assert f"Ultralytics, files: {step_table.NO_PEERS}" in text


def test_a_larger_copy_has_the_same_objects(data: Path, tmp_path: Path) -> None:
    copy = enlarged_copy(data, tmp_path, 128)
    before, after = (load_split(load_data_config(file), "train", for_training=True)[0] for file in (data, copy))
    assert [len(record.boxes) for record in before] == [len(record.boxes) for record in after]
    assert all(max(read_image(record.path).shape) == 128 and record.path.suffix == ".jpg" for record in after)
    assert image_facts(copy)["images"] == 4
    assert max(image_facts(copy)["median_size"]) == 128


def test_wrong_options_are_one_line(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--rows: unknown tape; choose from files, memory, "):
        run_data_table(data, rows=["tape"])
    assert main(["bench", "data", "--imgsz", "64", "50"]) == 2
    assert "--imgsz: expected a positive multiple of 32, got 50" in capsys.readouterr().err
    assert main(["bench", "data", "--large", "-1"]) == 2
    assert "--large: expected at least 0, got -1" in capsys.readouterr().err
