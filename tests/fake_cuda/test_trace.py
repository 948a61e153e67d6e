"""What a step does on a GPU, traced without one: nothing waits for data, nothing is copied, layouts stay, launches are
those of `bench/counts.json`. `YOLOV9_FAST_UPDATE_COUNTS=1` writes the numbers found into the file."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from bench.guard import FILE
from tests import fake_cuda
from yolov9_fast.atomic import atomic_write

RECORDED = "2.13"
"""The torch whose launches the file has; others decompose and launch differently."""
KEY = f"launches on a GPU, torch {RECORDED}"
CASES = [
    ("yolov9-t", "step", "bf16"),
    ("yolov9-t", "step", "fp16"),
    ("yolov9-t", "step", "off"),
    ("yolov9-s", "step", "bf16"),
    ("yolov9-m", "step", "bf16"),
    ("yolov9-c", "step", "bf16"),
    ("yolov9-e", "step", "bf16"),
    ("yolov9-t", "inference", "off"),
    ("yolov9-t", "inference", "bf16"),
    ("yolov9-c", "inference", "bf16"),
    ("yolov9-e", "inference", "bf16"),
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a CUDA device of its own"),
    pytest.mark.skipif(
        torch.__version__.split(".")[:2] != RECORDED.split("."), reason=f"the counts are those of torch {RECORDED}"
    ),
]


@functools.cache
def trace(network: str, what: str, amp: str) -> dict[str, Any]:
    try:
        fake_cuda.library()
    except RuntimeError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-W", "ignore", "-m", "tests.fake_cuda.trace", network, "--what", what, "--amp", amp]
    done = subprocess.run(command, cwd=fake_cuda.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize(("network", "what", "amp"), CASES)
def test_a_step_on_a_gpu(network: str, what: str, amp: str) -> None:
    found = trace(network, what, amp)
    assert found["data_dependent"] == {}
    assert found["host_copies"] == {}
    assert found["not_channels_last"] == {}
    content = json.loads(FILE.read_text())
    name = f"{network} {what} {amp}"
    if os.environ.get("YOLOV9_FAST_UPDATE_COUNTS"):
        content.setdefault(KEY, {})[name] = found["launches"]
        atomic_write(FILE, json.dumps(content, indent=1, sort_keys=True) + "\n")
    else:
        assert found["launches"] == content[KEY][name], found["by_operator"]


def test_fused_operators_are_traced() -> None:
    operators = trace("yolov9-t", "step", "bf16")["by_operator"]
    assert operators["forward"]["yolov9_fast::bn_silu_forward_triton"] > 100
    assert operators["loss"]["yolov9_fast::assign"] == 2
    assert operators["backward"]["yolov9_fast::bn_silu_backward_triton"] > 100
