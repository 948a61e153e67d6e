"""`docs/benchmarks.md` and its plots, from committed records alone; what no record holds reads "not measured"."""

from __future__ import annotations

import importlib.util
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from yolov9_fast._untrusted import read_json
from yolov9_fast.atomic import atomic_write
from yolov9_fast.errors import UserError

from . import commands, data_table, plots, step_table
from .cases import PHASES
from .records import COMMANDS, DATA, STEP_TABLE, Record, Run, newest_runs, read
from .stats import Ratio

NOTHING = "not measured"
_BOUNDS = {
    "memory": "memory bandwidth",
    "arithmetic": "arithmetic",
    "latency": "neither: small calls or the algorithm itself",
}
_HEAD = """# Benchmarks

Written by `yolov9-fast bench report` from the records in [bench/results](../bench/results); do not edit. What no record
holds is "{nothing}". How it is measured: [bench/METHOD.md](../bench/METHOD.md).

Times are medians [20th, 80th percentile]. "×" is the eager form's time over the form's own, with the 95 % bootstrap
interval, both timed in turns in one process. Share: of the least time that bytes and products allow, by
ceilings measured in the same run. Error: root mean square against float64, relative.
The time of a wrong result is not reported.
"""

PREDICTED = Path("predicted") / "networks.json"
_PREDICTED_HEAD = """## Predicted on GPUs, not measured

Written by `yolov9-fast bench predict` without a GPU: a step is traced on a device that runs nothing, and each kernel
takes the longest of its bytes over the bandwidth, its products over the arithmetic ceiling, and the shortest time of a
kernel. Ceilings are those of data sheets (`bench/roofline.py`). {size} px. Captured: as a CUDA graph. {falsified}

A GPU that is not in the table is a JSON file for `--device`, as
`{{"name": "B200", "bandwidth_gb_per_s": 8000, "tflop_per_s": {{"float32": 75, "tf32": 1100, "bfloat16": 2250}}}}`, or
`yolov9_fast.bench.roofline.register_device(Device(...))`.

Assumed:
"""


def write_report(results: Path, document: Path, files: Sequence[Path] = ()) -> list[Path]:
    """Write the document and its plots, in the folder `benchmarks` next to it; returns the files written.

    Args:
        results: folder with a folder of records per device; the newest file of each counts.
        files: records to report on instead.

    Raises:
        UserError: no record.
    """
    chosen = list(files) or list(newest_runs(results).values())
    if not chosen:
        raise UserError(f"no records below {results}; `yolov9-fast bench suite` writes them")
    runs = [Run(path) for path in chosen]
    folder = document.parent / document.stem
    written: list[Path] = []
    parts = [_HEAD.format(nothing=NOTHING), _devices(runs)]
    if not any(run.device.startswith("nvidia") for run in runs):
        parts.append(f"On a GPU: {NOTHING}; `bench/gpu.sh` measures everything there is in one command.\n")
    if (results / PREDICTED).is_file():
        parts.append(predicted(read_json(results / PREDICTED, "predicted times", UserError)))
    for run in runs:
        drawn = plots.draw(run, folder) if importlib.util.find_spec("matplotlib") else []
        written += drawn
        parts.append(_section(run, drawn, document.parent))
    parts += [_beside(folder) for folder in dict.fromkeys(path.parent for path in chosen)]
    written.append(atomic_write(document, "\n".join(part for part in parts if part)))
    return written


def _beside(folder: Path) -> str:
    """The tables beside other people's code that a device's folder holds; empty where there are none."""
    parts = []
    for title, name, text in (
        ("A whole training step", STEP_TABLE, step_table.text),
        ("Whole training commands", COMMANDS, commands.text),
        ("Training images", DATA, data_table.text),
    ):
        if (folder / name).is_file():
            found = read(folder / name)
            lines = dict.fromkeys(r["command"] for r in found if r["kind"] == "run")
            done = "; ".join(f"`{line}`" for line in lines)
            parts.append(f"### {title}\n\n[Records](../bench/results/{folder.name}/{name}) of {done}.\n\n{text(found)}")
    return "\n".join([f"## Beside other people's code: {folder.name}\n", *parts]) if parts else ""


