"""Plots of a run's records: ratios, roofline, phases of a step, memory, scaling with batch, size and objects."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from yolov9_fast.viz.figure import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, VERMILION, save_figure

from .records import Record, Run

_COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, FAINT, INK)
_FORMATS = (".svg", ".png")


def draw(run: Run, folder: Path) -> list[Path]:
    """All plots for which the run has records, as `DEVICE_NAME.svg` and `.png`."""
    painters: dict[str, tuple[tuple[float, float], Callable[[Any], None] | None]] = {
        "ratio_per_layer": _ratio_per_layer(run),
        "roofline": _roofline(run),
        "step_phases": _phases(run),
        "memory": _memory(run),
        "scaling_batch": _scaling(run, "batch"),
        "scaling_image_size": _scaling(run, "image_size"),
        "scaling_objects": _objects(run),
    }
    written = []
    for name, (size, paint) in painters.items():
        if paint is not None:
            written += [save_figure(folder / f"{run.device}_{name}{suffix}", size, paint) for suffix in _FORMATS]
    return written


def form(record: Record) -> str:
    return f"{record['provider']} {record['layout']}".replace(" nchw", "").strip()


def _forms(records: Sequence[Record]) -> dict[str, str]:
    """Each form's colour, the same in every plot of its kind: eager first."""
    names = sorted({form(r) for r in records}, key=lambda name: (not name.startswith("eager"), name))
    return {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(names)}


Painter = tuple[tuple[float, float], Callable[[Any], None] | None]


def _ratio_per_layer(run: Run) -> Painter:
    """A dot per layer shape and form: eager's time over the form's, by operator, forward and backward."""
    records = [r for r in run.measures if r["family"] == "ops" and r["mode"] == "both" and r.get("speedup")]
    subjects = list(dict.fromkeys(r["subject"] for r in records))
    if not subjects:
        return (1, 1), None
    colours = _forms(records)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for place, subject in enumerate(subjects):
            for number, (name, colour) in enumerate(colours.items()):
                chosen = sorted(
                    (r for r in records if r["subject"] == subject and form(r) == name), key=lambda r: r["bytes"]
                )
                if not chosen:
                    continue
                width = 0.8 / len(colours)
                start = place - 0.4 + number * width
                xs = [start + width * (k + 0.5) / len(chosen) for k in range(len(chosen))]
                ys = [r["speedup"]["value"] for r in chosen]
                bars = [
                    [y - r["speedup"]["low"] for y, r in zip(ys, chosen, strict=True)],
                    [r["speedup"]["high"] - y for y, r in zip(ys, chosen, strict=True)],
                ]
                bars = [[max(b, 0.0) for b in side] for side in bars]
                label = name if place == min(p for p, s in enumerate(subjects) if _has(records, s, name)) else None
                axes.errorbar(xs, ys, yerr=bars, fmt="o", markersize=2.5, linewidth=0.6, color=colour, label=label)
        axes.axhline(1, color=INK, linewidth=1)
        axes.set_yscale("log")
        axes.set_xticks(range(len(subjects)), subjects)
        axes.set(title="Eager's time over the form's own, per layer shape (small to large)", ylabel="times eager")
        axes.legend(ncols=min(4, len(colours)))

    return (11.0, 5.0), paint


def _has(records: Sequence[Record], subject: str, name: str) -> bool:
    return any(r["subject"] == subject and form(r) == name for r in records)


