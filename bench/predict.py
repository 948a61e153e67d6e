"""`yolov9-fast bench predict`: a step's or a prediction's time on a GPU, predicted from what it would launch.

Nothing here is measured on a GPU. A traced run gives every call with its shapes; `roofline.py` gives its kernels their
least time on a device; `HOST_SECONDS` gives the host its time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import yolov9_fast
from yolov9_fast._numbers import finite_number
from yolov9_fast._untrusted import read_json, user_path
from yolov9_fast.atomic import atomic_write
from yolov9_fast.errors import UserError
from yolov9_fast.models.graph import load_graph
from yolov9_fast.nn.host_time import VARIABLE

from .first import aligned
from .roofline import LEAST_SECONDS, Call, Device, Times, devices, kernels_of, register_device, run

WHAT = ("step", "inference")
AMP = ("bf16", "fp16", "off")
FORMS = {"eager": "eager", "fused": "auto"}
"""By form the backend of the operators: PyTorch's own layers, or ours."""
HOST_SECONDS = {
    "triton": 20e-6,
    "bn_silu_apply": 54e-6,
    "compiled": 20e-6,
    "convolution": 25e-6,
    "convolution_backward": 50e-6,
    "list": 30e-6,
    "other": 8e-6,
    "replay": 8e-6,
}
"""Seconds of the host for a kernel of a Triton operator, with all Python and autograd around it; for a folded unit; for
a call of a compiled operator, a convolution, its gradients, an operator on lists of tensors, another operator; to
launch a captured graph. The first two are measured with a driver that launches nothing (`python -m
tests.fake_cuda.host_time --units`: 104 µs for the 6 kernels of a unit in training, 52 µs folded), with 2.5 µs for each
launch; the others are assumed."""
ASSUMPTIONS = (
    "a kernel reads and writes each tensor among its arguments once, at the full bandwidth of the data sheet, or "
    "computes at its full dense arithmetic ceiling, whichever takes longer, and at least the device's shortest time",
    "caches keep nothing between kernels; cuDNN converts no layout and takes TF32 for float32 maps",
    "eager runs PyTorch's layers in channels_last, with our assignment, loss, decoding and NMS in both forms",
    "fused runs every block fused, as a captured graph does; without capture `auto` leaves small blocks to PyTorch",
    "host and device run side by side; the host takes a fixed time per call, and launches a captured graph at once",
    "labels, images and the data loader are there in time",
)
FALSIFIED_BY = (
    "A measured device time (`kernel_seconds` of `yolov9-fast bench suite --only step,infer`) below the predicted one "
    "falsifies the bytes and products, or that caches keep nothing; one above twice the predicted one falsifies that "
    "kernels come near their ceilings; a measured `host_seconds` off by more than half falsifies the host's times."
)
_SHOWN = 10
_ROOT = Path(__file__).resolve().parent.parent
_TRACER = "tests.fake_cuda.calls"


def predict(
    network: str,
    *,
    what: str = "step",
    batch: int = 16,
    image_size: int = 640,
    amp: str = "bf16",
    chosen: Sequence[Device] | None = None,
    host: Mapping[str, float] = HOST_SECONDS,
) -> dict[str, Any]:
    """The predicted times as plain data, by form and device.

    Args:
        network: a name or graph file; `what`: one of `WHAT`; `amp`: one of `AMP`.
        chosen: devices; default all that are known.
        host: seconds of the host, as `HOST_SECONDS`.

    Raises `UserError` for a wrong argument, and where there is no tracer: it is part of a source checkout.
    """
    if image_size % 32 or image_size < 32:
        raise UserError(f"--imgsz: expected a positive multiple of 32, got {image_size}")
    if batch < 1:
        raise UserError(f"--batch: expected at least 1, got {batch}")
    load_graph(network)
    chosen = list(devices.values()) if chosen is None else chosen
    case = f"{network} {what} {amp} batch={batch} height={image_size} width={image_size} backend="
    found = dict(zip(FORMS, traced([case + backend for backend in FORMS.values()]), strict=True))
    return {
        "predicted": True,
        "network": network,
        "what": what,
        "batch": batch,
        "image_size": image_size,
        "amp": amp,
        "versions": {"yolov9_fast": yolov9_fast.__version__, "torch": torch.__version__},
        "assumptions": list(ASSUMPTIONS),
        "falsified_by": FALSIFIED_BY,
        "devices": {device.name: _ceilings(device) for device in chosen},
        "host_seconds": dict(host),
        "forms": {form: _form(calls, chosen, host) for form, calls in found.items()},
    }


def traced(cases: Sequence[str]) -> list[dict[str, Any]]:
    """The calls of each case, from a process of its own, whose torch has a GPU that runs nothing."""
    if not (_ROOT / "tests" / "fake_cuda" / "calls.py").is_file():
        raise UserError("bench predict: expected a source checkout, whose tests trace a step; this is an installation")
    command = [sys.executable, "-W", "ignore", "-m", _TRACER, *cases]
    environment = os.environ | {VARIABLE: "0"}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"bench predict: {cases[0]}: the tracer failed: {lines[-1][:300]}")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def _form(found: Mapping[str, Any], chosen: Sequence[Device], host: Mapping[str, float]) -> dict[str, Any]:
    calls = [Call.from_json(one) for one in found["calls"]]
    distinct = [(kernels, host_seconds(call, len(kernels), host)) for call in calls for kernels in [kernels_of(call)]]
    work = [distinct[index] for index in found["order"]]
    kernels = [kernel for one, _ in work for kernel in one]
    return {
        "launches": len(kernels),
        "bytes": sum(kernel.moved for kernel in kernels),
        "operations": sum(kernel.operations for kernel in kernels),
        "saved_bytes": found["saved_bytes"],
        "predicted": {device.name: _numbers(run(work, device, host["replay"])) for device in chosen},
    }