def predicted(records: Sequence[Record]) -> str:
    """The section of the times that `yolov9-fast bench predict` wrote."""
    times, work = [], []
    for record in records:
        case = [record["network"], record["what"], str(record["batch"]), record["amp"]]
        eager, fused = (record["forms"][form] for form in ("eager", "fused"))
        for name in record["devices"]:
            pair = [form["predicted"][name] for form in (eager, fused)]
            cells = [time_text(one[key]) for key in ("seconds", "captured_seconds") for one in pair]
            bounds = ", ".join(dict.fromkeys(one["bound"] for one in pair))
            rate = f"{pair[0]['captured_seconds'] / pair[1]['captured_seconds']:.2f}"
            times.append([*case, name, *cells, rate, bounds])
        pairs = [
            (f"{one['launches']:,}", byte_text(one["bytes"]), byte_text(one["saved_bytes"])) for one in (eager, fused)
        ]
        work.append([*case, *(cell for both in zip(*pairs, strict=True) for cell in both)])
    case_head = ("network", "what", "batch", "precision")
    forms = ("eager", "fused", "eager, captured", "fused, captured")
    head = (
        *case_head,
        "GPU",
        *(f"predicted {form}" for form in forms),
        "predicted ×, captured",
        "uncaptured, bound by",
    )
    counts = [f"{what}, {form}" for what in ("launches", "moved", "saved for backward") for form in ("eager", "fused")]
    text = _PREDICTED_HEAD.format(size=records[0]["image_size"], falsified=records[0]["falsified_by"])
    assumed = "".join(f"- {line}\n" for line in records[0]["assumptions"])
    tables = [table(head, times), table((*case_head, *(f"predicted {name}" for name in counts)), work)]
    return "\n".join([text, assumed, *tables])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = [f"| {' | '.join(row)} |" for row in rows]
    if not body:
        return f"{NOTHING[0].upper()}{NOTHING[1:]}.\n"
    return "\n".join([f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *body]) + "\n"


