"""Runs from the command line: killed, interrupted, and in several processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from yolov9_fast.engine.config import TrainConfig, write_config
from yolov9_fast.engine.run_files import load_state

ROOT = Path(__file__).parents[2]
Make = Callable[..., TrainConfig]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _command(config: TrainConfig, processes: int = 1) -> list[str]:
    recipe = Path(config.project).parent / f"{config.name}.yaml"
    write_config(config, recipe)
    launcher = (
        ["-m", "yolov9_fast.engine.launch", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    )
    return [sys.executable, *launcher, "-m", "yolov9_fast", "train", "--config", str(recipe)]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)


def _wait_for_two_epochs(run: Path, process: subprocess.Popen[str]) -> None:
    """The state is written last: with two rows in the table, at least that of the first epoch is there."""
    deadline, table = time.monotonic() + 200, run / "results.csv"
    while not table.exists() or len(table.read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _state(config: TrainConfig) -> dict[str, Any]:
    return load_state(Path(config.project) / config.name / "weights/state.pt")


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_end_of_an_uninterrupted_one(tiny_config: Make) -> None:
    uninterrupted, killed = (tiny_config(name=name, epochs=4, workers=1) for name in ("uninterrupted", "killed"))
    assert _run(_command(uninterrupted)).returncode == 0
    process = subprocess.Popen(_command(killed), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    run = Path(killed.project) / "killed"
    _wait_for_two_epochs(run, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = _run([sys.executable, "-m", "yolov9_fast", "train", "--resume", str(run)])
    assert finished.returncode == 0, finished.stderr
    a, b = _state(uninterrupted), _state(killed)
    assert b["epoch"] == 3
    for part in ("model", "ema"):
        assert all(torch.equal(v, b[part][k]) for k, v in a[part].items())
    for index, slot in a["optimizer"]["state"].items():
        assert torch.equal(slot["momentum_buffer"], b["optimizer"]["state"][index]["momentum_buffer"])
    assert a["best_fitness"] == b["best_fitness"]


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_leaves_the_last_checkpoint(tiny_config: Make) -> None:
    config = tiny_config(epochs=500)
    # A background process of a shell ignores interrupts, and its children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        _command(config), env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, before)
    _wait_for_two_epochs(Path(config.project) / "exp", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in out + err
    assert "Traceback" not in err
    assert _state(config)["epoch"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_of_two_processes_one_that_dies_or_stops_is_named_in_one_line(
    tiny_config: Make, number: signal.Signals, victim: int
) -> None:
    """Without a launcher: rank 0 also has the store."""
    config = tiny_config(epochs=500)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common = {**ENVIRONMENT, **address, "WORLD_SIZE": "2", "YOLOV9_FAST_MAX_SILENT_SECONDS": "5"}
    processes = [
        subprocess.Popen(
            _command(config),
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    run = Path(config.project) / "exp"
    _wait_for_two_epochs(run, processes[0])
    processes[victim].send_signal(number)
    _, errors = processes[1 - victim].communicate(timeout=120)
    processes[victim].kill()
    processes[victim].communicate()
    assert processes[1 - victim].returncode == 2
    assert "Traceback" not in errors
    [line] = [line for line in re.split(r"[\r\n]+", errors) if line.startswith("error")]
    what = (
        "has ended or cannot be reached" if number is signal.SIGKILL else r"\(pid \d+ on .+\) has been silent for 5 s"
    )
    if number is signal.SIGSTOP and victim == 0:
        what = "has been silent for 5 s"
    assert re.search(rf"process {victim} {what}.*continue with: yolov9-fast train --resume", line)


@pytest.mark.slow
@pytest.mark.parametrize("many", [False, True])
def test_the_launcher_adds_no_traceback(tiny_config: Make, many: bool) -> None:
    """Of a process that dies, or of twenty interrupts."""
    config = tiny_config(epochs=500)
    command = _command(config, processes=2)
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    _wait_for_two_epochs(Path(config.project) / "exp", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [int(pid) for pid in children if b"yolov9_fast" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    if many:
        for _ in range(20):
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
    else:
        os.kill(ranks[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (130 if many else 2)
    assert "Traceback" not in errors
    assert errors.count("continue with: yolov9-fast train --resume") == 1


@pytest.mark.slow
@pytest.mark.parametrize("nominal_batch", [8, 24])
def test_two_processes_equal_one_of_twice_the_batch(tiny_config: Make, nominal_batch: int) -> None:
    """The published loss sums over the images of all processes; statistics and normalisers are shared.

    With 24 images per step, gradients of one epoch are used in the next.
    """
    options = {"epochs": 2, "warmup_epochs": 0.0, "lr0": 0.002, "clip": 0.0, "nominal_batch": nominal_batch}
    # In bfloat16 sums of another order are rounded to other weights.
    one, two = (tiny_config(name=name, amp="off", **options) for name in ("one", "two"))
    assert _run(_command(one)).returncode == 0
    finished = _run(_command(two, processes=2))
    assert finished.returncode == 0, finished.stderr
    assert (finished.stdout + finished.stderr).count("best weights (epoch") == 1
    a, b = _state(one), _state(two)
    assert a["last_step"] == b["last_step"] == (3 if nominal_batch == 8 else 2)
    for key, value in a["model"].items():
        torch.testing.assert_close(b["model"][key], value, rtol=1e-4, atol=2e-5, msg=key)
    for ours, theirs in zip(json.loads(a["rows"]), json.loads(b["rows"]), strict=True):
        assert ours["metrics/ap"] == pytest.approx(theirs["metrics/ap"], abs=1e-3)
        assert ours["val/box"] == pytest.approx(theirs["val/box"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pkill") is None, reason="needs pkill")
def test_two_processes_resume_to_the_same_end(tiny_config: Make) -> None:
    """A step every five batches, epochs of two batches: most states have pending gradients of both processes."""
    options = {"epochs": 10, "nominal_batch": 40, "warmup_epochs": 0.0}
    uninterrupted, killed = (tiny_config(name=name, **options) for name in ("uninterrupted", "killed"))
    assert _run(_command(uninterrupted, processes=2)).returncode == 0
    command = _command(killed, processes=2)
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    run = Path(killed.project) / "killed"
    _wait_for_two_epochs(run, process)
    # The launcher's processes have sessions of their own; all carry the recipe's path in their command line.
    subprocess.run(["pkill", "-KILL", "-f", command[-1]], check=True)
    process.wait()
    assert _state(killed)["epoch"] < 9
    finished = _run([*command[:-2], "--resume", str(run)])
    assert finished.returncode == 0, finished.stderr
    a, b = _state(uninterrupted), _state(killed)
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    assert all(g is None or torch.equal(g, h) for g, h in zip(a["gradients"], b["gradients"], strict=True))


@pytest.mark.slow
def test_callbacks_run_on_rank_0_or_in_every_process(tiny_config: Make, tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(f"""
from pathlib import Path
from yolov9_fast.engine import Callback

