"""What is done on a busy machine: when, what, who decides; that results stay the same."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from yolov9_fast.cli import main as cli
from yolov9_fast.engine import busy, share_cores
from yolov9_fast.engine.busy import Policy, Usage, Watch, busy_policy, threads_beside
from yolov9_fast.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
QUIET = Usage(wall=0.5, ran=1.0, waited=0.01, others=0.01, cores=2)
BUSY = Usage(wall=0.5, ran=0.5, waited=0.5, others=0.5, cores=2)
linux = pytest.mark.skipif(not busy.observable(), reason="this system has no /proc/self/schedstat")


@pytest.mark.parametrize(
    ("environment", "way", "why"),
    [
        ({}, "waits", "the default"),
        ({"OMP_NUM_THREADS": "4"}, "waits", "the default"),
        ({"OMP_NUM_THREADS": "1"}, "off", "OMP_NUM_THREADS=1: one thread waits for no other"),
        ({"OMP_WAIT_POLICY": "active"}, "off", "OMP_WAIT_POLICY=active is set"),
        ({"GOMP_SPINCOUNT": "1000"}, "off", "GOMP_SPINCOUNT=1000 is set"),
        ({"KMP_BLOCKTIME": "0"}, "off", "KMP_BLOCKTIME=0 is set"),
        ({"YOLOV9_FAST_BUSY": "off"}, "off", "YOLOV9_FAST_BUSY=off"),
        ({"YOLOV9_FAST_BUSY": " Threads "}, "threads", "YOLOV9_FAST_BUSY=threads"),
        ({"YOLOV9_FAST_BUSY": "threads", "GOMP_SPINCOUNT": "1000"}, "threads", "YOLOV9_FAST_BUSY=threads"),
        ({"YOLOV9_FAST_BUSY": "waits", "GOMP_SPINCOUNT": "1000"}, "off", "GOMP_SPINCOUNT=1000 is set"),
    ],
)
def test_the_users_settings_decide(environment: dict[str, str], way: str, why: str) -> None:
    assert busy_policy(environment) == Policy(way, why)


def test_a_command_has_a_default_of_its_own() -> None:
    assert busy_policy({}, default="threads").way == "threads"
    assert busy_policy({"YOLOV9_FAST_BUSY": "waits"}, default="threads").way == "waits"


def test_without_figures_nothing_is_done() -> None:
    assert busy_policy({}, observable=False).way == "off"


def test_a_wrong_setting_is_an_error() -> None:
    with pytest.raises(UserError, match="YOLOV9_FAST_BUSY: expected one of waits, threads, off, got 'fast'"):
        busy_policy({"YOLOV9_FAST_BUSY": "fast"})
    with pytest.raises(ValueError, match="way: expected one of waits, threads, off, got 'fast'"), share_cores("fast"):
        pass


def test_a_machine_is_busy_at_once_and_quiet_after_three_looks() -> None:
    watch = Watch()
    assert [watch.look(usage, 2) for usage in (QUIET, BUSY, QUIET, QUIET, BUSY, QUIET, QUIET, QUIET, QUIET)] == [
        *(False, True, True, True),
        *(True, True, True, False, False),
    ]


@pytest.mark.parametrize(
    "usage",
    [
        Usage(wall=0.5, ran=0.4, waited=0.4, others=0.0, cores=2),  # a quota, or a limit of real-time processes
        Usage(wall=0.5, ran=0.01, waited=0.01, others=1.0, cores=2),  # idle itself
        Usage(wall=0.5, ran=1.0, waited=0.01, others=7.0, cores=16),  # there are free cores
    ],
)
def test_not_every_wait_is_a_busy_machine(usage: Usage) -> None:
    assert not Watch().look(usage, 2)


def test_a_reduced_process_waits_for_no_core_and_the_machine_is_busy_still() -> None:
    watch = Watch()
    watch.look(BUSY, 2)
    reduced = Usage(wall=0.5, ran=0.5, waited=0.0, others=0.5, cores=2)
    assert all(watch.look(reduced, 2) for _ in range(10))


@pytest.mark.parametrize(
    ("cores", "others", "threads", "expected"),
    [(2, 1.0, 2, 1), (2, 1.8, 2, 1), (2, 0.1, 2, 2), (16, 2.1, 16, 14), (16, 2.1, 8, 8), (4, 9.0, 4, 1)],
)
def test_the_threads_beside_others(cores: int, others: float, threads: int, expected: int) -> None:
    assert threads_beside(Usage(2.0, 1.0, 1.0, others * 2.0, cores), threads) == expected


@pytest.fixture
def usages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Usage]]:
    """The machine's usage, the last of the list: a test changes it. Four threads on any number of cores."""
    shown = [QUIET]

    class Meter:
        def __call__(self) -> Usage:
            return shown[-1]

    for name in (busy.VARIABLE, "OMP_NUM_THREADS", *busy.SETTINGS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(busy, "_Meter", Meter)
    monkeypatch.setattr(busy, "observable", lambda: True)
    monkeypatch.setattr(busy, "INTERVAL", 0.01)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield shown
    torch.set_num_threads(before)


def until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def teams() -> int:
    return sum(thread.name == "sleeping OpenMP threads" for thread in threading.enumerate())


def monitors() -> int:
    return sum(thread.name == "busy machine" for thread in threading.enumerate())


@linux
def test_waits_become_short_and_long_again(usages: list[Usage], caplog: pytest.LogCaptureFixture) -> None:
    others = monitors()
    environment = dict(os.environ)
    with caplog.at_level(logging.INFO, "yolov9_fast"), share_cores() as policy:
        assert policy.way == "waits"
        for _ in range(2):
            assert not teams()
            usages.append(BUSY)
            assert until(lambda: teams() == 1)
            assert torch.get_num_threads() == 4
            usages.append(Usage(wall=0.5, ran=1.0, waited=0.0, others=0.0, cores=8))
            assert until(lambda: teams() == 0)
        usages.append(BUSY)
        assert until(lambda: teams() == 1)
        assert dict(os.environ) == environment
    assert not teams()
    assert monitors() == others
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("other processes compute: OpenMP's threads sleep instead of spinning")


@linux
def test_threads_become_fewer_and_are_given_back(usages: list[Usage], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "yolov9_fast"), share_cores("threads"):
        usages.append(BUSY)
        assert until(lambda: torch.get_num_threads() == 1)
        usages.append(Usage(wall=0.5, ran=0.5, waited=0.0, others=0.0, cores=8))
        assert until(lambda: torch.get_num_threads() == 4)
        usages.append(BUSY)
        assert until(lambda: torch.get_num_threads() == 1)
    assert torch.get_num_threads() == 4
    time.sleep(0.05)
    assert torch.get_num_threads() == 4
    assert len(caplog.messages) == 1
    assert "1 of 4 threads" in caplog.messages[0]


@linux
@pytest.mark.parametrize("setting", busy.SETTINGS)
def test_nothing_watches_where_the_user_has_chosen(
    usages: list[Usage], monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    before = monitors()
    monkeypatch.setenv(setting, "1000")
    with share_cores() as policy:
        assert policy.way == "off"
        assert monitors() == before


@linux
def test_a_command_that_computes_is_watched(usages: list[Usage], monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = monitors(), []
    module = SimpleNamespace(configure=lambda parser: None, run=lambda arguments: seen.append(monitors() - before) or 0)
    real = importlib.import_module
    monkeypatch.setattr(
        cli.importlib, "import_module", lambda name: module if name == "yolov9_fast.cli.info" else real(name)
    )
    assert cli.main(["info"]) == 0
    module.WHEN_BUSY = "waits"
    assert cli.main(["info"]) == 0
    monkeypatch.setenv("YOLOV9_FAST_BUSY", "off")
    assert cli.main(["info"]) == 0
    assert seen == [0, 1, 0]
    assert monitors() == before


def test_a_wrong_setting_is_one_line_of_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("YOLOV9_FAST_BUSY", "fast")
    assert cli.main(["val", "--weights", "w", "--data", "d"]) == 2
    assert capsys.readouterr().err == "error: YOLOV9_FAST_BUSY: expected one of waits, threads, off, got 'fast'\n"


def test_commands_that_measure_are_left_alone() -> None:
    computing = {
        name for name in cli.COMMANDS if hasattr(importlib.import_module(f"yolov9_fast.cli.{name}"), "WHEN_BUSY")
    }
    assert computing == {"train", "val", "predict", "paper", "demo"}


SPINNING = """
import json, time, torch
from torch.utils.data import DataLoader
from yolov9_fast.engine.busy import IdleTeam, loaded_libgomp

torch.manual_seed(0)
convolution = torch.nn.Conv2d(16, 16, 3)
images = torch.randn(4, 16, 40, 40)

def gradients():
    convolution.zero_grad()
    convolution(images).square().mean().backward()
    return [parameter.grad.clone() for parameter in convolution.parameters()]

def spun():
    seconds = 0.0
    for _ in range(20):
        gradients()
        begin = time.process_time()
        time.sleep(0.03)  # only threads that spin use the CPU
        seconds += time.process_time() - begin
    return seconds

gradients()
before, bits = spun(), gradients()
team = IdleTeam(loaded_libgomp())
during, short = spun(), gradients()
loaded = [int(batch.sum()) for batch in DataLoader(torch.arange(8), batch_size=4, num_workers=1)]
team.stop()
print(json.dumps({
    "seconds": [before, during, spun()],
    "same": all(torch.equal(one, other) for one, other in zip(bits, short)),
    "threads": torch.get_num_threads(),
    "loaded": loaded,
}))
"""


@pytest.mark.skipif(not busy.loaded_libgomp(), reason="this torch has another OpenMP")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_threads_sleep_beside_an_idle_team_and_results_are_the_same() -> None:
    clean = {name: value for name, value in os.environ.items() if name not in busy.SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", SPINNING],
        env={**clean, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    before, during, after = found["seconds"]
    assert during < before / 4
    assert during < after / 4
    assert found["same"]
    assert found["threads"] == 2
    assert found["loaded"] == [6, 22]


WATCHED = """
import logging, sys, time, torch
from yolov9_fast.engine import share_cores

class Seen(logging.Handler):
    def emit(self, record):
        print(record.getMessage(), flush=True)

logger = logging.getLogger("yolov9_fast")
logger.addHandler(Seen())
logger.setLevel(logging.INFO)
a = torch.randn(256, 256)
end = time.monotonic() + float(sys.argv[1])
with share_cores("waits"):
    while time.monotonic() < end:
        torch.mm(a, a)
"""


@linux
@pytest.mark.slow
@pytest.mark.skipif(not busy.loaded_libgomp(), reason="this torch has another OpenMP")
def test_processes_that_compute_are_noticed() -> None:
    cores = len(os.sched_getaffinity(0))
    clean = {name: value for name, value in os.environ.items() if name not in (*busy.SETTINGS, busy.VARIABLE)}
    environment = {**clean, "OMP_NUM_THREADS": str(max(2, cores)), "PYTHONPATH": str(ROOT)}
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * cores)]
    try:
        done = subprocess.run(
            [sys.executable, "-c", WATCHED, "8"], env=environment, capture_output=True, text=True, timeout=300
        )
    finally:
        for process in others:
            process.kill()
            process.wait()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("other processes compute: OpenMP's threads sleep")
