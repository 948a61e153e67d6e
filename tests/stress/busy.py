"""Seconds of a training step beside other computing processes, by what is done about them (`engine.share_cores`).

    python -m tests.stress.busy --others 0 2 6 --out busy.json
    GOMP_SPINCOUNT=1000 python -m tests.stress.busy --ways off

One process repeats a step of yolov9-t (batch 8) in each way in turn, round by round, so that ways are compared under
the same conditions; the others are started and ended around it. With `--first`, the step and the others are scheduled
before all other sessions of the machine (Linux's autogroups; root).
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from yolov9_fast.engine.busy import SETTINGS, share_cores

WAYS = {
    "off": "OpenMP's default",
    "waits": "short waits while it is busy",
    "threads": "also fewer threads meanwhile",
    "one": "always one thread",
}
COMPUTE = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    sum(range(10_000))"
"""A program that computes while the process that its argument names is its parent."""
_FIRST = "-20"
_SETTLING_SECONDS = 1.5
"""After the others or the way changed; a step that began then is not counted."""


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


def measure(step: Callable[[], float], way: str, seconds: float) -> list[float]:
    """Seconds of each step in one of the `WAYS`, after it has settled."""
    import torch

    threads = torch.get_num_threads()
    if way == "one":
        torch.set_num_threads(1)
    try:
        with share_cores("off" if way == "one" else way):
            repeated(step, _SETTLING_SECONDS)
            return repeated(step, seconds)
    finally:
        torch.set_num_threads(threads)


def scheduled_first(pid: int | str = "self") -> None:
    """Give the session of this process the largest weight among all sessions."""
    Path(f"/proc/{pid}/autogroup").write_text(_FIRST)


@contextlib.contextmanager
def computing(number: int, *, own_sessions: bool, first: bool) -> Iterator[None]:
    """So many processes that compute, in this session or each in one of its own."""
    started = [
        subprocess.Popen([sys.executable, "-c", COMPUTE, str(os.getpid())], start_new_session=own_sessions)
        for _ in range(number)
    ]
    try:
        if own_sessions and first:
            for process in started:
                scheduled_first(process.pid)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stress.busy", description=__doc__)
    parser.add_argument("--others", type=int, nargs="+", default=[0, 2, 6], metavar="N", help="default 0 2 6")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME", help=", ".join(WAYS))
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads of the step (default 2)")
    parser.add_argument("--imgsz", type=int, default=160, metavar="N", help="image size (default 160)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default 5)")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each way (default 2)")
    parser.add_argument("--sessions", choices=("same", "own"), default="same", help="of the others (default same)")
    parser.add_argument("--first", action="store_true", help="before other sessions of the machine")
    parser.add_argument("--out", type=Path, help="write the records to this file")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.first:
        with contextlib.suppress(PermissionError):  # it leads a session already
            os.setsid()
        scheduled_first()
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # the lines that it acted
    step = training_step(options.imgsz)
    found: dict[tuple[int, str], list[float]] = {(n, way): [] for n in options.others for way in options.ways}
    loads: dict[tuple[int, str], float] = {}
    for _ in range(options.rounds):
        for others in options.others:
            with computing(others, own_sessions=options.sessions == "own", first=options.first):
                for way in options.ways:
                    found[others, way] += measure(step, way, options.seconds)
                    loads[others, way] = os.getloadavg()[0]
    records: list[dict[str, Any]] = []
    for (others, way), times in found.items():
        record = {
            "others": others,
            "sessions": options.sessions,
            "way": way,
            "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
            "image_size": options.imgsz,
            "steps": len(times),
            "median_s": round(statistics.median(times), 3),
            "mean_s": round(statistics.mean(times), 3),
            "least_s": round(min(times), 3),
            "most_s": round(max(times), 3),
            "cores": os.cpu_count(),
            "threads": options.threads,
            "load": round(loads[others, way], 1),
        }
        records.append(record)
        print(json.dumps(record), flush=True)
    if options.out:
        options.out.write_text(json.dumps(records, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
