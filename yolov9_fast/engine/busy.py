"""Sharing the cores with other processes, without a cost where there are none.

OpenMP's threads meet at the end of every parallel region, hundreds of times in a training step. The one that comes
first spins, for milliseconds: where a core is shared, it spins through the time in which the thread that it waits for
could run, so that each region may cost a time slice. `share_cores` watches for that and acts only while it happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from yolov9_fast.errors import UserError

log = logging.getLogger("yolov9_fast.busy")

VARIABLE = "YOLOV9_FAST_BUSY"
WAYS = {
    "waits": "while other processes compute, OpenMP's threads sleep instead of spinning; results are the same",
    "threads": "while other processes compute, as many threads as there are free cores, at least one; the last bits of "
    "results may differ",
    "off": "nothing is done",
}
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which users say how OpenMP's threads wait."""
INTERVAL = 0.5
"""Seconds between two looks."""
_WAITING = 0.15
"""Share of the time in which a thread wants a core and waits for it, from which the machine counts as busy."""
_OTHERS = 0.25
"""Cores' worth of other computation that is not taken for a busy machine."""
_QUIET_LOOKS = 3


@dataclass(frozen=True)
class Policy:
    """What is done on a busy machine: a name of `WAYS`, and why."""

    way: str
    why: str


def busy_policy(environment: Mapping[str, str], *, default: str = "waits", observable: bool = True) -> Policy:
    """The policy in this environment.

    Args:
        default: where `YOLOV9_FAST_BUSY` is not set.
        observable: whether the system tells how long threads wait for a core.

    Raises:
        UserError: `YOLOV9_FAST_BUSY` is not a name of `WAYS`.
    """
    asked = environment.get(VARIABLE, "").strip().lower()
    if asked and asked not in WAYS:
        raise UserError(f"{VARIABLE}: expected one of {', '.join(WAYS)}, got {environment[VARIABLE]!r}")
    way = asked or default
    if way == "off":
        return Policy("off", f"{VARIABLE}=off")
    if not observable:
        return Policy("off", "this system does not tell how long threads wait (no /proc/self/schedstat)")
    chosen = [name for name in SETTINGS if environment.get(name)]
    if way == "waits" and chosen:
        return Policy("off", f"{chosen[0]}={environment[chosen[0]]} is set")
    if environment.get("OMP_NUM_THREADS") == "1":
        return Policy("off", "OMP_NUM_THREADS=1: one thread waits for no other")
    return Policy(way, f"{VARIABLE}={way}" if asked else "the default")


def observable() -> bool:
    """Whether the system tells how long threads wait for a core (Linux)."""
    return Path("/proc/self/schedstat").exists()


@dataclass(frozen=True)
class Usage:
    """How the cores were used over a while, in seconds.

    Attributes:
        wall: its length.
        ran, waited: this process's threads, summed: on a core; ready, but without one.
        others: what other processes computed on the cores that this one may use.
        cores: the number of these.
    """

    wall: float
    ran: float
    waited: float
    others: float
    cores: int


class Watch:
    """Decides from one `Usage` after another whether the machine is busy.

    It is from the first in which the threads waited for other processes, and until there is a core for each of
    `threads` three times in a row.
    """

    def __init__(self) -> None:
        self.busy = False
        self._quiet = 0

    def look(self, usage: Usage, threads: int) -> bool:
        """Whether the machine is busy for a process of so many threads."""
        wanted = usage.ran + usage.waited
        others = usage.others / usage.wall
        if not self.busy:
            self.busy = usage.waited > _WAITING * wanted and wanted > 0.1 * usage.wall and others > _OTHERS
            self._quiet = 0
        else:
            self._quiet = self._quiet + 1 if others + threads <= usage.cores + _OTHERS else 0
            self.busy = self._quiet < _QUIET_LOOKS
        return self.busy


def threads_beside(usage: Usage, threads: int) -> int:
    """The number of threads, of at most `threads`, for which others leave a core; at least 1."""
    return max(1, min(threads, int(usage.cores - usage.others / usage.wall + _OTHERS)))


class _Meter:
    """Gives the `Usage` since the last call."""

    def __init__(self) -> None:
        self._cores = os.sched_getaffinity(0)
        self._before = self._read()

    def __call__(self) -> Usage:
        before, now = self._before, self._read()
        self._before = now
        known = now[3].keys() & before[3].keys()  # threads begin and end
        ran, waited = (sum(now[3][task][i] - before[3][task][i] for task in known) / 1e9 for i in (0, 1))
        wall, own, busy = now[0] - before[0], now[1] - before[1], now[2] - before[2]
        return Usage(max(wall, 1e-3), ran, waited, max(0.0, busy - own), len(self._cores))

    def _read(self) -> tuple[float, float, float, dict[str, tuple[int, int]]]:
        """Wall clock, this process's time and all processes' time on the cores; of each thread, ns run and waited."""
        tasks: dict[str, tuple[int, int]] = {}
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError, ValueError):  # it has ended
                ran, waited, _ = Path(f"/proc/self/task/{task}/schedstat").read_text().split()
                tasks[task] = int(ran), int(waited)
        busy = 0
        for line in Path("/proc/stat").read_text().splitlines():
            name, *numbers = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in self._cores:
                user, nice, system, _, _, irq, softirq = (int(number) for number in numbers[:7])
                busy += user + nice + system + irq + softirq
        return time.monotonic(), time.process_time(), busy / os.sysconf("SC_CLK_TCK"), tasks


