"""Seconds of a training step beside other computing processes, for several ways in which OpenMP's threads wait.

    python -m tests.stress.busy --others 0 2 6 --seconds 20 --out busy.json

A step of yolov9-t (160 px, batch 8, two threads) is repeated in processes of their own, each way in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
POLICIES: dict[str, dict[str, str]] = {
    "OpenMP's default": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
    "GOMP_SPINCOUNT=100000": {"GOMP_SPINCOUNT": "100000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables that say how OpenMP's threads wait."""
_COMPUTE = "value = 0\nwhile True:\n    value += 1"


def steps(seconds: float) -> list[float]:
    """Seconds of each step until `seconds` have passed, after a first one that is not counted."""
    import torch
    from yolov9_fast.bench.cases import NoClock
    from yolov9_fast.bench.networks import TrainingStep

    step = TrainingStep("yolov9-t", 160, 8, torch.device("cpu"), layout="channels_last", backend_name="auto")
    clock = NoClock()
    times: list[float] = []
    step(clock)
    end = time.monotonic() + seconds
    while not times or time.monotonic() < end:
        begin = time.monotonic()
        step(clock)
        times.append(time.monotonic() - begin)
    return times


def measure(policy: dict[str, str], others: int, threads: int, seconds: float) -> list[float]:
    """`steps` in a process of its own, beside `others` that compute."""
    clean = {name: value for name, value in os.environ.items() if name not in WAITING}
    command = [sys.executable, "-m", "tests.stress.busy", "--child", "--seconds", str(seconds)]
    busy = [subprocess.Popen([sys.executable, "-c", _COMPUTE]) for _ in range(others)]
    try:
        environment = {**clean, **policy, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
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
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement (default 20)")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each way (default 2)")
    parser.add_argument("--out", type=Path, help="write the records to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(steps(options.seconds)))
        return 0
    records: list[dict[str, Any]] = []
    for others in options.others:
        times: dict[str, list[float]] = {name: [] for name in options.policies}
        for _ in range(options.rounds):
            for name in options.policies:
                times[name] += measure(POLICIES[name], others, options.threads, options.seconds)
        for name, found in times.items():
            record = {
                "others": others,
                "policy": name,
                "steps": len(found),
                "median_s": round(statistics.median(found), 3),
                "least_s": round(min(found), 3),
                "most_s": round(max(found), 3),
                "cores": os.cpu_count(),
                "threads": options.threads,
            }
            records.append(record)
            print(json.dumps(record), flush=True)
    if options.out:
        options.out.write_text(json.dumps(records, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
