"""One case measured: results judged first, then all providers timed in turns, memory and launches counted after.

Interleaving: each round calls every provider once, in a new random order, so that what disturbs the machine
disturbs all of them, and ratios of one round's samples keep their meaning.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

from yolov9_fast.kernels.device_time import DeviceTimer, overwrite

from . import counting
from .cases import Absent, Case, Clock, NoClock, OpenCase, PhaseClock, Runner, Settings, Traffic
from .check import judge
from .machine import Ceilings, synchronise
from .stats import ratio_of_medians, summarise

_LEAST_SAMPLE = 1e-3
_TRIES = 4
_PREEMPTIONS_A_SECOND = 20
_SLOW_SAMPLES = 3
PHASED = ("step", "infer")


@dataclass
class Candidate:
    """A runner whose result was right: repeats within a sample, the most samples, samples in seconds.

    On a GPU `samples` are of the device; `host`: seconds until the last launch was made; `queued`: whether all launches
    of a sample waited when the first began.
    """

    runner: Runner
    error: float
    repeats: int = 1
    most: int = 1000
    disturbed: int = 0
    samples: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    host: list[float] = field(default_factory=list)
    queued: list[bool] = field(default_factory=list)
    timer: DeviceTimer | None = None


def measure(
    case: Case, device: torch.device, settings: Settings, ceilings: Ceilings | None
) -> Iterator[dict[str, Any]]:
    """Contents of the case's records, each with `kind` "measure" or "absent"."""
    opened = case.open(device, settings)
    try:
        yield from _measure(case, opened, device, settings, ceilings)
    finally:
        del opened
        if settings.compile != "none":
            torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(
    case: Case, opened: OpenCase, device: torch.device, settings: Settings, ceilings: Ceilings | None
) -> Iterator[dict[str, Any]]:
    head = {
        "case": case.name,
        "family": case.family,
        "subject": case.subject,
        "network": case.network,
        "mode": case.mode,
        "dtype": case.dtype,
        "shape": case.shape,
        "count": case.count,
    }
    candidates: list[Candidate] = []
    for outcome in judged(opened):
        if isinstance(outcome, Candidate):
            candidates.append(outcome)
        else:
            yield {"kind": "absent", **head, **outcome}
    if not candidates:
        return
    _time(candidates, case.family in PHASED, torch.device("cpu") if case.family == "data" else device, settings)
    baseline = candidates[0]
    for candidate in candidates:
        yield {
            "kind": "measure",
            **head,
            "provider": candidate.runner.provider,
            "layout": candidate.runner.layout,
            **({"note": candidate.runner.note} if candidate.runner.note else {}),
            **_numbers(candidate, baseline),
            **_limits(candidate, opened.traffic, case.dtype, ceilings),
            **({"per_second": opened.items / summarise(candidate.samples).median} if opened.items else {}),
            "error": candidate.error,
            **_counted(candidate, case.family, device),
            **opened.notes,
        }


def judged(opened: OpenCase) -> Iterator[Candidate | dict[str, Any]]:
    """Runners with right results; for the others the contents of their record: the reason, without times."""
    baselines: dict[str, dict[str, Tensor]] = {}
    exact: dict[str, Tensor] | None = None
    for runner, rule in _with_rules(opened):
        if isinstance(runner, Absent):
            yield {"provider": runner.provider, "layout": runner.layout, "reason": runner.reason}
            continue
        where = {"provider": runner.provider, "layout": runner.layout}
        try:
            results = runner.results()
        except Exception as error:  # of any kind: the other providers are measured all the same
            if isinstance(error, torch.OutOfMemoryError):
                gc.collect()
            yield where | {
                "reason": f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            }
            continue
        if not baselines:
            baselines[""] = results
            exact = opened.reference() if opened.reference is not None else None
        eager = runner.provider == "eager"
        # Each memory layout has its own eager form, which sums in another order and is no less right.
        baseline = baselines[""] if eager else baselines.get(runner.layout, baselines[""])
        worst, wrong = judge("rough" if eager and rule == "twice" else rule, results, baseline, exact)
        if eager and wrong is None:
            baselines[runner.layout] = results
        if wrong is not None:
            yield where | {"reason": f"wrong result: {wrong}", "wrong": True, "error": worst}
            continue
        yield Candidate(runner, worst)


def _with_rules(opened: OpenCase) -> Iterator[tuple[Runner | Absent, str]]:
    for runner in opened.runners:
        yield runner, opened.rule
    for runner in opened.peers or ():
        yield runner, "peer"


def calibrate(candidates: list[Candidate], phased: bool, device: torch.device, settings: Settings) -> None:
    """Warm up, and choose how often each candidate repeats within a sample."""
    clock = NoClock()
    cold = device.type == "cuda" and not phased
    hold = overwrite(device) if cold else None
    for candidate in candidates:
        candidate.timer = DeviceTimer(device, hold) if hold is not None else None
        candidate.runner.call(clock)
        synchronise(device)
        start = time.perf_counter()
        candidate.runner.call(clock)
        synchronise(device)
        took = time.perf_counter() - start
        if took > settings.seconds / 2:
            candidate.most = _SLOW_SAMPLES
        candidate.repeats = 1 if phased or cold else max(1, min(1000, int(_LEAST_SAMPLE / max(took, 1e-7))))


