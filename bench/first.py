"""The comparison that a user asks for first: one network, eager against fused, with speed, memory and equality."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from yolov9_fast._lazy import require
from yolov9_fast.models.graph import load_graph
from yolov9_fast.ops._operator import operators

from . import counting
from .cases import PHASES, NoClock
from .check import judge, relative_error
from .machine import device_slug
from .measure import timed_phases
from .networks import Inference, TrainingStep, fixed_batch, resident_batch
from .stats import ratio_of_medians, summarise


@dataclass
class Side:
    """One provider: its step and inference, and what was measured of them."""

    name: str
    step: TrainingStep
    inference: Inference
    samples: dict[str, list[float]] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    results: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def compare_first(
    model: str, image_size: int, batch: int, device: torch.device, *, compiled: bool = False, seconds: float = 60.0
) -> tuple[str, bool]:
    """(the table as text, whether the results agree).

    Args:
        seconds: time for the timed rounds; at least three and at most fifteen are made.
    """
    load_graph(model)  # an unknown name is one clear error, before any bar is drawn
    images, _ = fixed_batch(image_size, batch)
    tqdm = require("tqdm").tqdm
    with tqdm(total=100, desc=f"{model} {image_size} px, batch {batch}", unit="%", leave=False) as bar:
        sides = _sides(model, image_size, batch, device, images, compiled)
        bar.update(5)
        exact = _judge(sides, model, image_size, batch, images, bar)
        wrong = {side.name: reason for side in sides if (reason := _wrong(side, sides[0], exact))}
        right = [side for side in sides if side.name not in wrong]
        _rounds(right, device, seconds, bar, 60)
        for side in right:
            for what, work in _works(side).items():
                side.peak[what] = counting.count(lambda work=work: work(NoClock()), device).peak_bytes  # type: ignore[misc]
        bar.update(100 - bar.n)
    head = f"{model}, {image_size} px, batch {batch}, float32, {device_slug(device)}, torch {torch.__version__}, "
    head += f"{torch.get_num_threads()} threads"
    return "\n".join([head, "", *_table(sides, right, wrong, exact, batch), "", *_notes(sides, wrong)]), not wrong


def _sides(model: str, size: int, batch: int, device: torch.device, images: Tensor, compiled: bool) -> list[Side]:
    batches = resident_batch(size, batch, device) if device.type == "cuda" else None

    def side(name: str, layout: str, backend: str, mode: str | None = None) -> Side:
        options: Any = {"layout": layout, "backend_name": backend, "compile_mode": mode, "batches": batches}
        step = TrainingStep(model, size, batch, device, **options)
        inference = Inference(model, images, device, "float32", layout, backend)
        if mode is not None:
            inference.network = torch.compile(inference.model, dynamic=False)
        return Side(name, step, inference)

    sides = [side("eager", "nchw", "eager"), side("eager, channels_last", "channels_last", "eager")]
    sides.append(side("fused", "channels_last", "auto"))
    return [*sides, side("torch.compile", "channels_last", "eager", "default")] if compiled else sides


def _works(side: Side) -> dict[str, Callable[[Any], Any]]:
    return {"step": side.step, "inference": side.inference}


def _judge(
    sides: list[Side], model: str, size: int, batch: int, images: Tensor, bar: Any
) -> dict[str, dict[str, Tensor]]:
    """Results of every side; returns those in float64 where that takes seconds."""
    for side in sides:
        side.results = {"step": side.step.results(), "inference": side.inference.results()}
        bar.update(5)
    if size * size * batch > 320 * 320 * 8 or not model.endswith(("-t", "-s")):
        return {}
    device = sides[0].step.device
    exact = {
        "step": TrainingStep(model, size, batch, device, dtype="float64").results(),
        "inference": Inference(model, images, device, "float64", "nchw", "eager").results(),
    }
    bar.update(10)
    return exact


def _wrong(side: Side, baseline: Side, exact: dict[str, dict[str, Tensor]]) -> str | None:
    for what, results in side.results.items():
        _, reason = judge("network", results, baseline.results[what], exact.get(what))
        if reason is not None:
            return f"{what}: {reason}"
    return None


def _rounds(sides: list[Side], device: torch.device, seconds: float, bar: Any, share: float) -> None:
    for side in sides:
        for work in _works(side).values():
            work(NoClock())
    end = time.perf_counter() + seconds
    begun = time.perf_counter()
    start = bar.n
    for number in range(15):
        if number >= 3 and time.perf_counter() > end:
            break
        for side in sides if number % 2 else sides[::-1]:
            for what, work in _works(side).items():
                whole, phases, _ = timed_phases(work, device)
                for phase, value in phases.items():
                    side.samples.setdefault(f"{what} {phase}", []).append(value)
                side.samples.setdefault(what, []).append(whole)
        progress = max((number + 1) / 15, (time.perf_counter() - begun) / seconds)
        bar.update(int(min(start + share * min(progress, 1.0), 95)) - bar.n)


def _table(
    sides: list[Side], right: list[Side], wrong: dict[str, str], exact: dict[str, dict[str, Tensor]], batch: int
) -> list[str]:
    rows: list[list[str]] = [["", *(side.name for side in sides)]]

    def row(label: str, cell: Callable[[Side], str]) -> None:
        rows.append([label, *(cell(side) if side in right else "no speed" for side in sides)])

    def timing(key: str) -> Callable[[Side], str]:
        def cell(side: Side) -> str:
            one = summarise(side.samples[key])
            return f"{1e3 * one.median:.1f} [{1e3 * one.p20:.1f}, {1e3 * one.p80:.1f}]"

        return cell

    def speedup(key: str) -> Callable[[Side], str]:
        def cell(side: Side) -> str:
            if side is sides[0]:
                return "1"
            return ratio_of_medians(sides[0].samples[key], side.samples[key], paired=True).text()

        return cell

    row("training step, ms", timing("step"))
    for phase in PHASES:
        row(f"  {phase}", timing(f"step {phase}"))
    row("  images/s", lambda side: f"{batch / summarise(side.samples['step']).median:.1f}")
    row("  times eager", speedup("step"))
    row("  peak memory, MB", lambda side: f"{side.peak['step'] / 1e6:.0f}")
    row("inference with NMS, ms", timing("inference"))
    row("  images/s", lambda side: f"{batch / summarise(side.samples['inference']).median:.1f}")
    row("  times eager", speedup("inference"))
    row("  peak memory, MB", lambda side: f"{side.peak['inference'] / 1e6:.0f}")
    against = "float64" if exact else "eager"
    for label, what, name in (
        ("loss", "step", "loss"),
        ("gradients", "step", "gradient"),
        ("predictions", "inference", "output"),
    ):
        expected = (exact or sides[0].results)[what][name]
        cells = [f"{relative_error(side.results[what][name], expected):.1e}" for side in sides]
        rows.append([f"{label}, error against {against}", *cells])
    rows.append(["equal within rounding", *("no" if side.name in wrong else "yes" for side in sides)])
    return aligned(rows)


def aligned(rows: list[list[str]]) -> list[str]:
    """Columns of text: the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _notes(sides: list[Side], wrong: dict[str, str]) -> list[str]:
    lines = ["median [20th, 80th percentile]; times eager: ratio of medians [95 % interval], sides timed in turns"]
    lines.append("fused runs on: " + ", ".join(f"{name} {backend}" for name, backend in running(sides[0].step.device)))
    lines.extend(f"{name}: WRONG RESULT, {reason}" for name, reason in wrong.items())
    return lines


def running(device: torch.device) -> list[tuple[str, str]]:
    """(operator, the backend that `auto` takes first on this device)."""
    return [(operator.name, operator.first(device)) for operator in operators.values()]
