"""`bench/gpu.sh` as far as it goes without a GPU: options, parts, resuming, refusal."""

from __future__ import annotations

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
