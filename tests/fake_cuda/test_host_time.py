"""What the GPU path costs the host, by Triton's real driver on a driver library that launches nothing.

Python calls and launches are those of `bench/counts.json` (`YOLOV9_FAST_UPDATE_COUNTS=1` writes what is found), a
second step of the same shapes compiles nothing, launches are on the right device and stream, and "auto" launches what
is worth it.
"""

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

pytest.importorskip("triton")
import triton

from tests.fake_cuda import triton_driver

RECORDED = "torch 2.13, triton 3.7"
KEY = f"the host's part on a GPU, {RECORDED}"
HERE = f"torch {'.'.join(torch.__version__.split('.')[:2])}, triton {'.'.join(triton.__version__.split('.')[:2])}"
TOLERANCE = 0.01
"""Of Python calls, as in `bench/guard.py`."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a CUDA device of its own"),
    pytest.mark.skipif(HERE != RECORDED, reason=f"the counts are those of {RECORDED}"),
]


def run(*command: str, **variables: str) -> str:
    try:
        triton_driver.libraries()
    except RuntimeError as error:
        pytest.skip(str(error))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=fake_cuda.ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@functools.cache
def report(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("-m", "tests.fake_cuda.host_time", *arguments, "--json"))
    return found


def test_python_calls_and_launches_are_those_of_the_file() -> None:
    found = report("yolov9-t", "--units", "--repeats", "0")
    numbers = {**found["units"], **{f"yolov9-t {what}": counts for what, counts in found["yolov9-t"].items()}}
    content = json.loads(FILE.read_text())
    if os.environ.get("YOLOV9_FAST_UPDATE_COUNTS"):
        content[KEY] = numbers
        atomic_write(FILE, json.dumps(content, indent=1, sort_keys=True) + "\n")
        return
    assert {name: counts["launches"] for name, counts in numbers.items()} == {
        name: counts["launches"] for name, counts in content[KEY].items()
    }
    more = {
        name: (counts["python calls"], expected)
        for name, counts in numbers.items()
        if counts["python calls"] > (1 + TOLERANCE) * (expected := content[KEY][name]["python calls"])
    }
    assert not more, "Python calls found, and those of the file"


def test_a_second_step_compiles_nothing_and_another_size_little() -> None:
    found = report("yolov9-t", "--sizes", "96", "128", "--repeats", "0")["yolov9-t"]
    for name, counts in found.items():
        if name.endswith("second"):
            assert counts["compiled"] == {}, name
    assert sum(found["step of 96 px, first"]["compiled"].values()) > 20
    for what, most in {"step": 2, "inference": 4}.items():
        compiled = found[f"{what} of 128 px, first"]["compiled"]
        assert sum(compiled.values()) <= most, compiled


SCRIPT = """
from tests.fake_cuda import triton_driver
driver = triton_driver.start()
import torch
import yolov9_fast as yf
from tests.accelerate.official_shaped import AConv
from yolov9_fast import ops
from yolov9_fast.nn import Conv

driver.streams.update({0: 7, 1: 8})
def unit(device):
    x = torch.randn(2, 8, 4, 4, device=device, requires_grad=True)
    weight, bias, mean, var = (torch.ones(8, device=device) for _ in range(4))
    for _ in range(3):  # the first runs the launchers, the others repeat them
        ops.bn_silu(x, weight, bias, mean, var, training=True, momentum=0.1, eps=1e-3).sum().backward()
    assert torch.cuda.current_device() == 0
for device in (1, 0, 1):
    driver.reset()
    unit(f"cuda:{device}")
    launches = driver.launches()
    assert len(launches) == 6, launches
    assert {(launch.device, launch.stream) for launch in launches} == {(device, 7 + device)}, launches

foreign = AConv(8, 8)
assert yf.accelerate(foreign).accelerated  # on the CPU, whose convolutions have results
foreign.to("cuda")
small = torch.randn(2, 8, 16, 16, device="cuda")
large = torch.randn(2, 8, 64, 64, device="cuda")
print(f"{small.nbytes} {large.nbytes}")
def launches(model, x, name="auto", capturing=False):
    driver.capturing = capturing
    driver.reset()
    with yf.backend(name):
        model(x).sum().backward()
    driver.capturing = False
    return driver.count() > 0
for model in (Conv(8, 8, 3).to("cuda"), foreign):
    print(*(launches(model, *case) for case in (
        (small,), (large,), (small, "auto", True), (small, "triton"), (large, "eager"), (large, "eager", True), (small,)
    )))
"""


def test_launches_on_the_right_device_and_stream_and_only_of_blocks_that_are_worth_them() -> None:
    """On the device of the tensors and its current stream. "auto" runs a block fused where its map is large enough
    (here 67 kB), where a CUDA graph is captured, and under a backend set by name."""
    bytes_of_maps, *found = run("-c", SCRIPT, YOLOV9_FAST_HOST_MICROSECONDS="0.1").splitlines()
    assert bytes_of_maps == "16384 262144"
    assert found == ["False True True True False False False"] * 2