def _devices(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        e = run.environment
        versions = ", ".join(f"{name} {value}" for name, value in e["versions"].items() if value)
        dirty = " (changed)" if e.get("dirty") else ""
        rows.append(
            [e["device"], e["device_name"], str(e["threads"]), versions, f"{e['commit']}{dirty}", run.path.name]
        )
    return table(("device", "name", "threads", "versions", "commit", "records"), rows)


def _section(run: Run, drawn: Sequence[Path], base: Path) -> str:
    parts = [f"## {run.device}\n", "Commands: " + "; ".join(f"`{c}`" for c in dict.fromkeys(run.commands)) + "\n"]
    parts.append(_ceilings(run))
    parts.append(_disturbance(run))
    parts += ["### Training step\n", _networks(run, "step", {name: name for name in PHASES})]
    parts += ["### Inference, with NMS\n", _networks(run, "infer", {"network": "network", "nms": "NMS"})]
    parts += ["### Where the time goes\n", _places(run)]
    parts += ["### Operators\n", _operators(run), "### Blocks, forward and backward\n", _plain(run, "blocks")]
    parts += ["### Loss and assignment by objects per image\n", _plain(run, "loss")]
    parts += ["### NMS\n", _plain(run, "nms"), "### Data loader\n", _plain(run, "data")]
    parts += ["### What could not take part, and wrong results\n", _absent(run)]
    pictures = [f"![{path.stem.replace('_', ' ')}]({path.relative_to(base).as_posix()})" for path in drawn]
    pictures = [picture for picture in pictures if picture.endswith(".svg)")]
    none = "None: no records for them, or no matplotlib.\n"
    parts.append("### Plots\n\n" + ("\n\n".join(pictures) or none) + "\n")
    return "\n".join(parts)


def _ceilings(run: Run) -> str:
    if run.ceilings is None:
        return f"Ceilings: {NOTHING}.\n"
    speeds = ", ".join(f"{speed / 1e9:.0f} GB/s over {byte_text(size)}" for size, speed in run.ceilings["bandwidth"])
    products = ", ".join(f"{name} {value / 1e9:,.0f} GFLOP/s" for name, value in run.ceilings["matrix"].items())
    return f"Ceilings measured in the run: bandwidth {speeds}; products {products}.\n"


def _disturbance(run: Run) -> str:
    """How far other processes got in the way."""
    timed = [r for r in run.measures if "samples" in r]
    busy = [r for r in timed if r.get("disturbed", 0) > len(r["samples"]) / 4]
    text = f"{len(busy)} of {len(timed)} measurements had over a quarter of their samples disturbed by other processes"
    if busy:
        text += f"; these are unreliable: {', '.join(sorted({r['case'] for r in busy})[:8])}"
    return f"{text}.\n"


# Cells ----------------------------------------------------------------------------------------------------------------


def byte_text(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"


def time_text(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _spread(record: Record) -> str:
    return f"{time_text(record['median'])} [{time_text(record['p20'])}, {time_text(record['p80'])}]"


def ratio_text(record: Record) -> str:
    return Ratio(**record["speedup"]).text() if record.get("speedup") else "1"


def _share(record: Record) -> str:
    return f"{record['share']:.0%}" if "share" in record else NOTHING


def _provider(record: Record) -> str:
    return f"{record['provider']}{', ' + record['layout'] if record['layout'] not in ('', 'nchw') else ''}"


def _or_nothing(record: Record, key: str, show: Callable[[Any], str]) -> str:
    return show(record[key]) if record.get(key) is not None else NOTHING


# Tables ---------------------------------------------------------------------------------------------------------------


def _networks(run: Run, family: str, phases: Mapping[str, str]) -> str:
    """Whole networks; `phases`: what the phases of a call are named in the records and in the table."""

    def row(case: str, r: Record) -> list[str]:
        return [
            case.removeprefix(f"{family}/"),
            _provider(r),
            _spread(r),
            ratio_text(r),
            f"{r['per_second']:.1f}",
            *(time_text(r["phases"][name]) if name in r["phases"] else NOTHING for name in phases),
            *_apart(r, apart),
            _or_nothing(r, "peak_bytes", byte_text),
            _or_nothing(r, "launches", str),
            f"{r['error']:.0e}",
        ]

    apart = _on_gpu(run)
    call = "step" if family == "step" else "batch"
    head = ("network", "form", call, "×", "images/s", *phases.values(), *apart, "peak memory", "launches", "error")
    return table(head, [row(case, record) for case, records in run.of(family).items() for record in records])


def _places(run: Run) -> str:
    parts = []
    for case, records in run.of("places").items():
        for r in records:
            rows = []
            for place in r["places"][:3]:
                shapes = " × ".join("[" + ", ".join(map(str, shape)) + "]" for shape in place["shapes"][:3])
                share = f"{place['share']:.0%}" if "share" in place else NOTHING
                name = place["name"].split("::")[-1]
                cells = [name, shapes or "lists of tensors", str(place["calls"]), time_text(place["seconds"])]
                rows.append([*cells, f"{place['part']:.0%}", share, _BOUNDS[place["bound"]]])
            profiled = time_text(r["profiled_seconds"])
            title = f"{case.removeprefix('places/')}, {_provider(r)}: the three longest of {profiled}"
            head = ("kernel", "inputs", "calls", "time", "part", "share of limit", "bound by")
            parts.append(f"{title} (profiled)\n\n{table(head, rows)}")
    return "\n".join(parts) or f"{NOTHING[0].upper()}{NOTHING[1:]}.\n"


def _operators(run: Run) -> str:
    """Each operator's shapes summed up by the geometric mean of the ratios, then its largest layers in full."""
    parts = []
    summary: list[list[str]] = []
    subjects = dict.fromkeys(r["subject"] for r in run.measures if r["family"] == "ops")
    for subject in subjects:
        cases = run.of("ops", subject)
        for mode in ("forward", "both"):
            summary += _means(subject, mode, [rs for rs in cases.values() if rs[0]["mode"] == mode])
        longest = sorted(cases.values(), key=lambda rs: -rs[0]["median"] * rs[0]["count"])[:6]
        rows = [
            _row(run, record, record["case"].removeprefix(f"{subject}/")) for records in longest for record in records
        ]
        parts.append(f"#### {subject}: the layers that take longest\n\n{table(_row_head(run), rows)}")
    head = (
        "operator",
        "mode",
        "form",
        "shapes",
        "geometric mean of × against eager",
        "against the faster eager",
        "share of limit",
    )
    return table(head, summary) + "\n" + "\n".join(parts)


def _means(subject: str, mode: str, cases: Sequence[Sequence[Record]]) -> list[list[str]]:
    ratios: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for records in cases:
        eager = {r["layout"]: r["median"] for r in records if r["provider"] == "eager"}
        if "nchw" not in eager:
            continue
        for r in records:
            entry = (eager["nchw"] / r["median"], min(eager.values()) / r["median"], r.get("share") or math.nan)
            ratios[_provider(r)].append(entry)
    rows = []
    for provider, values in ratios.items():
        if provider == "eager":
            continue
        first, best = (math.exp(sum(math.log(v[i]) for v in values) / len(values)) for i in (0, 1))
        shares = sorted(v[2] for v in values if not math.isnan(v[2]))
        share = f"{shares[len(shares) // 2]:.0%}" if shares else NOTHING
        rows.append([subject, mode, provider, str(len(values)), f"{first:.2f}", f"{best:.2f}", share])
    return rows


def _on_gpu(run: Run) -> dict[str, str]:
    """Where a GPU was measured: the columns of the host's time and of the kernels', by their keys in records."""
    found = any("host_seconds" in record for record in run.measures)
    return {"host": "host_seconds", "kernels": "kernel_seconds"} if found else {}


def _apart(record: Record, columns: Mapping[str, str]) -> list[str]:
    return [_or_nothing(record, key, time_text) for key in columns.values()]


def _row_head(run: Run) -> tuple[str, ...]:
    return ("case", "form", "time", "×", "share of limit", *_on_gpu(run), "peak memory", "launches", "error")


def _row(run: Run, record: Record, name: str) -> list[str]:
    return [
        name,
        _provider(record),
        _spread(record),
        ratio_text(record),
        _share(record),
        *_apart(record, _on_gpu(run)),
        _or_nothing(record, "peak_bytes", byte_text),
        _or_nothing(record, "launches", str),
        f"{record['error']:.0e}",
    ]


def _plain(run: Run, family: str) -> str:
    measured = [(case, record) for case, records in run.of(family).items() for record in records]
    if family == "data":
        rows = [[*_row(run, record, case)[:3], f"{record['per_second']:.0f} images/s"] for case, record in measured]
        return table(("case", "form", "batch", "rate"), rows)
    return table(_row_head(run), [_row(run, record, case) for case, record in measured])


def _absent(run: Run) -> str:
    wrong = [[r["case"], r["provider"], r["reason"]] for r in run.absent if r.get("wrong")]
    grouped: dict[tuple[str, str, str], int] = defaultdict(int)
    for r in run.absent:
        if not r.get("wrong"):
            grouped[str(r.get("subject", r["family"])), r["provider"], r["reason"]] += 1
    rows = [[subject, provider, reason.replace("|", "/")] for (subject, provider, reason) in grouped]
    text = "No result was wrong.\n" if not wrong else table(("case", "form", "wrong result"), wrong)
    return text + "\n" + (table(("of", "form", "why not"), rows) if rows else "Nothing was left out.\n")
