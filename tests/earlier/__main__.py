"""`python -m tests.earlier`: the records of the simulated checks, of traced launches and of the host's time.

Each is of the earlier commit and of today's tree, and is written to `bench/results`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.earlier import COMMIT, ROOT, TREE, environment, tree
from tests.earlier.checks import CHECKS, VARIABLES
from yolov9_fast.atomic import atomic_write

RESULTS = ROOT / "bench" / "results"
NETWORKS = [f"yolov9-{size}" for size in "tsmce"]
CASES = [f"{network} {what} bf16" for network in NETWORKS for what in ("step", "predict")]
CASES += ["yolov9-t step fp16", "yolov9-t step off", "yolov9-t validate bf16"]
TESTS_ADDED = ("tests/fake_cuda", "tests/ptx", "tests/ops/test_cuda_on_host.py", "tests/bench/test_predict.py")
"""Of the stand-ins, beside the tests of `CHECKS`."""


def write(name: str, content: dict[str, Any]) -> None:
    path = RESULTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def python(*arguments: str, earlier: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python in a process with the earlier package, or with today's."""
    base = environment() if earlier else {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(["-P"] if earlier else []), "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=ROOT, env=base | variables, capture_output=True, text=True, check=False)


def plain(line: str) -> str:
    """Without folders of this machine."""
    return line.removeprefix("[rank0]: ").replace(f"{TREE}/", "").replace(f"{ROOT}/", "")


def checks_before(chosen: Sequence[str]) -> None:
    path = RESULTS / "gpu_checks" / f"{COMMIT}.json"
    for name in chosen or CHECKS:
        done = python("-m", "tests.earlier.checks", name, earlier=True, **VARIABLES.get(name, {}))
        lines = (done.stdout + done.stderr).strip().splitlines()
        found = json.loads(path.read_text())["checks"] if path.exists() else {}
        found[name] = {"status": done.returncode, "output": plain(lines[-1]) if lines else ""}
        print(f"{name}: {found[name]['output']}", flush=True)
        ordered = {name: found[name] for name in CHECKS if name in found}
        command = "python -m tests.earlier before"
        write(f"gpu_checks/{COMMIT}.json", {"commit": COMMIT, "command": command, "checks": ordered})


def checks_now(names: Sequence[str]) -> None:
    """The tests of `CHECKS` and of the stand-ins, once each; seconds of a machine on which others may run."""
    chosen = {name: CHECKS[name][1] for name in names or CHECKS}
    added = () if names else TESTS_ADDED
    selected = sorted(
        {*added, *(t for tests in chosen.values() for t in tests if not added or not t.startswith(added))}
    )
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ["-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={report}"]
        print(python("-m", "pytest", *options, *selected).stdout[-3000:])
        cases = list(ET.parse(report).iter("testcase"))

    def counted(prefixes: Sequence[str]) -> dict[str, Any]:
        results: Counter[str] = Counter()
        seconds = 0.0
        for case in cases:
            if f"{case.get('file')}::{case.get('name')}".startswith(tuple(prefixes)):
                kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
                results[kinds[0] if kinds else "passed"] += 1
                seconds += float(case.get("time", 0))
        return {**results, "seconds": round(seconds, 1)}

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    write(
        "gpu_checks/now.json",
        {
            "commit": commit.stdout.strip(),
            "command": "python -m tests.earlier now",
            "load": round(os.getloadavg()[1], 1),
            "cores": os.cpu_count(),
            "checks": {name: {"tests": list(tests)} | counted(tests) for name, tests in chosen.items()},
            "seconds added to make test-all": {
                name: counted([f"{name}::"] if name.endswith(".py") else [f"{name}/"])
                for name in sorted({test.split("::")[0] for test in selected})
            },
        },
    )


def launches() -> None:
    """Launches, waits, copies, layouts and casts of steps and predictions, into `traced/launches.json`."""
    path = RESULTS / "traced" / "launches.json"
    content = json.loads(path.read_text())
    content["command"] = "python -m tests.earlier launches"
    found: dict[str, dict[str, Any]] = {}
    for earlier, module in ((True, "tests.earlier.trace"), (False, "tests.fake_cuda.trace")):
        done = python("-m", module, *CASES, earlier=earlier)
        if done.returncode:
            raise SystemExit(plain(done.stderr[-2000:]))
        for case, one in json.loads(done.stdout).items():
            kept = {key: one[key] for key in ("launches", "waits", "copies", "layouts", "casts")}
            found.setdefault(case, {})["before" if earlier else "now"] = kept
    content["networks"] = found
    write("traced/launches.json", content)


def host_time(networks: Sequence[str], repeats: int) -> None:
    """Python calls, Triton launches and microseconds of the host, one network after the other, before and now."""
    content: dict[str, Any] = {
        "what": "predicted for the host of a GPU: measured on this machine's processor with a driver that launches "
        "nothing, 64 px, batch 2 (inference 1), bf16, kernels of large maps, every block fused",
        "command": f"python -m tests.earlier host-time --repeats {repeats}",
        "before": COMMIT,
        "load": round(os.getloadavg()[0], 1),
        "networks": {},
    }
    for network in networks or NETWORKS:
        for earlier in (True, False):
            module = "tests.earlier.host_time" if earlier else "tests.fake_cuda.host_time"
            done = python("-m", module, network, "--repeats", str(repeats), "--json", earlier=earlier)
            if done.returncode:
                raise SystemExit(plain(done.stderr[-2000:]))
            for what, numbers in json.loads(done.stdout)[network].items():
                case = content["networks"].setdefault(f"{network} {what}", {})
                case["before" if earlier else "now"] = numbers
                print(network, what, "before" if earlier else "now", numbers, flush=True)
        write("traced/host_time.json", content)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.earlier", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("before", "now", "launches", "host-time"))
    parser.add_argument("names", nargs="*", help="of checks (before, now) or networks (host-time); default all")
    parser.add_argument(
        "--repeats", type=int, default=30, metavar="N", help="timed runs of host-time, the least counts"
    )
    arguments = parser.parse_args()
    if arguments.what != "now":
        tree()
    if arguments.what == "before":
        checks_before(arguments.names)
    elif arguments.what == "now":
        checks_now(arguments.names)
    elif arguments.what == "launches":
        launches()
    else:
        host_time(arguments.names, arguments.repeats)


if __name__ == "__main__":
    main()
