"""A run of the suite: its records, going on after a stop, a budget that is spent, and the report made of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from yolov9_fast.bench import machine, suite
from yolov9_fast.bench.cases import FAMILIES, Settings
from yolov9_fast.bench.records import Recorder, read
from yolov9_fast.bench.report import NOTHING, write_report
from yolov9_fast.bench.suite import all_cases, run_suite

from tests.conftest import ROOT
from yolov9_fast.errors import UserError

CPU = torch.device("cpu")
QUICK = Settings(rounds=(2, 3), peers=False)
CEILINGS = machine.Ceilings(((1e5, 1e11), (1e8, 1e10)), {"float32": 1e11})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "_SECONDS", dict.fromkeys(FAMILIES, 0.02))
    monkeypatch.setattr(suite, "_ROUNDS", {})
    monkeypatch.setattr(machine, "measure_ceilings", lambda device: CEILINGS)


def run(folder: Path, **options: object) -> Path:
    return run_suite(QUICK, CPU, out=folder, run="one", **options)  # type: ignore[arg-type]


def test_records_hold_what_a_reader_needs(tmp_path: Path) -> None:
    path = run(tmp_path, only=("nms",), match="sparse")
    records = read(path)
    environment = records[0]["environment"]
    assert path.parent.name == environment["device"]
    assert environment["versions"]["torch"] == torch.__version__
    assert {"commit", "clocks", "threads", "device_name"} <= environment.keys()
    measured = [r for r in records if r["kind"] == "measure"]
    assert measured
    assert all(len(r["samples"]) >= 2 and r["shape"]["batch"] == 2 for r in measured)
    assert [r["kind"] for r in records].count("ceilings") == 1


def test_a_run_that_was_stopped_measures_only_what_is_missing(tmp_path: Path) -> None:
    path = run(tmp_path, only=("nms",), match="sparse")
    before = [r for r in read(path) if r["kind"] == "measure"]
    run(tmp_path, only=("nms",), match="s")
    after = [r for r in read(path) if r["kind"] == "measure"]
    assert after[: len(before)] == before
    new = {r["case"] for r in after[len(before) :]}
    assert new
    assert not new & {r["case"] for r in before}


def test_what_a_spent_budget_left_out_is_recorded(tmp_path: Path) -> None:
    records = read(run(tmp_path, only=("nms", "loss"), match="7obj", budget=0.0))
    left_out = [r for r in records if r["kind"] == "absent"]
    assert left_out
    assert all("budget" in r["reason"] for r in left_out)


def test_unknown_families_and_cases_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="opps"):
        run(tmp_path, only=("opps",))
    with pytest.raises(UserError, match="no case"):
        run(tmp_path, only=("nms",), match="nothing like it")


@pytest.mark.slow
def test_the_full_suite_has_every_family_and_quick_is_a_part_of_it() -> None:
    quick = all_cases(Settings(), CPU, FAMILIES)
    full = all_cases(Settings(full=True), CPU, FAMILIES)
    assert {case.family for case in quick} == {case.family for case in full} == set(FAMILIES)
    assert len({case.name for case in full}) == len(full) > 3 * len(quick)
    subjects = {case.subject for case in full if case.family == "ops"}
    maps = {"bn_silu", "rep_bn_silu", "conv1x1", "conv1x1_pair", "cbfuse", "spp", "adown_pool"}
    assert subjects == {*maps, "sgd_update", "adam_update"}
    objects = {case.shape.get("objects") for case in full if case.subject == "assign"}
    assert objects == {0, 7, 30, 60, 300, 5000}


def test_the_report_is_made_from_records_alone(tmp_path: Path) -> None:
    run(tmp_path / "results", only=("nms",), match="sparse")
    run(tmp_path / "results", only=("blocks",), match="CSPELAN/yolov9-t.21")
    document = tmp_path / "docs" / "benchmarks.md"
    written = write_report(tmp_path / "results", document)
    text = document.read_text()
    assert document in written
    assert "sparse" in text
    assert "CSPELAN" in text
    section = text.split("### Training step")[1].split("###")[0]
    assert NOTHING in section.lower(), "what no record holds is said to be not measured"
    assert f"On a GPU: {NOTHING}" in text
    with pytest.raises(UserError, match="no records"):
        write_report(tmp_path / "nowhere", document)


@pytest.mark.slow
def test_pytest_benchmark_runs_the_suites_cases() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "-k",
        "box_iou and (eager or cuda) and nchw",
        "--benchmark-disable",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "1 passed, 1 skipped" in done.stdout or torch.cuda.is_available()


def test_plots_are_drawn_of_what_was_recorded(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    environment = machine.environment(CPU)
    recorder = Recorder(tmp_path / environment["device"] / "run.jsonl", "run")
    recorder.write("run", command="test", environment=environment)
    recorder.write("ceilings", **CEILINGS.as_dict())
    common = {"count": 1, "error": 0.0, "dtype": "float32", "launches": 1, "peak_bytes": 1e6}
    speedup = {"value": 2.0, "low": 1.9, "high": 2.1}
    for provider in ("eager", "auto"):
        own = {**common, "provider": provider, "layout": "nchw", "median": 0.1, "p20": 0.1, "p80": 0.1}
        own |= {"speedup": speedup} if provider == "auto" else {}
        ops = {"subject": "bn_silu", "mode": "both", "bytes": 1e6, "operations": 1e6, "share": 0.5}
        recorder.write("measure", case="a", family="ops", network="n@320", shape={"batch": 2}, **ops, **own)
        phases = {"forward": 0.04, "backward": 0.06}
        step = {"mode": "step", "subject": "training step", "phases": phases, "per_second": 80.0}
        recorder.write("measure", case="step/n", family="step", network="n@320", shape={"batch": 8}, **step, **own)
        for batch in (1, 8):
            for size in (320, 640):
                infer = {"mode": "forward", "subject": "inference", "phases": {"network": 0.1}, "per_second": 9.0}
                shape = {"batch": batch, "image_size": size}
                name = f"infer/n/{size}/{batch}"
                recorder.write("measure", case=name, family="infer", network=f"n@{size}", shape=shape, **infer, **own)
        for objects in (0, 7):
            shape = {"batch": 2, "objects": objects}
            loss = {"mode": "forward", "subject": "assign"}
            recorder.write("measure", case=f"assign/{objects}", family="loss", network="", shape=shape, **loss, **own)
    written = write_report(tmp_path, tmp_path / "benchmarks.md")
    names = {path.name.split("_", 1)[1] for path in written if path.suffix in (".svg", ".png")}
    plots = ("ratio_per_layer", "roofline", "step_phases", "memory", "scaling_batch", "scaling_image_size")
    assert names == {f"{name}{suffix}" for name in (*plots, "scaling_objects") for suffix in (".svg", ".png")}
    assert "2.00 [1.90, 2.10]" in (tmp_path / "benchmarks.md").read_text()
