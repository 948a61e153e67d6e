"""What training steps, predictions and other code's models do on a GPU, traced without one: where the host waits, what
is copied, layouts, casts, and launches, which are those of `bench/counts.json` (`YOLOV9_FAST_UPDATE_COUNTS=1` writes
the numbers found into the file)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bench.guard import FILE
from tests import fake_cuda
from yolov9_fast.atomic import atomic_write

pytest.importorskip("triton")  # its launchers say how many kernels an operator launches

RECORDED = "2.13"
"""The torch whose launches the file has; others decompose and launch differently."""
KEY = f"launches on a GPU, torch {RECORDED}"
STEPS = [
    "yolov9-t step bf16",
    "yolov9-t step fp16 classes=3",
    "yolov9-t step off classes=1 height=320 width=416",
    "yolov9-t accumulate bf16",
    "yolov9-s step bf16",
    "yolov9-m step bf16",
    "yolov9-c step bf16",
    "yolov9-e step bf16",
    "yolov9-t step bf16 planned=1",
]
INFERENCE = [
    "yolov9-t predict bf16",
    "yolov9-s predict bf16",
    "yolov9-m predict bf16",
    "yolov9-c predict bf16",
    "yolov9-e predict bf16",
    "yolov9-t validate bf16",
]
FOREIGN = [
    f"{family} {what} height=64 width=96 batch=2 classes={classes}{own}"
    for family, amp, classes in (("official", "bf16", 80), ("ultralytics", "fp16", 3), ("mit", "off", 1))
    for what in (f"step {amp}", f"infer {amp}")
    for own in ("", " backend=own")
]

IMAGES = "host to device, yolov9_fast/engine/device.py:prepare_images"
TARGETS = "host to device, yolov9_fast/losses/targets.py:_copied"
OF_STEP = {
    "host to device, yolov9_fast/engine/step.py:_load": 1,
    "host to device, yolov9_fast/losses/targets.py:copy_": 3,
}
RATES = {"host to device, yolov9_fast/engine/flat.py:write_rates": 1}
RESULT = "device to host, yolov9_fast/engine/host_copy.py:"
RESULTS = {"yolov9_fast/engine/host_copy.py:wait": 1}
"""Boxes and their number, and the number of candidates, for the host."""
UNUSED = {"aten::zeros", "aten::cat", "aten::convolution_backward"}
"""Where code of others uses one part of a split map, torch makes the gradient of the other, of zeros and NCHW."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a CUDA device of its own"),
    pytest.mark.skipif(
        torch.__version__.split(".")[:2] != RECORDED.split("."), reason=f"the counts are those of torch {RECORDED}"
    ),
]


