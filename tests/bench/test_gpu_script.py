"""`bench/gpu.sh` as far as it goes without a GPU: options, parts, resuming, refusal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "bench" / "gpu.sh"


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *words],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_unknown_parts_and_options_are_refused(tmp_path: Path) -> None:
    done = call("--only", "ops,opps", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "opps" in done.stderr
    assert call("--fast").returncode == 2
    assert "--only" in call("--help").stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = call("--out", str(tmp_path))
    assert done.returncode == 2
    assert "--dry-run" in done.stdout


def test_the_planned_commands_end_in_ten_minutes(tmp_path: Path) -> None:
    done = call("--plan", "--out", str(tmp_path / "untouched"))
    assert done.returncode == 0, done.stderr
    *lines, total = done.stdout.splitlines()
    limits = [int(line.split()[0]) for line in lines]
    assert sum(limits) == int(total.split()[0]) < 600
    names = [line.split()[2].removesuffix(":") for line in lines]
    assert names[:4] == ["build", "tests-ops", "tests-layers", "tests-engine"]
    assert names[4:8] == ["memcheck", "racecheck", "initcheck", "synccheck"]
    tested = " ".join(line for line in lines if "pytest" in line).split()
    assert {"ops", "nn", "kernels", "losses", "engine", "accelerate"} <= {
        word.removeprefix("tests/") for word in tested
    }
    for name in ("memcheck", "initcheck"):
        assert "PYTORCH_NO_CUDA_MEMORY_CACHING=1" in lines[names.index(name)]
    assert not (tmp_path / "untouched").exists()


PYTHON = """#!/usr/bin/env bash
# Stands for Python on a machine with a GPU: notes the call; pytest fails in one part and hangs in another.
echo "$*" >> "$CALLS"
case "$*" in
  *is_available* | *"import pytest"* | *"pip install"* | *"fast info"* | *"bench suite"* | *small_shapes*) exit 0 ;;
  *get_device_capability*) echo 9.0 ;;
  *device_slug*) echo nvidia-stand-in ;;
  *"import xdist"*) exit 1 ;;
  *"-m pytest"*tests-layers*) exec sleep 30 ;;
  *"-m pytest"*)
    words="$*"
    file="${words#*--junit-xml }"
    file="${file%% *}"
    one="<testcase classname='tests.ops.test_a' time='1' name="
    echo "<testsuites><testsuite>$one'test_b'/>" > "$file"
    echo "$one'test_c'><failure message='0 != 1'/></testcase></testsuite></testsuites>" >> "$file"
    exit 1 ;;
  *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


