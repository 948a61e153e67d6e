"""Records: appended in one write each, read past incomplete lines, newest run of each device."""

from __future__ import annotations

from pathlib import Path

import pytest
from yolov9_fast.bench.records import Recorder, key, measures, newest_runs, read

from yolov9_fast.errors import UserError


def test_what_is_written_is_read(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "device" / "run.jsonl", "run")
    recorder.write("run", environment={"device": "cpu"})
    recorder.write("measure", case="a", provider="eager", layout="nchw", median=0.123456789, bad=float("nan"))
    records = read(recorder.path)
    assert [r["kind"] for r in records] == ["run", "measure"]
    assert records[1]["median"] == 0.1234568
    assert records[1]["bad"] is None
    assert records[1]["run"] == "run"


def test_a_torn_line_is_passed_over_and_the_next_one_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    Recorder(path, "run").write("absent", case="a", provider="x")
    with path.open("a") as file:
        file.write('{"kind": "measure", "case": "b", "prov')
    Recorder(path, "run").write("absent", case="c", provider="x")
    assert [r["case"] for r in read(path)] == ["a", "c"]


def test_files_without_records_are_an_error_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("hello\n")
    for name in ("empty.jsonl", "none.jsonl"):
        with pytest.raises(UserError, match=name):
            read(tmp_path / name)


def test_the_last_measurement_of_a_case_counts(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run.jsonl", "run")
    for median in (1.0, 2.0):
        recorder.write("measure", case="a", provider="cpu", layout="nchw", median=median)
    found = measures(read(recorder.path))
    assert found["a", "cpu", "nchw"]["median"] == 2.0
    assert [key(r) for r in found.values()] == [("a", "cpu", "nchw")]


def test_the_newest_file_of_each_device(tmp_path: Path) -> None:
    for name in ("cpu/20250101-a.jsonl", "cpu/20260101-b.jsonl", "gpu/20240101-c.jsonl", "gpu/training.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert {k: v.name for k, v in newest_runs(tmp_path).items()} == {
        "cpu": "20260101-b.jsonl",
        "gpu": "20240101-c.jsonl",
    }
    assert newest_runs(tmp_path / "nowhere") == {}
