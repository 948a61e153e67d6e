"""A run of the suite: which cases, in which order, within which time, recorded as they finish."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from yolov9_fast.errors import UserError
from yolov9_fast.ops._operator import operators

from . import blocks, detection, machine, networks, places, updates
from . import operators as operator_table
from .cases import FAMILIES, Case, Settings
from .machine import Ceilings
from .measure import measure
from .progress import progress
from .records import Record, Recorder, read, results_folder, run_name

_SECONDS = {"ops": 0.25, "blocks": 0.3, "loss": 0.4, "nms": 0.4, "step": 8.0, "infer": 2.0, "data": 2.0, "places": 0.0}
_ROUNDS = {"step": (3, 9), "infer": (3, 15)}
# The part of the budget that a family may use while others wait.
_PART = {
    "ops": 0.34,
    "blocks": 0.12,
    "loss": 0.12,
    "nms": 0.06,
    "step": 0.22,
    "infer": 0.26,
    "data": 0.02,
    "places": 0.1,
}


def all_cases(settings: Settings, device: torch.device, only: Sequence[str]) -> list[Case]:
    """The cases of the chosen families, each family's most important first."""
    unknown = set(only) - set(FAMILIES)
    if unknown:
        raise UserError(f"--only: unknown {', '.join(sorted(unknown))}; choose from {', '.join(FAMILIES)}")
    dtypes = ("float32", "bfloat16") if settings.full and device.type == "cuda" else ("float32",)
    amp = ("bfloat16", "float32") if device.type == "cuda" else ("float32",)
    makers: dict[str, Any] = {
        "ops": lambda: [*operator_table.operator_cases(settings, dtypes), *updates.update_cases(settings)],
        "blocks": lambda: blocks.block_cases(settings, amp[:1]),
        "loss": lambda: [c for c in detection.detection_cases(settings, dtypes) if c.family == "loss"],
        "nms": lambda: [c for c in detection.detection_cases(settings, dtypes) if c.family == "nms"],
        "step": lambda: networks.step_cases(settings, amp, device),
        "infer": lambda: networks.infer_cases(settings, amp, device),
        "data": lambda: networks.data_cases(settings),
        "places": lambda: places.place_cases(settings, device),
    }
    return [case for family in FAMILIES if family in only for case in in_order(makers[family]())]


def in_order(cases: Iterable[Case]) -> list[Case]:
    """By priority, and within one the operators in turns, so that a short budget has something of each."""
    taken: dict[tuple[int, str], int] = {}
    keyed: list[tuple[int, int, int, Case]] = []
    for case in cases:
        turn = taken[case.priority, case.subject] = taken.get((case.priority, case.subject), 0) + 1
        keyed.append((case.priority, turn, len(keyed), case))
    return [entry[-1] for entry in sorted(keyed, key=lambda entry: entry[:3])]


def run_suite(
    settings: Settings,
    device: torch.device,
    *,
    only: Sequence[str] = FAMILIES,
    match: str = "",
    budget: float | None = None,
    out: Path | None = None,
    run: str | None = None,
) -> Path:
    """Measure and record; returns the file.

    Args:
        only: families.
        match: measure cases whose name contains this.
        budget: seconds for all; cases that do not fit are recorded as absent.
        out: folder of records, below which the device has its own.
        run: name of the run; one that exists is continued: cases it holds are not measured again.
    """
    cases = [case for case in all_cases(settings, device, only) if match in case.name]
    if not cases:
        raise UserError(f"no case of {', '.join(only)} has {match!r} in its name")
    environment = machine.environment(device)
    name = run or run_name(environment["commit"])
    path: Path = (out or results_folder()) / environment["device"] / f"{name}.jsonl"
    before = read(path) if path.is_file() and path.stat().st_size else []
    done = {record["case"] for record in before if record["kind"] == "measure"}
    recorder = Recorder(path, name)
    recorder.write("run", command=machine.program_line(), environment=environment, operators=sorted(operators))
    # Measured again in a continued run: what it measures is judged by the ceilings of its own time.
    ceilings = machine.measure_ceilings(device)
    recorder.write("ceilings", **ceilings.as_dict())
    waiting = [case for case in cases if case.name not in done]
    _run_cases(waiting, device, settings, ceilings, recorder, budget)
    recorder.write("run", command="end", environment={"clocks": machine.clocks(device)})
    return path


def _run_cases(
    cases: list[Case],
    device: torch.device,
    settings: Settings,
    ceilings: Ceilings,
    recorder: Recorder,
    budget: float | None,
) -> None:
    allowed = _allowances({case.family for case in cases}, budget)
    started = time.perf_counter()
    told: set[tuple[str, ...]] = set()
    for case in progress(cases, lambda case: case.name):
        begin = time.perf_counter()
        if budget is not None and (allowed[case.family] <= 0 or begin - started > budget):
            reason = f"the run's budget of {budget / 60:.0f} minutes was spent"
            recorder.write("absent", case=case.name, family=case.family, provider="all", layout="", reason=reason)
            continue
        _run_case(case, device, settings, ceilings, recorder, told)
        allowed[case.family] -= time.perf_counter() - begin


def _allowances(families: set[str], budget: float | None) -> dict[str, float]:
    """Seconds per family: its part of the budget, grown where other families are not asked for."""
    if budget is None:
        return dict.fromkeys(families, float("inf"))
    whole = sum(_PART[family] for family in families)
    return {family: budget * _PART[family] / whole for family in families}


def _run_case(
    case: Case,
    device: torch.device,
    settings: Settings,
    ceilings: Ceilings,
    recorder: Recorder,
    told: set[tuple[str, ...]],
) -> None:
    own = replace(settings, seconds=_SECONDS[case.family], rounds=_ROUNDS.get(case.family, settings.rounds))
    contents = (
        places.profile_places(case, device, ceilings)
        if case.family == "places"
        else measure(case, device, own, ceilings)
    )
    try:
        for content in contents:
            kind = content.pop("kind")
            if kind == "absent" and not content.get("wrong"):
                # What is missing is missing for every shape: once per operator is enough.
                what = (content["subject"], content["provider"], content["layout"], content["reason"])
                if what in told:
                    continue
                told.add(what)
            recorder.write(kind, **content)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # One case that does not fit this machine must not take the others' results with it.
        reason = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        recorder.write("absent", case=case.name, family=case.family, provider="all", layout="", reason=reason)


def summary(records: Sequence[Record]) -> str:
    """The speeds of a run as text, one line per measurement."""
    lines = []
    for record in records:
        if record["kind"] != "measure" or "median" not in record:
            continue
        speedup = record.get("speedup")
        ratio = f"{speedup['value']:6.2f}x [{speedup['low']:.2f}, {speedup['high']:.2f}]" if speedup else "baseline"
        share = f"{record['share']:6.1%} of limit" if "share" in record else ""
        what = f"{record['provider']} {record['layout']}"
        lines.append(
            f"{record['case']:<60} {what:<22} {1e3 * record['median']:10.4f} ms  {ratio:<24} {share}"
            f"  error {record['error']:.1e}"
        )
    wrong = [f"{r['case']} {r['provider']}: {r['reason']}" for r in records if r.get("wrong")]
    return "\n".join([*lines, *(f"WRONG RESULT, no speed: {line}" for line in wrong)])
