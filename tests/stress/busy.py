"""Seconds of a training step beside other computing processes, for several ways in which OpenMP's threads wait.

    python -m tests.stress.busy --others 0 2 6 --seconds 20 --out busy.json
    python -m tests.stress.busy --cost --seconds 50

A step of yolov9-t (160 px, batch 8, two threads) is repeated in processes of their own, each way in turn. `--cost`
switches `share_cores` on and off in one process instead, every few seconds: what it costs where nothing else computes.
With `--first`, the step and the others are scheduled before all other sessions of the machine (Linux autogroups, root).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from yolov9_fast.engine import share_cores

ROOT = Path(__file__).resolve().parents[2]
POLICIES: dict[str, dict[str, str]] = {
    "waits": {"YOLOV9_FAST_BUSY": "waits"},
    "threads": {"YOLOV9_FAST_BUSY": "threads"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "OpenMP's default": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
    "GOMP_SPINCOUNT=100000": {"GOMP_SPINCOUNT": "100000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables that say how OpenMP's threads wait."""
_COMPUTE = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(10_000))"
_FIRST = "-20"
_WARM_UP_SECONDS = 2.0
_COST_SECONDS = 2.5
_LONGEST = 60.0


def training_step(image_size: int) -> Callable[[], float]:
    """A step of yolov9-t at batch 8; calling it gives its seconds."""
    import torch
    from yolov9_fast.bench.cases import NoClock
    from yolov9_fast.bench.networks import TrainingStep

    step = TrainingStep("yolov9-t", image_size, 8, torch.device("cpu"), layout="channels_last", backend_name="auto")
    clock = NoClock()

    def timed() -> float:
        begin = time.monotonic()
        step(clock)
        return time.monotonic() - begin

    return timed


def repeated(step: Callable[[], float], seconds: float) -> list[float]:
    """The seconds of each step until `seconds` have passed, at least one."""
    end = time.monotonic() + seconds
    times = [step()]
    while time.monotonic() < end:
        times.append(step())
    return times


def steps(seconds: float, image_size: int) -> list[float]:
    """Seconds of each step, as `YOLOV9_FAST_BUSY` says, after some that are not counted."""
    step = training_step(image_size)
    with share_cores():
        repeated(step, _WARM_UP_SECONDS)
        return repeated(step, seconds)


def cost(seconds: float, image_size: int) -> tuple[list[float], list[float]]:
    """Seconds of each step without and with `share_cores`, in turn."""
    step = training_step(image_size)
    repeated(step, _WARM_UP_SECONDS)
    without: list[float] = []
    with_it: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        without += repeated(step, _COST_SECONDS)
        with share_cores("waits"):
            with_it += repeated(step, _COST_SECONDS)
    return without, with_it


def scheduled_first(pid: int | str = "self") -> None:
    """Give the session of this process the largest weight among all sessions."""
    Path(f"/proc/{pid}/autogroup").write_text(_FIRST)


def measure(policy: dict[str, str], others: int, options: argparse.Namespace, image_size: int) -> list[float]:
    """`steps` in a process of its own, beside `others` that compute."""
    clean = {name: value for name, value in os.environ.items() if name not in WAITING}
    command = [sys.executable, "-m", "tests.stress.busy", "--child", "--seconds", str(options.seconds)]
    command += ["--imgsz", str(image_size)]
    own = options.sessions == "own"
    busy = [subprocess.Popen([sys.executable, "-c", _COMPUTE], start_new_session=own) for _ in range(others)]
    try:
        if options.first and own:
            for process in busy:
                scheduled_first(process.pid)
        environment = {**clean, "YOLOV9_FAST_BUSY": "off", "OMP_NUM_THREADS": str(options.threads), **policy}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=_LONGEST
            )
        except subprocess.TimeoutExpired:
            return []
    finally:
        for process in busy:
            process.kill()
            process.wait()
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stress.busy", description=__doc__)
    parser.add_argument("--others", type=int, nargs="+", default=[0, 2, 6], metavar="N", help="default 0 2 6")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES), metavar="NAME")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads of the step (default 2)")
    parser.add_argument("--imgsz", type=int, nargs="+", default=[160], metavar="N", help="image sizes (default 160)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement (default 20)")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each way (default 2)")
    parser.add_argument("--sessions", choices=("same", "own"), default="same", help="of the others (default same)")
    parser.add_argument("--first", action="store_true", help="before other sessions of the machine")
    parser.add_argument("--cost", action="store_true", help="of `share_cores` where nothing else computes")
    parser.add_argument("--out", type=Path, help="write the records to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(steps(options.seconds, options.imgsz[0])))
        return 0
    if options.first:
        with contextlib.suppress(PermissionError):  # it leads a session already
            os.setsid()
        scheduled_first()
    records: list[dict[str, Any]] = []
    for image_size in options.imgsz:
        if options.cost:
            logging.basicConfig(level=logging.INFO)  # the line that it acted
            without, with_it = cost(options.seconds, image_size)
            keep(records, [], without, image_size=image_size, others=0, policy="OpenMP's default, in turn with waits")
            keep(records, [], with_it, image_size=image_size, others=0, policy="waits, in turn with OpenMP's default")
        for others in [] if options.cost else options.others:
            found: dict[str, list[list[float]]] = {name: [] for name in options.policies}
            for _ in range(options.rounds):
                for name in options.policies:
                    found[name].append(measure(POLICIES[name], others, options, image_size))
            for name, rounds in found.items():
                times = [seconds for part in rounds for seconds in part]
                settings = {"image_size": image_size, "others": others, "sessions": options.sessions}
                keep(records, rounds, times, **settings, policy=name)
        if options.out:
            options.out.write_text(json.dumps(records, indent=1) + "\n")
    return 0


def keep(records: list[dict[str, Any]], rounds: list[list[float]], times: list[float], **settings: object) -> None:
    """Print and keep one record; `rounds` without a step took longer than a minute for the first ones."""
    record: dict[str, Any] = {**settings, "steps": len(times), "too_long": sum(not part for part in rounds)}
    if times:
        record |= {
            "median_s": round(statistics.median(times), 3),
            "mean_s": round(statistics.mean(times), 3),
            "least_s": round(min(times), 3),
            "most_s": round(max(times), 3),
        }
    record |= {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    records.append(record)
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    sys.exit(main())