def traces(cases: Sequence[str]) -> dict[str, dict[str, Any]]:
    try:
        fake_cuda.library()
    except RuntimeError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-W", "ignore", "-m", "tests.fake_cuda.trace", *cases]
    done = subprocess.run(command, cwd=fake_cuda.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def check_launches(found: dict[str, dict[str, Any]]) -> None:
    content = json.loads(FILE.read_text())
    if os.environ.get("YOLOV9_FAST_UPDATE_COUNTS"):
        content.setdefault(KEY, {}).update({case: one["launches"] for case, one in found.items()})
        atomic_write(FILE, json.dumps(content, indent=1, sort_keys=True) + "\n")
        return
    for case, one in found.items():
        assert one["launches"] == content[KEY][case], (case, one["by_operator"])


def of_maps(casts: dict[str, int]) -> dict[str, int]:
    return {name: number for name, number in casts.items() if name.endswith(", map")}


def converted_images(case: str) -> dict[str, int]:
    """The casts of maps that a network needs: of its images, for each backbone; that of an auxiliary branch too."""
    network, what, amp, *_ = case.split()
    backbones = 2 if network == "yolov9-e" or (what == "step" and network in ("yolov9-m", "yolov9-c")) else 1
    return {"u8 → fp32, map": 1} | ({} if amp == "off" else {f"fp32 → {amp}, map": backbones})


def test_training_steps() -> None:
    """Of `TrainStep`: forward, loss, backward, clipping, optimiser, moving average."""
    found = traces(STEPS)
    for case, one in found.items():
        assert one["waits"] == {}, case
        assert one["copies"] == OF_STEP | ({} if " accumulate " in case else RATES), case
        assert one["layouts"] == ({"yolov9_fast::augment_triton": 1} if "planned" in case else {}), case  # RGB planes
        assert one["slow_lists"] == {}, case
        assert one["gradients_with_other_strides"] == 0, case
        assert of_maps(one["casts"]) == converted_images(case), case
        assert " off" in case or one["wide"] == {}, case
        assert one["by_operator"]["forward"]["yolov9_fast::bn_silu_forward_triton"] > 100, case
        assert one["by_operator"]["loss"]["yolov9_fast::assign"] == 2, case
        assert one["by_operator"]["backward"]["yolov9_fast::bn_silu_backward_triton"] > 100, case
    check_launches(found)


def test_prediction_and_validation() -> None:
    """Of `Predictor` and `validate`: a batch, with decoding and NMS; the boxes are read in one go."""
    found = traces(INFERENCE)
    for case, one in found.items():
        assert one["waits"] == RESULTS, case
        copies = {name: number for name, number in one["copies"].items() if not name.startswith(RESULT)}
        assert copies == {IMAGES: 1} | ({TARGETS: 3} if "validate" in case else {}), case
        assert one["layouts"] == one["slow_lists"] == {}, case
        raw = {} if " off" in case else {"bf16 → fp32, map": 3}  # those of the head, for decoding
        assert of_maps(one["casts"]) == converted_images(case) | raw, case
        if "predict" in case:
            assert not any("weight" in name for name in one["casts"]), case
    check_launches(found)


def test_models_of_other_code() -> None:
    """Accelerated, in a loop without this package: no wait, no copy; a step has fewer launches than the model's own.

    In evaluation the model's own layers launch less often while BatchNorm is not folded: the reciprocal of a unit's
    standard deviation takes two launches, a weight that is not channels_last one.
    """
    found = traces(FOREIGN)
    for case, one in found.items():
        assert one["waits"] == {}, case
        assert one["copies"] == {IMAGES: 1}, case
        if case.endswith("backend=own"):
            continue
        assert one["slow_lists"] == {}, case
        assert set(one["layouts"]) <= (set() if "ultralytics" in case else UNUSED), case
        assert of_maps(one["casts"]) == converted_images(case), case
        assert " off" in case or one["wide"] == {}, case
        if " step " in case:
            assert one["launches"]["step"] < found[f"{case} backend=own"]["launches"]["step"], case
    check_launches(found)


PLACE = "tests/fake_cuda/planted.py:"
WAITS = (
    *("item", "branch", "tolist", "cpu", "numpy", "tensor"),
    *("new_tensor", "to_device", "mask", "nonzero", "synchronize"),
)
COPIED = {
    "cpu": "device to host",
    "cpu_without_waiting": "device to host",
    "numpy": "device to host",
    "tensor": "host to device",
    "new_tensor": "host to device",
    "to_device": "host to device",
}


def test_planted_faults_are_found() -> None:
    """By the tracer, in the forward and in the backward of a unit; what is no fault is not."""
    names = [*WAITS, "nothing", "cpu_without_waiting", "fill_masked", "contiguous", "nchw", "float"]
    found = {case.split()[0]: one for case, one in traces([f"{name} plant bf16" for name in names]).items()}
    for name, one in found.items():
        assert sum(one["waits"].values()) == 2 * (name in WAITS), name
        assert all(place.startswith(PLACE) for place in one["waits"]), name
        assert sum(one["copies"].values()) == 2 * (name in COPIED), name
        assert all(place.startswith(f"{COPIED.get(name)}, {PLACE}") for place in one["copies"]), name
    layouts = {name: one["layouts"] for name, one in found.items() if one["layouts"]}
    assert layouts == {"contiguous": {"aten::clone": 2}, "nchw": {"aten::zeros_like": 2}}
    casts = {name for name, one in found.items() if "bf16 → fp32, map" in one["casts"]}
    assert casts == {"float"}