def _roofline(run: Run) -> Painter:
    """Operations per byte against operations per second, under the ceilings of the run."""
    records = [
        r for r in run.measures if r.get("bytes") and r.get("operations") and r["family"] in ("ops", "loss", "nms")
    ]
    if not records or run.ceilings is None:
        return (1, 1), None
    ceilings = run.ceilings
    colours = _forms(records)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        low, high = (edge(r["operations"] / r["bytes"] for r in records) for edge in (min, max))
        xs = [low * (high / low * 4) ** (k / 60) / 2 for k in range(61)]
        top = max(ceilings["matrix"].values()) if ceilings["matrix"] else float("inf")
        top = ceilings["matrix"].get("float32", top)
        for size, speed in (
            ceilings["bandwidth"][0],
            ceilings["bandwidth"][len(ceilings["bandwidth"]) // 2],
            ceilings["bandwidth"][-1],
        ):
            label = f"{speed / 1e9:.0f} GB/s over {size / 2**20:.3g} MiB"
            axes.plot(xs, [min(x * speed, top) for x in xs], linewidth=1, color=FAINT)
            axes.annotate(label, (xs[0], xs[0] * speed), fontsize=7, color=FAINT, va="bottom")
        for name, colour in colours.items():
            chosen = [r for r in records if form(r) == name]
            axes.scatter(
                [r["operations"] / r["bytes"] for r in chosen],
                [r["operations"] / r["median"] for r in chosen],
                s=9,
                color=colour,
                label=name,
                alpha=0.7,
            )
        axes.set(xscale="log", yscale="log", title="Roofline of the operators")
        axes.set(xlabel="operations per byte that must move", ylabel="operations per second")
        axes.legend()

    return (8.6, 5.6), paint


def _phases(run: Run) -> Painter:
    """Stacked bars of a training step's phases."""
    records = [r for r in run.measures if r["family"] == "step" and r.get("phases")]
    if not records:
        return (1, 1), None
    names = list(dict.fromkeys(name for r in records for name in r["phases"]))

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        labels = [f"{r['case'].removeprefix('step/')}\n{form(r)}" for r in records]
        left = [0.0] * len(records)
        for place, name in enumerate(names):
            values = [1e3 * r["phases"].get(name, 0.0) / r["shape"]["batch"] for r in records]
            axes.barh(range(len(records)), values, left=left, color=_COLOURS[place], label=name, height=0.7)
            left = [a + b for a, b in zip(left, values, strict=True)]
        axes.set_yticks(range(len(records)), labels, fontsize=7)
        axes.invert_yaxis()
        axes.set(title="Training step by phases", xlabel="ms per image")
        axes.legend(ncols=len(names))

    return (10.0, 1.6 + 0.42 * len(records)), paint


def _memory(run: Run) -> Painter:
    records = [r for r in run.measures if r["family"] in ("step", "infer") and r.get("peak_bytes")]
    if not records:
        return (1, 1), None
    colours = _forms(records)
    cases = list(dict.fromkeys(r["case"] for r in records))

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        height = 0.8 / len(colours)
        for number, (name, colour) in enumerate(colours.items()):
            chosen = {r["case"]: r["peak_bytes"] / 1e6 for r in records if form(r) == name}
            ys = [place - 0.4 + (number + 0.5) * height for place, case in enumerate(cases) if case in chosen]
            axes.barh(ys, [chosen[case] for case in cases if case in chosen], height=height, color=colour, label=name)
        axes.set_yticks(range(len(cases)), cases, fontsize=7)
        axes.invert_yaxis()
        axes.set(title="Peak memory of a call beyond the weights", xlabel="MB")
        sizes = [r["peak_bytes"] / 1e6 for r in records]
        if max(sizes) > 20 * min(sizes):
            axes.set_xscale("log")
            axes.set_xlim(left=min(sizes) / 2)
        axes.legend()

    return (9.0, 1.6 + 0.4 * len(cases)), paint


def _scaling(run: Run, along: str) -> Painter:
    """Inference's rate by batch or by image size, a line for each network and form."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for r in run.measures:
        if r["family"] != "infer" or "per_second" not in r:
            continue
        network, size = r["network"].split("@")
        if along == "batch":
            lines[f"{network} {size} px", form(r)].append((r["shape"]["batch"], r["per_second"]))
        elif r["shape"]["batch"] == 8:
            lines[f"{network} batch 8", form(r)].append((r["shape"]["image_size"], r["per_second"]))
    lines = {key: sorted(points) for key, points in lines.items() if len(points) > 1}
    if not lines:
        return (1, 1), None
    styles = dict(zip(dict.fromkeys(k[0] for k in lines), ("-", "--", ":", "-."), strict=False))
    forms = list(dict.fromkeys(key[1] for key in lines))

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for (what, name), points in lines.items():
            colour = _COLOURS[forms.index(name) % len(_COLOURS)]
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, styles.get(what, "-"), marker="o", color=colour, label=f"{what}, {name}", markersize=4)
        axes.set(title=f"Inference with NMS by {along.replace('_', ' ')}", ylabel="images/s", yscale="log")
        axes.set(xlabel="images per batch" if along == "batch" else "pixels, square")
        axes.legend(fontsize=7)

    return (8.6, 5.2), paint


def _objects(run: Run) -> Painter:
    """Time of assignment and loss by objects per image."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for r in run.measures:
        if r["family"] == "loss" and r["subject"] in ("assign", "loss") and r["layout"] == "nchw":
            lines[r["subject"], form(r)].append((r["shape"]["objects"], 1e3 * r["median"] / r["shape"]["batch"]))
    lines = {key: sorted(points) for key, points in lines.items() if len(points) > 1}
    if not lines:
        return (1, 1), None

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for place, ((subject, name), points) in enumerate(lines.items()):
            xs, ys = zip(*points, strict=True)
            style = "-" if subject == "assign" else "--"
            axes.plot(xs, ys, style, marker="o", markersize=4, color=_COLOURS[place % 7], label=f"{subject}, {name}")
        axes.set_xscale("symlog", linthresh=5)
        axes.set(title="Assignment and whole loss by objects per image", xlabel="objects per image", yscale="log")
        axes.set(ylabel="ms per image")
        axes.legend()

    return (8.6, 5.2), paint
