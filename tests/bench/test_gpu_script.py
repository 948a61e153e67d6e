"""`bench/gpu.sh` as far as it goes without a GPU: options, parts, resuming, refusal."""

from __future__ import annotations

import os
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


@pytest.mark.slow
def test_a_spent_budget_leaves_parts_for_later(tmp_path: Path) -> None:
    done = call("--dry-run", "--only", "ops", "--out", str(tmp_path), "--budget", "0.01")
    assert done.returncode == 1
    assert "--resume" in done.stdout
