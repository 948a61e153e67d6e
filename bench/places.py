"""Where the time of a step or of inference goes: kernels by kind and shape, and what bounds each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .cases import Case, Clock, NoClock, OpenCase, Settings
from .counting import COPIES, quiet_stderr
from .machine import Ceilings
from .networks import Inference, TrainingStep, fixed_batch, resident_batch

_SHOWN = 12
_ITEM = 4


def place_cases(settings: Settings, device: torch.device) -> Iterator[Case]:
    networks = ("yolov9-t", "yolov9-c") if settings.full else ("yolov9-t",)
    for name in networks:
        size = 640 if device.type == "cuda" else 320
        batch = {"cuda": 16}.get(device.type, 8 if name == "yolov9-t" else 2)
        for mode in ("step", "infer"):
            yield Case(
                f"places/{mode}/{name}/{size}px/b{batch}",
                "places",
                "training step" if mode == "step" else "inference",
                f"{name}@{size}",
                mode,
                "float32",
                {"image_size": size, "batch": batch},
                _nothing,
            )


def _nothing(device: torch.device, settings: Settings) -> OpenCase:
    raise RuntimeError("places are profiled, not timed")


def profile_places(case: Case, device: torch.device, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """Contents of `measure` records, one per provider: the `places` of the case, longest first."""
    name = case.network.split("@")[0]
    size, batch = case.shape["image_size"], case.shape["batch"]
    for provider, layout in (("eager", "nchw"), ("auto", "channels_last")):
        work: Callable[[Clock], Any]
        if case.mode == "step":
            batches = resident_batch(size, batch, device) if device.type == "cuda" else None
            work = TrainingStep(name, size, batch, device, layout=layout, backend_name=provider, batches=batches)
        else:
            work = Inference(name, fixed_batch(size, batch)[0], device, "float32", layout, provider)
        rows, total = _profiled(work, device, ceilings)
        yield {
            "kind": "measure",
            "case": case.name,
            "family": "places",
            "subject": case.subject,
            "network": case.network,
            "mode": case.mode,
            "dtype": case.dtype,
            "shape": case.shape,
            "count": 1,
            "provider": provider,
            "layout": layout,
            "profiled_seconds": total,
            "places": rows,
        }


def _profiled(
    work: Callable[[Clock], Any], device: torch.device, ceilings: Ceilings
) -> tuple[list[dict[str, Any]], float]:
    clock = NoClock()
    for _ in range(2):
        work(clock)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with quiet_stderr(), profile(activities=activities, record_shapes=True, with_flops=True) as profiler:
        work(clock)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return _longest(profiler.events(), device, ceilings)


@dataclass
class _Place:
    """All kernels of one name and shapes of inputs."""

    name: str
    shapes: list[list[int]]
    calls: int = 0
    seconds: float = 0.0
    operations: float = 0.0


def _longest(events: Any, device: torch.device, ceilings: Ceilings) -> tuple[list[dict[str, Any]], float]:
    found: dict[tuple[str, str], _Place] = {}
    for event in events:
        # On a GPU an operator's own time is that of the kernels it launched.
        time_us = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if "::" not in event.name or time_us <= 0:
            continue
        shapes = [list(s) for s in (event.input_shapes or []) if s and all(isinstance(n, int) for n in s)]
        place = found.setdefault((event.name, str(shapes)), _Place(event.name, shapes))
        place.calls += 1
        place.seconds += time_us / 1e6
        place.operations += _operations(event, shapes)
    total = sum(place.seconds for place in found.values())
    longest = sorted(found.values(), key=lambda place: -place.seconds)[:_SHOWN]
    return [_described(place, total, ceilings) for place in longest], total


def _operations(event: Any, shapes: list[list[int]]) -> float:
    """Operations of one call: the profiler's count, which hangs on the outermost call, or by the shapes of inputs."""
    planes = [shape for shape in shapes if len(shape) == 4]
    if "convolution_backward" in event.name and len(planes) >= 3:
        gradient, _, weight = planes[:3]
        return 2 * 2.0 * gradient[0] * gradient[2] * gradient[3] * math.prod(weight)
    while event is not None:
        if event.flops:
            return float(event.flops)
        event = event.cpu_parent
    return 0.0


def _described(place: _Place, total: float, ceilings: Ceilings) -> dict[str, Any]:
    shapes = place.shapes
    moved = place.calls * _ITEM * (sum(math.prod(s) for s in shapes) + max((math.prod(s) for s in shapes), default=0))
    row = {
        "name": place.name,
        "shapes": shapes[:4],
        "calls": place.calls,
        "seconds": place.seconds,
        "part": place.seconds / total,
    }
    if not moved:  # arguments that are lists of tensors have no recorded shapes
        return row | {"bound": "memory" if place.name in COPIES else "latency"}
    memory = moved / ceilings.bandwidth_at(moved / place.calls)
    arithmetic = place.operations / ceilings.matrix["float32"] if place.operations else 0.0
    limit = max(memory, arithmetic)
    # Far from both limits it is neither bytes nor products, but the number and size of calls, or an algorithm.
    bound = "latency" if limit < 0.1 * place.seconds else "memory" if memory >= arithmetic else "arithmetic"
    return row | {"bytes": moved, "operations": place.operations, "share": limit / place.seconds, "bound": bound}
