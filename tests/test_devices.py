"""Tests of operators, layers, losses, engine, kernels and accelerate run on the devices that exist."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ops", "nn", "losses", "engine", "accelerate", "kernels")
ON_A_GPU = ("triton", "cuda")
"""Backends whose kernels take tensors of a GPU alone, where Triton is not interpreted."""


def definitions(source: str) -> Iterator[ast.FunctionDef]:
    return (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name.startswith("test"))


def without_a_device(source: str) -> list[str]:
    """Tests that run a backend of a GPU on tensors of no named device.

    A test names its device by the argument `device`, by a `.cuda()`, or by the string "cuda". One that expects the
    backend to refuse its arguments (`pytest.raises`), or that is marked as one of a GPU, names none and needs none.
    """
    found = []
    for test in definitions(source):
        text = ast.get_source_segment(source, test) or ""
        marks = [ast.get_source_segment(source, mark) or "" for mark in test.decorator_list]
        values = " ".join(mark for mark in marks if "parametrize(" in mark)
        chosen = re.search(rf"""(?:backend|backends)\(\s*["']({"|".join(ON_A_GPU)})["']""", text)
        listed = (
            re.search(rf"""["']({"|".join(ON_A_GPU)})["']""", values) or "BACKENDS" in values or "KERNELS" in values
        )
        named = any(argument.arg == "device" for argument in test.args.args) or ".cuda(" in text or '"cuda"' in text
        if (chosen or listed) and not named and "raises" not in text and "pytest.mark.gpu" not in marks:
            found.append(test.name)
    return found


def test_a_test_without_a_device_is_found() -> None:
    source = """
@pytest.mark.parametrize("name", BACKENDS)
def test_a(name): torch.zeros(1)
@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_b(name, device): torch.zeros(1, device=device)
def test_c():
    with yf.backend("triton"): yf.ops.spp(torch.zeros(1, 2, 3, 3))
def test_d():
    with yf.backend("triton"), pytest.raises(RuntimeError): yf.ops.spp(torch.zeros(1, 2, 3, 3))
@pytest.mark.parametrize("name", ["eager", "triton"])
def test_e(name): torch.zeros(1)
"""
    assert without_a_device(source) == ["test_a", "test_c", "test_e"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_test_of_a_backend_of_a_gpu_takes_a_device(folder: str) -> None:
    found = {
        path.name: names
        for path in sorted((ROOT / "tests" / folder).glob("test_*.py"))
        if path.name not in EXEMPT and (names := without_a_device(path.read_text()))
    }
    assert not found


EXEMPT = {"test_backend.py", "test_probe.py"}
"""Operators of their own, whose backends are functions of Python."""

CASES = [
    "tests/ops/test_box_iou.py",
    "tests/ops/test_nms_compiled.py::test_cuda_does_not_synchronise",
    "tests/ops/test_nms_compiled.py::test_cuda_is_captured_in_a_graph",
    "tests/ops/test_spp.py::test_fields_are_5_9_and_13",
    "tests/ops/test_bn_silu.py::test_every_backend",
    "tests/losses/test_detection.py",
    "tests/engine/test_predictor.py",
    "tests/accelerate/test_accelerate_nms.py",
]


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a CUDA device of its own")
def test_cases_of_a_gpu_run_on_a_simulated_device() -> None:
    """A few of each kind; `-p tests.simulated_cuda` runs any of them."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.simulated_cuda", "-p", "no:cacheprovider", "-q"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [*command, "-m", "gpu and not slow", *CASES], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 80
