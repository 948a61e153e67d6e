"""Runs fuzz targets in child processes with limits of memory and time, and reports what they found.

A target is a function of one argument, a `Case`, from which it draws its input with hypothesis' strategies. It returns
where the input was handled as it should be and raises (`AssertionError`, or whatever the code under test lets out)
where not. Targets live in the modules `tests/fuzz/targets_*.py`:

    @target("yaml", memory_mib=256, case_seconds=5)
    def yaml(case: Case) -> None:
        text = case.draw(st.binary(max_size=1000), "text")
        ...

`python -m tests.fuzz` runs them; `tests/fuzz/test_targets.py` runs all of them as tests marked `slow`.
"""

from __future__ import annotations

import faulthandler
import importlib
import itertools
import json
import os
import pkgutil
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

import hypothesis
from hypothesis import strategies as st

from csrc import on_host

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0
"""How long the imports of a child may take, and the last case after the end of its time."""
_LONGEST_TEXT = 4000
_CASES_OF_ONE_SEED = 500
_MIB = 2**20
T = TypeVar("T")


class Case:
    """One input. What is drawn is written to `record` at once, so that it is known after a crash of the process."""

    def __init__(self, data: st.DataObject, record: IO[bytes]) -> None:
        self._data, self._record = data, record

    def draw(self, strategy: st.SearchStrategy[T], name: str) -> T:
        value = self._data.draw(strategy)
        self._record.write(f"{name} = {value!r}\n".encode(errors="backslashreplace"))
        return value


@dataclass(frozen=True)
class Target:
    """A registered target.

    `memory_mib`: address space that its process may take in addition to what it has after its imports.
    `case_seconds`: what one case may take.
    `prepare()` runs before the first case, in each child, and once before them: what it compiles is compiled then.
    """

    name: str
    function: Callable[[Case], None]
    memory_mib: int
    case_seconds: float
    prepare: Callable[[], None]


TARGETS: dict[str, Target] = {}
"""By name, of the modules imported so far; `load_all` imports the rest."""