def test_parts_on_a_machine_with_a_gpu_by_stand_ins(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {
        "python": PYTHON,
        "nvidia-smi": "#!/bin/sh\necho one GPU\n",
        "compute-sanitizer": '#!/bin/sh\necho "$* no caching: $PYTORCH_NO_CUDA_MEMORY_CACHING" >> "$CALLS"\n'
        'case "$*" in *racecheck*) echo a race; exit 9;; esac\n',
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    script = tmp_path / "bench" / "gpu.sh"
    script.parent.mkdir()
    script.write_text(SCRIPT.read_text().replace("tests tests-layers 45", "tests tests-layers 1"))
    (script.parent / "junit.py").write_text((SCRIPT.parent / "junit.py").read_text())
    calls, out = tmp_path / "calls", tmp_path / "out"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python")}
    environment |= {"CALLS": str(calls), "REAL_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    words = ["--out", str(out), "--pack", str(tmp_path / "all.tgz"), "--only", "tests,sanitize,step"]
    done = subprocess.run(["bash", str(script), *words], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "tests-ops: 1 passed, 1 failed, 0 skipped" in done.stdout, done.stdout
    assert "tests-layers: stopped after 1 s" in done.stdout
    assert "racecheck: FAILED, exit code 9: a race" in done.stdout
    assert "not done: tests-ops tests-layers tests-engine racecheck report" in done.stdout
    for part in ("memcheck", "initcheck", "synccheck", "step"):
        assert f"{part}: done" in done.stdout
    made = calls.read_text()
    assert "-m gpu and not slow" in made
    assert re.search(r"--tool memcheck .* no caching: 1$", made, re.MULTILINE)
    assert re.search(r"--tool racecheck .* no caching: $", made, re.MULTILINE)
    (record,) = out.glob("nvidia-stand-in/*-tests.json")
    found = json.loads(record.read_text())
    assert found["tests-ops"]["failures"] == {"tests/ops/test_a.py::test_c": "0 != 1"}
    assert str(tmp_path) not in record.read_text()
    packed = subprocess.run(["tar", "-tzf", str(tmp_path / "all.tgz")], capture_output=True, text=True, check=True)
    assert record.name in packed.stdout
    assert "logs/tests-ops.log" in packed.stdout


@pytest.mark.slow
def test_a_dry_run_leaves_records_and_report_and_can_be_resumed(tmp_path: Path) -> None:
    done = call("--dry-run", "--only", "ops", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "integer expression" not in done.stderr
    records = list(tmp_path.glob("*/dry-*.jsonl"))
    assert len(records) == 1
    assert "box_iou" in records[0].read_text()
    assert "box_iou" in (tmp_path / "benchmarks.md").read_text()
    size = records[0].stat().st_size
    again = call("--dry-run", "--only", "ops,sanitize", "--out", str(tmp_path), "--resume")
    assert again.returncode == 0
    assert "ops: done before" in again.stdout
    assert "sanitize: done" in again.stdout
    assert list(tmp_path.glob("*/dry-*.jsonl")) == records
    assert records[0].stat().st_size == size


def test_benchmarks_have_five_minutes_and_end_before_they_are_stopped() -> None:
    """A part that `timeout` stops has not failed by itself: its own budget, in minutes, comes first."""
    text = SCRIPT.read_text().replace("\\\n", " ")
    parts = re.findall(r"&& part (\w+) (\d+) \"\$\{bench\[@\]\}\" (.*)", text.split("else\n  # Steps first")[1])
    assert [name for name, _, _ in parts] == ["step", "infer", "ops", "compile"]
    for _, limit, words in parts:
        found = re.search(r"--budget ([\d.]+)", words)
        assert found is not None
        assert 60 * float(found[1]) + 15 <= int(limit)
    assert sum(int(limit) for _, limit, _ in parts) <= 300


def test_a_part_that_fails_or_hangs_leaves_the_others_their_time(tmp_path: Path) -> None:
    """`part` and what it uses, cut out of the script: one that fails, one that hangs, one that succeeds."""
    text = SCRIPT.read_text()
    part = text[text.index("# part NAME SECONDS") : text.index("has() {")]
    head = f"out={tmp_path}; mkdir -p $out/logs; done_file=$out/logs/done; touch $done_file; failed=''; budget=1\n"
    head += 'begin=$SECONDS; allowed=60; left() { echo $((allowed - (SECONDS - begin))); }; say() { echo "$*"; }\n'
    tail = 'part bad 5 false; part slow 1 sleep 20; part good 5 true; echo left:$failed; [ -z "$failed" ]'
    done = subprocess.run(["bash", "-c", f"{head}{part}{tail}"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "bad: FAILED, exit code 1" in done.stdout
    assert "slow: stopped after 1 s" in done.stdout
    assert "good: done" in done.stdout
    assert "left: bad slow" in done.stdout
    assert (tmp_path / "logs" / "done").read_text() == "good\n"


@pytest.mark.slow
def test_a_spent_budget_leaves_parts_for_later(tmp_path: Path) -> None:
    done = call("--dry-run", "--only", "ops", "--out", str(tmp_path), "--budget", "0.01")
    assert done.returncode == 1
    assert "--resume" in done.stdout