def host_seconds(call: Call, kernels: int, host: Mapping[str, float]) -> float:
    """What the host takes for a call with so many kernels."""
    if call.operator.startswith("yolov9_fast::"):
        if not call.name.endswith("_triton"):
            return host["compiled"]
        return host.get(call.name.removesuffix("_triton"), host["triton"] * kernels)
    if "_foreach_" in call.name or call.name.startswith("_fused_"):
        return max(host["list"], host["other"] * kernels)
    return host.get(call.name, host["other"])


def _numbers(times: Times) -> dict[str, Any]:
    longest = sorted(times.parts.items(), key=lambda item: -item[1].seconds)[:_SHOWN]
    return {
        "device_seconds": times.device,
        "host_seconds": times.host,
        "seconds": times.both,
        "captured_seconds": times.captured,
        "bound": "host" if times.host > times.device else "device",
        "operators": [
            {
                "operator": name,
                "kernels": part.kernels,
                "seconds": part.seconds,
                "bytes": part.moved,
                "bound": max(part.bounds, key=lambda bound: part.bounds[bound]),
            }
            for name, part in longest
        ],
    }


# Devices --------------------------------------------------------------------------------------------------------------


def device_of(text: str) -> Device:
    """The device of this name, or that of a JSON file.

    The file holds `{"name": "B200", "bandwidth_gb_per_s": 8000, "tflop_per_s": {"float32": 75, "tf32": 1100,
    "bfloat16": 2250, "float16": 2250}}` and, if wanted, `"least_us"`: the microseconds of the shortest kernel.
    """
    if text in devices:
        return devices[text]
    if not text.endswith(".json"):
        raise UserError(f"--device: expected some of {', '.join(devices)}, or a JSON file, got {text!r}")
    path = user_path(text, "--device", UserError)
    try:
        content = read_json(path, "device", UserError)
    except ValueError as error:
        raise UserError(f"{path}: device: expected JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("tflop_per_s"), dict):
        raise UserError(f"{path}: device: expected name, bandwidth_gb_per_s and tflop_per_s")
    figures = {"bandwidth_gb_per_s": content.get("bandwidth_gb_per_s"), "least_us": content.get("least_us", "none")}
    figures |= {f"tflop_per_s: {name}": value for name, value in content["tflop_per_s"].items()}
    if figures["least_us"] == "none":
        figures["least_us"] = 1e6 * LEAST_SECONDS
    numbers = {name: finite_number(value) or 0.0 for name, value in figures.items()}
    for name, number in numbers.items():
        if number <= 0:
            raise UserError(f"{path}: device: {name}: expected a positive number, got {figures[name]!r}")
    operations = {name: 1e12 * numbers[f"tflop_per_s: {name}"] for name in content["tflop_per_s"]}
    device = Device(
        str(content.get("name", path.stem)), 1e9 * numbers["bandwidth_gb_per_s"], operations, numbers["least_us"] / 1e6
    )
    try:
        register_device(device)
    except ValueError as error:
        raise UserError(f"{path}: device: {error}") from None
    return device


def _ceilings(device: Device) -> dict[str, Any]:
    content = asdict(device)
    content["operations"] = dict(device.operations)
    del content["name"]
    return content


def write(records: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write records to a file, numbers to four digits."""
    return atomic_write(path, json.dumps(_rounded(list(records)), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


# Text -----------------------------------------------------------------------------------------------------------------


def text(record: Mapping[str, Any]) -> str:
    """The predicted times as tables."""
    rows = [["predicted, ms", *("device", "host", "uncaptured", "captured", "images/s", "bound by")]]
    for name in record["devices"]:
        for form, content in record["forms"].items():
            one = content["predicted"][name]
            keys = ("device_seconds", "host_seconds", "seconds", "captured_seconds")
            cells = [f"{1e3 * one[key]:.2f}" for key in keys]
            rows.append([f"{name}, {form}", *cells, f"{record['batch'] / one['seconds']:.0f}", one["bound"]])
    lines = [f"predicted, not measured: {title(record)}", "", *aligned(rows), ""]
    for form, content in record["forms"].items():
        moved, products = f"{content['bytes'] / 1e9:.1f} GB moved", f"{content['operations'] / 1e12:.2f} TFLOP"
        saved = f"{content['saved_bytes'] / 1e9:.2f} GB saved for the backward"
        lines.append(f"{form}, predicted: {content['launches']:,} launches, {moved}, {products}, {saved}")
    first = next(iter(record["devices"]))
    for form, content in record["forms"].items():
        rows = [[f"{form} on {first}, predicted", "kernels", "ms", "GB", "mostly bound by"]]
        for one in content["predicted"][first]["operators"]:
            numbers = f"{1e3 * one['seconds']:.2f}", f"{one['bytes'] / 1e9:.2f}"
            rows.append([one["operator"], str(one["kernels"]), *numbers, one["bound"]])
        lines += ["", *aligned(rows)]
    return "\n".join([*lines, "", "Assumed: " + "; ".join(record["assumptions"]) + ".", record["falsified_by"]])


def title(record: Mapping[str, Any]) -> str:
    amp = "float32" if record["amp"] == "off" else record["amp"]
    what = "training step" if record["what"] == "step" else "inference with NMS"
    return f"{record['network']}, {what}, {record['image_size']} px, batch {record['batch']}, {amp}"
