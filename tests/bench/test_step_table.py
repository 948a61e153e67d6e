"""The step table and the commands beside other people's: what needs none of their packages, and what is absent."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from yolov9_fast.bench import commands, peer_imports, step_table
from yolov9_fast.bench.cases import NoClock, PhaseClock
from yolov9_fast.bench.commands import COMMANDS, Command, Settings, run_commands, timed, yolo_copy
from yolov9_fast.bench.networks import TrainingStep
from yolov9_fast.bench.records import Recorder, newest_runs, read
from yolov9_fast.bench.report import write_report
from yolov9_fast.bench.step_rows import CPU, ROWS, OtherStep, OurStep
from yolov9_fast.bench.step_table import run_step_table

from yolov9_fast.cli.main import main
from yolov9_fast.data import load_data_config, load_split
from yolov9_fast.data.rendered import render_dataset
from yolov9_fast.errors import UserError


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    return run_step_table(rows=["published", "ours", "ours-gelan"], size=64, batch=2, threads=1, seconds=0, out=folder)


def test_rows_are_measured_in_turns_and_a_missing_peer_has_a_reason(table: Path) -> None:
    records = read(table)
    (absent,) = [r for r in records if r["kind"] == "absent"]
    assert (absent["row"], absent["reason"]) == ("published", step_table.NO_PEERS)
    ours, gelan = [r for r in records if r["kind"] == "measure"]
    for record in (ours, gelan):
        assert len(record["samples"]) == 3
        assert set(record["phases"]) == {"data", "forward", "loss", "backward", "optimiser"}
        assert sum(record["phases"].values()) == pytest.approx(record["median"], rel=0.5)
        assert record["peak_bytes"] > 1e6
    assert "speedup" not in ours
    assert gelan["speedup"]["low"] <= gelan["speedup"]["value"] <= gelan["speedup"]["high"]
    assert gelan["peak_bytes"] < ours["peak_bytes"], "no auxiliary branch"


def test_the_table_names_rows_and_absences(table: Path) -> None:
    text = step_table.text(read(table))
    assert "| ours, channels_last | this library |" in text
    assert "ours, gelan-t (without PGI), channels_last" in text
    assert f"- published code, nchw: {step_table.NO_PEERS}" in text


def test_the_report_has_a_section_of_it(table: Path, tmp_path: Path) -> None:
    """It stands beside a run's records, and is no run itself."""
    Recorder(table.with_name("20260101-run.jsonl"), "run").write(
        "run", command="test", environment=read(table)[0]["environment"]
    )
    assert newest_runs(table.parent.parent)[table.parent.name].name == "20260101-run.jsonl"
    document = tmp_path / "benchmarks.md"
    write_report(table.parent.parent, document)
    section = document.read_text().split("## Beside other people's code")[1]
    assert "ours, gelan-t (without PGI)" in section


def test_an_unknown_row_and_an_interpreter_that_is_not_there_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "step-table", "--rows", "best", "--out", str(tmp_path)]) == 2
    assert "--rows: unknown best" in capsys.readouterr().err
    words = ["--peers", "/nowhere/python", "--rows", "published", "--out", str(tmp_path), "--seconds", "0"]
    assert main(["bench", "step-table", *words]) == 0
    assert "cannot start /nowhere/python: No such file or directory" in capsys.readouterr().out


def test_a_row_whose_loss_differs_is_refused() -> None:
    right: dict[str, Any] = {"check": {"loss": 2.0, "gradient": 10.0}}
    off: dict[str, Any] = {"check": {"loss": 2.01, "gradient": 10.0}}
    assert step_table._wrong("published", right, {}) is None
    assert step_table._wrong("ours", off, {"published": right}) == "wrong result: loss 2.01 for 2"
    assert off["error"] == pytest.approx(5e-3)
    assert step_table._wrong("ours-bf16", off, {"published": right}) is None, "bf16 rounds"
    assert step_table._wrong("ours", right, {"published-bf16": off}) is None, "rounding is no reference"
    assert step_table._wrong("ours-gelan", off, {"published": right}) is None, "another network"


def test_the_first_of_each_group_is_in_float32() -> None:
    seen: set[str] = set()
    for row in ROWS.values():
        assert row.same in seen or row.dtype == "float32"
        seen.add(row.same)


def test_our_row_is_the_trainers_step() -> None:
    """The same loss and gradients as the benchmark's own step on the same batch; weights stay."""
    step = OurStep("yolov9-t", "off", 64, 2)
    model = step._trainer.state.model
    before = model.model[0].conv.weight.detach().clone()
    first = step.check()
    expected = TrainingStep("yolov9-t", 64, 2, CPU).results()
    assert first["loss"] == pytest.approx(float(expected["loss"]), rel=1e-4)
    assert first["gradient"] == pytest.approx(float(expected["gradient"].norm()), rel=1e-2)
    step(NoClock())
    assert step.check()["loss"] == pytest.approx(first["loss"], rel=1e-3)
    torch.testing.assert_close(model.model[0].conv.weight, before)


