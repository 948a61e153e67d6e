"""Short forms of the long tests; `YOLOV9_FAST_KILLS=200` and the modules' command lines run the long ones."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.stress import busy, kills, memory

ROOT = Path(__file__).resolve().parents[2]


def _run(module: str, tmp_path: Path, *words: str) -> dict[str, object]:
    """In a process of its own: it forks, and must have no threads."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", f"tests.stress.{module}", *words, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    result: dict[str, object] = json.loads(out.read_text())
    return result


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    number = int(os.environ.get("YOLOV9_FAST_KILLS", "6"))
    result = _run("kills", tmp_path, "--kills", str(number))
    assert result["kills"] == number
    assert result["failures"] == []
    assert result["temporary_files_left"] == 0


@pytest.mark.slow
def test_memory_is_flat(tmp_path: Path) -> None:
    result = _run("memory", tmp_path, "--epochs", "20", "--images", "800", "--frames", "5000")
    assert [part["flat"] for part in result.values() if isinstance(part, dict)] == [True] * 3


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="this system has no proportional memory")
def test_the_loader_takes_no_more_shared_memory_than_it_says(tmp_path: Path) -> None:
    words = ["--workers", "3", "--imgsz", "320", "--batch", "4", "--images", "24", "--batches", "12"]
    for run in _run("loader", tmp_path, *words)["runs"]:
        assert 0 < run["shared_peak_mib"] <= run["shared_bound_mib"]


@pytest.mark.slow
def test_a_small_dev_shm_makes_fewer_batches_and_no_sigbus(tmp_path: Path) -> None:
    limited = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=6M tmpfs /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*limited, "true"], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    words = ["--workers", "2", "--imgsz", "320", "--batch", "4", "--images", "24", "--batches", "12"]
    command = [*limited, sys.executable, "-m", "tests.stress.loader", *words, "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "/dev/shm has 6 MiB free" in done.stderr
    for run in json.loads((tmp_path / "out.json").read_text())["runs"]:
        assert "2 loader processes with a batch of 1 MiB ahead" in run["loader"]
        assert run["shared_peak_mib"] <= 6


def test_growth_is_not_flat() -> None:
    mib = 2**20
    assert memory.summary([300 * mib] * 40)["flat"]
    grown = memory.summary([(300 + step) * mib for step in range(40)])
    assert not grown["flat"]
    assert grown["peak_mib"] == 339


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this system has no /proc")
def test_processes_that_compute_end_with_the_one_that_started_them() -> None:
    start = "subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())], stdout=subprocess.DEVNULL)"
    code = f"import os, subprocess, sys; print({start}.pid, flush=True); input()"
    parent = subprocess.Popen(
        [sys.executable, "-c", code, busy.COMPUTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = Path(f"/proc/{parent.stdout.readline().strip()}/stat")
    parent.kill()
    parent.communicate()
    end = time.monotonic() + 60
    with contextlib.suppress(OSError):  # it has ended
        while child.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < end
            time.sleep(0.05)


def test_a_difference_between_two_runs_is_found(tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    (whole / "weights").mkdir(parents=True)
    header = {"a": {"dtype": "U8"}, "b": 1}
    for order in (header, dict(reversed(header.items()))):
        text = json.dumps(order).encode()
        (whole / "weights" / "last.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"tensors")
        if not run.exists():
            shutil.copytree(whole, run)
    (whole / "results.csv").write_text("epoch,seconds\n1,2\n")
    (run / "results.csv").write_text("epoch,seconds\n1,3\n")
    assert kills.differences(whole, run) == []
    (run / "results.csv").write_text("epoch,seconds\n2,2\n")
    (run / ".yolov9_fast-1.tmp").touch()
    (whole / "metrics.json").touch()
    weights = run / "weights" / "last.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"tensors", b"tensorz"))
    assert kills.differences(whole, run) == [
        "metrics.json is missing",
        ".yolov9_fast-1.tmp is left",
        "results.csv differs",
        "weights/last.safetensors differs",
    ]