class Main(Callback):
    def on_epoch_end(self, trainer, result):
        Path({str(tmp_path)!r}, f"{{type(self).__name__}}-{{trainer.process_group.rank}}").touch()
        if trainer.process_group.rank == trainer.process_group.size - 1:
            trainer.stop("stop everywhere")

class Every(Main):
    every_process = True
""")
    config = tiny_config(callbacks="ranks:Main,ranks:Every")
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    finished = subprocess.run(_command(config, processes=2), env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert {path.name for path in tmp_path.glob("*-*")} == {"Main-0", "Every-0", "Every-1"}
    assert _state(config)["epoch"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("sync_bn", [True, False])
def test_one_image_of_32_pixels_in_each_of_two_processes(tiny_config: Make, sync_bn: bool) -> None:
    """Synchronised BatchNorm has a value of each process; without it, the run is refused before it begins."""
    config = tiny_config(imgsz=32, batch=2, epochs=1, sync_bn=sync_bn)
    finished = _run(_command(config, processes=2))
    if sync_bn:
        assert finished.returncode == 0, finished.stderr
        assert _state(config)["epoch"] == 0
    else:
        assert finished.returncode != 0
        assert "imgsz: expected at least 64 for a batch of one image in each process" in finished.stderr
        assert not Path(config.project).exists()