def _time(candidates: list[Candidate], phased: bool, device: torch.device, settings: Settings) -> None:
    calibrate(candidates, phased, device, settings)
    least, most = settings.rounds
    end = time.perf_counter() + settings.seconds
    order = list(candidates)
    chance = random.Random(0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(most):
            if done >= least and time.perf_counter() > end:
                break
            chance.shuffle(order)
            for candidate in order:
                if done < candidate.most:
                    sample(candidate, phased, device)
            # Autograd graphs contain cycles, which only the collector frees.
            gc.collect(0)
    finally:
        if collecting:
            gc.enable()
        for candidate in candidates:
            candidate.timer = None  # its memory is none of the case's


def timed_phases(call: Callable[[Clock], Any], device: torch.device) -> tuple[float, dict[str, float], float]:
    """One call: its seconds, those of its phases, and those of the host until its last launch.

    On a GPU an untimed call goes before, not waited for: the launches of the timed one queue behind it, as in a loop.
    """
    if device.type == "cuda":
        call(NoClock())
    clock = PhaseClock(device)
    start = time.perf_counter()
    call(clock)
    host = time.perf_counter() - start
    return clock.stop(), clock.seconds, host


def sample(candidate: Candidate, phased: bool, device: torch.device) -> None:
    """Time one sample and keep it."""
    call = candidate.runner.call
    if phased:
        before = preemptions()
        seconds, phases, host = timed_phases(call, device)
        candidate.samples.append(seconds)
        if device.type == "cuda":
            candidate.host.append(host)
        # Long calls lose a core now and then on any machine; many times a second is another process's doing.
        candidate.disturbed += (preemptions() - before) > _PREEMPTIONS_A_SECOND * max(seconds, 0.1)
        for name, seconds in phases.items():
            candidate.phases.setdefault(name, []).append(seconds)
        return
    none = NoClock()
    if candidate.timer is not None:
        found = candidate.timer(lambda: call(none))
        candidate.samples.append(found.device)
        candidate.host.append(found.host)
        candidate.queued.append(found.queued)
        return
    # A sample during which the system took a core away measures the machine's load: it is taken again.
    for _ in range(_TRIES):
        before = preemptions()
        start = time.perf_counter()
        for _ in range(candidate.repeats):
            call(none)
        seconds = (time.perf_counter() - start) / candidate.repeats
        if preemptions() == before:
            break
    else:
        candidate.disturbed += 1
    candidate.samples.append(seconds)


def preemptions() -> int:
    """How often the system has taken a core away from this process so far (0 where it does not count)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource is not None else 0


def _numbers(candidate: Candidate, baseline: Candidate) -> dict[str, Any]:
    summary = summarise(candidate.samples)
    content: dict[str, Any] = {
        "median": summary.median,
        "p20": summary.p20,
        "p80": summary.p80,
        "samples": candidate.samples,
        "cold_cache": bool(candidate.queued),
        "disturbed": candidate.disturbed,
    }
    if candidate is not baseline:
        paired = len(baseline.samples) == len(candidate.samples)
        ratio = ratio_of_medians(baseline.samples, candidate.samples, paired=paired)
        content["speedup"] = {"value": ratio.value, "low": ratio.low, "high": ratio.high}
    if candidate.host:
        content["host_seconds"] = summarise(candidate.host).median
    if candidate.queued:
        content["queued"] = all(candidate.queued)
    if candidate.phases:
        content["phases"] = {name: summarise(times).median for name, times in candidate.phases.items()}
    return content


def _limits(candidate: Candidate, traffic: Traffic | None, dtype: str, ceilings: Ceilings | None) -> dict[str, Any]:
    if traffic is None:
        return {}
    content: dict[str, Any] = {"bytes": traffic.moved, "operations": traffic.operations}
    if ceilings is not None:
        seconds, bound = ceilings.limit(
            traffic.moved, traffic.operations if traffic.matrix else 0.0, dtype, traffic.footprint
        )
        content |= {"limit_seconds": seconds, "bound": bound, "share": seconds / summarise(candidate.samples).median}
    return content


def _counted(candidate: Candidate, family: str, device: torch.device) -> dict[str, Any]:
    if family in ("data", "places"):
        return {}

    def call() -> Any:
        return candidate.runner.call(NoClock())

    counts = counting.count(call, device)
    content: dict[str, Any] = {
        "launches": counts.kernels,
        "copies": counts.copies,
        "allocations": counts.allocations,
        "peak_bytes": counts.peak_bytes,
    }
    if device.type == "cuda":
        content["kernel_seconds"] = counts.kernel_seconds
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronise(device)
        content["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    elif family in PHASED:
        content["peak_resident_bytes"] = counting.resident_peak(call)
    return content