class IdleTeam:
    """More OpenMP threads than cores, which sleep: so long libgomp's threads spin for 100 tries instead of 300,000.

    That is libgomp's documented rule (`GOMP_SPINCOUNT`), and it looks at each wait. The number of threads that compute
    stays as it is, and so do results. `stop` ends them.
    """

    def __init__(self, paths: list[str]) -> None:
        self._end = threading.Event()
        self._ready = threading.Event()
        self._libraries = [ctypes.CDLL(path) for path in paths]
        self._thread = threading.Thread(target=self._hold, name="sleeping OpenMP threads", daemon=True)
        self._thread.start()
        self._ready.wait(10)

    def _hold(self) -> None:
        for library in self._libraries:
            # The body ignores its argument. libgomp keeps a region's threads for the next one of the same thread.
            body = ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p)
            count = len(os.sched_getaffinity(0)) + 1
            library.GOMP_parallel(body, None, ctypes.c_uint(count), ctypes.c_uint(0))
        self._ready.set()
        self._end.wait()

    def stop(self) -> None:
        """End the threads."""
        self._end.set()
        self._thread.join()


def loaded_libgomp() -> list[str]:
    """Paths of the copies of libgomp that this process has loaded."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line}
    return sorted(path for path in paths if os.path.basename(path).startswith("libgomp") and os.path.exists(path))


_wanted_threads = 0


def _set_threads(_: object) -> int:
    if _wanted_threads:
        sys.modules["torch"].set_num_threads(_wanted_threads)
    return 0


_SET_THREADS = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(_set_threads)


class _Monitor:
    """Looks at the machine from a thread of its own, and acts."""

    def __init__(self, way: str) -> None:
        self._way = way
        self._end = threading.Event()
        self._team: IdleTeam | None = None
        self._threads = 0
        self._said = False
        self._thread = threading.Thread(target=self._run, name="busy machine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        global _wanted_threads
        self._end.set()
        self._thread.join()
        self._restore()
        if _wanted_threads:
            sys.modules["torch"].set_num_threads(_wanted_threads)
            _wanted_threads = 0

    def _run(self) -> None:
        watch = Watch()
        try:
            meter = _Meter()
            while not self._end.wait(INTERVAL):
                torch = sys.modules.get("torch")
                usage = meter()
                if torch is None or not hasattr(torch, "get_num_threads"):
                    continue
                threads = self._threads or torch.get_num_threads()
                was = watch.busy
                if threads > 1 and watch.look(usage, threads) != was:
                    if watch.busy:
                        self._act(usage, threads)
                    else:
                        self._restore()
        except OSError as error:  # a system that hides /proc
            log.debug("the machine cannot be watched: %s", error)

    def _act(self, usage: Usage, threads: int) -> None:
        done = []
        chosen = any(os.environ.get(name) for name in SETTINGS)
        if not chosen and (paths := loaded_libgomp()):
            self._team = IdleTeam(paths)
            done.append("OpenMP's threads sleep instead of spinning")
        if self._way == "threads":
            self._threads = threads
            beside = threads_beside(usage, threads)
            self._let_main_thread_set(beside)
            done.insert(0, f"{beside} of {threads} threads")
        if done and not self._said:
            self._said = True
            log.info(f"other processes compute: {', '.join(done)} until they end ({VARIABLE}=off: never)")

    def _restore(self) -> None:
        if self._team is not None:
            self._team.stop()
            self._team = None
        if self._threads:
            self._let_main_thread_set(self._threads)
            self._threads = 0

    def _let_main_thread_set(self, threads: int) -> None:
        # torch's number of threads is one of the calling thread, so that this one cannot set it for the other.
        global _wanted_threads
        _wanted_threads = threads
        ctypes.pythonapi.Py_AddPendingCall(_SET_THREADS, None)


@contextlib.contextmanager
def share_cores(way: str | None = None) -> Iterator[Policy]:
    """While the block runs, computation on the CPU is slowed down less where other processes compute too.

    A thread looks twice a second how long this process's threads wait for a core. Only while they wait for other
    processes it acts, as `way` says:

    - "waits": OpenMP's threads sleep at once when they wait for each other, instead of spinning first. Results are the
      same. libgomp only (PyTorch's packages for Linux).
    - "threads": also, `torch.set_num_threads` of the main thread to the number of cores that others leave, at least
      one: faster beside many processes, but sums in other orders change the last bits of results.
    - "off": nothing is done.

    Args:
        way: default: the variable `YOLOV9_FAST_BUSY`, or "waits". The commands have it in force.

    Yields:
        The policy: "off" where the user has set how OpenMP's threads wait, or where the system does not tell.

    Raises:
        UserError: `YOLOV9_FAST_BUSY` is not one of these.
        ValueError: `way` is not one of these.
    """
    if way is not None and way not in WAYS:
        raise ValueError(f"way: expected one of {', '.join(WAYS)}, got {way!r}")
    with in_force(
        busy_policy(os.environ if way is None else {**os.environ, VARIABLE: way}, observable=observable())
    ) as policy:
        yield policy


@contextlib.contextmanager
def in_force(policy: Policy) -> Iterator[Policy]:
    """Act by this policy while the block runs."""
    monitor = None if policy.way == "off" else _Monitor(policy.way)
    try:
        yield policy
    finally:
        if monitor is not None:
            monitor.stop()