def test_a_step_of_other_code_marks_its_phases_and_its_check_leaves_no_trace() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    updates: list[int] = []
    step = OtherStep(
        model,
        model,
        lambda output: output.square().mean(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda: updates.append(1),
        torch.full((2, 3, 8, 8), 100, dtype=torch.uint8).random_(generator=torch.Generator().manual_seed(0)),
        "channels_last",
    )
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert step.check() == step.check()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    clock = PhaseClock(CPU)
    step(clock)
    clock.stop()
    assert list(clock.seconds) == ["data", "forward", "loss", "backward", "optimiser", "ema"]
    assert updates == [1]
    assert not torch.equal(model[0].weight, state["0.weight"])


# Commands -------------------------------------------------------------------------------------------------------------


def test_the_copy_has_the_same_objects(tmp_path: Path) -> None:
    data = render_dataset(tmp_path / "data", train=3, val=2, size=64)
    copy = load_data_config(yolo_copy(data, tmp_path / "copy"))
    own = load_data_config(data)
    assert copy.names == own.names
    for split in ("train", "val"):
        ours, theirs = (load_split(config, split, for_training=False)[0] for config in (own, copy))
        assert [r.boxes.tolist() for r in ours] == [r.boxes.tolist() for r in theirs]


def program(tmp_path: Path, body: str) -> Command:
    """A command that runs Python code; `rows` are the finished epochs in results.csv."""
    script = tmp_path / "program.py"
    script.write_text(f"import pathlib, sys, time\nfile = pathlib.Path('run/results.csv')\nfile.parent.mkdir()\n{body}")
    return Command("ours", "yolov9-t", lambda settings, data, folder: [str(script)])


def test_epochs_are_timed_by_their_rows(tmp_path: Path) -> None:
    body = "for epoch in range(2):\n    time.sleep(0.3)\n    file.write_text('epoch\\n' + (epoch + 1) * '1\\n')\n"
    folder = tmp_path / "out"
    folder.mkdir()
    found = timed(program(tmp_path, body + "time.sleep(0.2)"), Settings(), Path("data.yaml"), folder, None, 20)
    assert len(found["epochs"]) == 2
    assert all(seconds > 0.25 for seconds in found["epochs"])
    assert found["total"] >= sum(found["epochs"]) + 0.15


@pytest.mark.parametrize(
    ("body", "reason"),
    [("sys.exit('no such thing')", "exit code 1, 0 epochs: no such thing"), ("time.sleep(60)", "ended after 0 s")],
)
def test_a_command_that_fails_or_hangs_has_a_reason(tmp_path: Path, body: str, reason: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(UserError, match=reason):
        timed(program(tmp_path, body), Settings(), Path("data.yaml"), folder, None, 0.4)


def test_commands_are_recorded_and_what_is_not_there_has_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "file.write_text('epoch\\n1\\n'); time.sleep(0.2); file.write_text('epoch\\n1\\n2\\n'); time.sleep(0.2)"
    monkeypatch.setitem(COMMANDS, "ours", program(tmp_path, body))
    data = render_dataset(tmp_path / "data", train=1, val=1, size=64)
    path = run_commands(data, Settings(), rows=["ours", "published"], rounds=2, out=tmp_path / "records")
    records = {r["row"]: r for r in read(path) if "row" in r}
    assert len(records["ours"]["samples"]) == 2
    assert records["ours"]["epoch"] > 0.1
    assert records["published"]["reason"] == step_table.NO_PEERS
    text = commands.text(read(path))
    assert "| ours | this library | yolov9-t |" in text
    assert f"- published code: {step_table.NO_PEERS}" in text
    with pytest.raises(UserError, match="yolo9 is not installed there"):
        run = Command("published code", "yolov9-t", lambda *_: [], True, "yolo9")
        timed(run, Settings(), data, tmp_path, sys.executable, 1)


def test_every_command_asks_for_the_same(tmp_path: Path) -> None:
    for command in COMMANDS.values():
        line = " ".join(command.words(Settings(3, 96, 5, 1), Path("data.yaml"), tmp_path)).replace("=", " ")
        for word in ("epochs 3", " 96", "batch 5", "workers 1", "data data.yaml", "mosaic 0"):
            assert word in line


# Imports --------------------------------------------------------------------------------------------------------------


def test_torchvisions_nms_is_exact_and_greedy() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
    kept = peer_imports._nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5)
    assert kept.tolist() == [1, 2]


def test_a_module_runs_with_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_peer.py").write_text(
        "import json, sys\nif __name__ == '__main__':\n    open(sys.argv[1], 'w').write(json.dumps(sys.argv[1:]))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    for name in ("YOLO_CONFIG_DIR", "YOLO_OFFLINE", "MPLBACKEND", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        monkeypatch.setenv(name, "1")  # kept as they are, and taken away after the test
    out = tmp_path / "out.json"
    assert peer_imports.main(["some_peer", str(out), "--epochs"]) == 0
    assert json.loads(out.read_text()) == [str(out), "--epochs"]