def target(
    name: str, *, memory_mib: int = 1024, case_seconds: float = 10.0, prepare: Callable[[], None] = lambda: None
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Register the decorated function as target `name`, see `Target`."""

    def register(function: Callable[[Case], None]) -> Callable[[Case], None]:
        if name in TARGETS:
            raise ValueError(f"name: expected a new target, got {name!r}")
        TARGETS[name] = Target(name, function, memory_mib, case_seconds, prepare)
        return function

    return register


def load_all() -> dict[str, Target]:
    """The targets of all modules `tests/fuzz/targets_*.py`."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith("targets_"):
            importlib.import_module(f"tests.fuzz.{module.name}")
    return TARGETS


@dataclass
class Report:
    """What the runs of one target gave.

    `crashes`: ends of the process (signals, a case over its time or memory); `failures`: exceptions of cases. Each with
    what was drawn. `memory_mib`: the limit. `peak_rss_mib`: the most that a process had resident; after its imports
    it had `start_rss_mib`. `launches`: of CUDA kernels that the host ran.
    """

    target: str
    seed: int
    seconds: float = 0.0
    cases: int = 0
    slowest_case_s: float = 0.0
    peak_rss_mib: int = 0
    start_rss_mib: int = 0
    memory_mib: int = 0
    case_seconds: float = 0.0
    launches: int = 0
    crashes: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return self.cases > 0 and not self.crashes and not self.failures


def run(wanted: Target, seconds: float, seed: int = 0) -> Report:
    """Run a target for `seconds` in child processes; after a crash another one goes on with another seed."""
    wanted.prepare()
    report = Report(wanted.name, seed, memory_mib=wanted.memory_mib, case_seconds=wanted.case_seconds)
    end = time.monotonic() + seconds
    begun = False
    while (remaining := end - time.monotonic()) > 0 or not begun:
        begun = True
        _run_child(wanted, max(remaining, 0.0), seed, report)
        seed += 1_000_003
        if len(report.crashes) > 20:
            break
    report.seconds = round(seconds - (end - time.monotonic()), 1)
    return report


def to_json(reports: list[Report]) -> str:
    return json.dumps([asdict(report) for report in reports], indent=1)


# ---- the parent's side


def _run_child(wanted: Target, seconds: float, seed: int, report: Report) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
        module = wanted.function.__module__
        arguments = ["--child", module, folder, "--seconds", str(seconds), "--seed", str(seed), wanted.name]
        with Path(folder, "stderr").open("wb") as stderr:
            child = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz", *arguments],
                cwd=ROOT,
                stdout=stderr,
                stderr=stderr,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
                    "TMPDIR": folder,  # the child removes nothing: it may end at any moment
                    "OPENCV_TEMP_PATH": folder,
                },
            )
            try:
                code = child.wait(seconds + wanted.case_seconds + START_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                code = child.wait()
        _add(report, Path(folder), code, seed)


def _add(report: Report, folder: Path, code: int, seed: int) -> None:
    done = folder / "report.json"
    if done.exists():
        found = json.loads(done.read_text())
        report.cases += found["cases"]
        report.slowest_case_s = max(report.slowest_case_s, found["slowest_case_s"])
        report.peak_rss_mib = max(report.peak_rss_mib, found["peak_rss_mib"])
        report.start_rss_mib = found["start_rss_mib"]
        report.launches += found["launches"]
        report.failures += found["failures"]
    if code == 0 and done.exists():
        return
    record = _text(folder / "case")
    first, _, drawn = record.partition("\n")
    if first and not done.exists():
        report.cases += int(first.split()[0])
        report.slowest_case_s = max(report.slowest_case_s, float(first.split()[1]))
    stderr = _text(folder / "stderr")
    crash = {"exit": code, "seed": seed, "drawn": drawn[:_LONGEST_TEXT], "stderr": stderr[-_LONGEST_TEXT:]}
    if "Timeout (" in stderr:
        crash["over_time_s"] = report.case_seconds
    report.crashes.append(crash)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


# ---- the child's side


class _Runner:
    """Runs cases and keeps the counts. `fails`: by place, the last failure, which is the smallest that was found."""

    def __init__(self, wanted: Target, seconds: float, folder: Path) -> None:
        self.wanted, self.folder = wanted, folder
        self.record = (folder / "case").open("wb+", buffering=0)
        self.end = time.monotonic() + seconds
        self.start_rss = _status("VmHWM") // _MIB
        self.cases, self.slowest = 0, 0.0
        self.fails: dict[str, dict[str, Any]] = {}

    def case(self, data: st.DataObject) -> None:
        if self.cases and time.monotonic() > self.end:
            self.finish()
        self.record.seek(0)
        self.record.truncate()
        self.record.write(f"{self.cases} {self.slowest:.3f}\n".encode())
        started = time.monotonic()
        try:
            with _time_limit(self.wanted.case_seconds):
                self.wanted.function(Case(data, self.record))
        except Exception as error:
            # hypothesis' own exceptions steer it: a draw that was rejected, the end of its buffer
            if not type(error).__module__.startswith("hypothesis."):
                self._note(error)
            raise
        finally:
            self.cases += 1
            self.slowest = max(self.slowest, time.monotonic() - started)

    def _note(self, error: Exception) -> None:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(ROOT))]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        self.record.seek(0)
        self.fails[f"{type(error).__name__} {place}"] = {
            "error": f"{type(error).__name__}: {error}"[:_LONGEST_TEXT],
            "traceback": "".join(traceback.format_exception(error))[-_LONGEST_TEXT:],
            "drawn": self.record.read().decode().partition("\n")[2][:_LONGEST_TEXT],
        }

    def finish(self) -> NoReturn:
        report = {
            "cases": self.cases,
            "slowest_case_s": round(self.slowest, 3),
            "peak_rss_mib": _status("VmHWM") // _MIB,
            "start_rss_mib": self.start_rss,
            "launches": len(on_host.take_launches()),
            "failures": list(self.fails.values()),
        }
        (self.folder / "report.json").write_text(json.dumps(report))
        sys.stdout.flush()
        # An exception would have to pass hypothesis, and the interpreter's own end may need more than the limit.
        os._exit(0)


class _time_limit:
    """Ends the process with a traceback when the block takes longer, also inside compiled code that holds the GIL."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        faulthandler.dump_traceback_later(self.seconds, exit=True)

    def __exit__(self, *ignored: object) -> None:
        faulthandler.cancel_dump_traceback_later()


def child(module: str, name: str, folder: str, seconds: float, seed: int) -> NoReturn:
    """The child process: runs target `name` of `module` and writes report.json to `folder`."""
    faulthandler.enable()
    importlib.import_module(module)
    wanted = TARGETS[name]
    wanted.prepare()
    runner = _Runner(wanted, seconds, Path(folder))
    limit = _status("VmSize") + wanted.memory_mib * _MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in itertools.count(seed):
        _one_seed(runner, number)
    raise AssertionError("the runner ends the process")


def _one_seed(runner: _Runner, seed: int) -> None:
    """Some hundred cases; a failure ends them once it is reduced to a small case. The caller goes on with the next."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=_CASES_OF_ONE_SEED,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        report_multiple_bugs=False,
        verbosity=hypothesis.Verbosity.quiet,
    )
    @hypothesis.given(st.data())
    def cases(data: st.DataObject) -> None:
        runner.case(data)

    try:
        cases()
    except Exception as error:
        if not runner.fails:  # an error of hypothesis itself, such as a draw without an end
            runner._note(error)


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status. `getrusage` would give the parent's peak too."""
    found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024
