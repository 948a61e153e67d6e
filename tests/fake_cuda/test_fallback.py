"""Triton itself, on a driver library that launches nothing, where something that it needs is missing: what is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import fake_cuda
from tests.fake_cuda import triton_driver

SCRIPT = """
import json, os, sys, tempfile
from tests.fake_cuda import triton_driver
driver = triton_driver.start()
import torch
import yolov9_fast as yf
from yolov9_fast.ops import _probe

x = torch.ones(2, 8, 4, 4, device="cuda:1")
statistics = torch.zeros(8, device="cuda:1"), torch.ones(8, device="cuda:1")

def found(environment, backend="auto"):
    before = dict(os.environ)
    os.environ.update(environment)
    _probe._known.clear()
    driver.reset()
    try:
        with yf.backend(backend):
            y = yf.ops.bn_silu(x, None, None, *statistics, training=False, momentum=0.1, eps=0.0)
        error = None if torch.equal(y, torch.nn.functional.silu(x)) else "wrong values"
    except yf.errors.UserError as caught:
        error = str(caught)
    finally:
        os.environ.clear()
        os.environ.update(before)
    launches = [(one.kernel, one.device) for one in driver.launches()]
    return {"reason": _probe._known["triton", 1], "error": error, "launches": launches}

print(json.dumps({
    "no compiler": found({"PATH": "/nowhere"}),
    "a compiler that fails": found({"CC": "/bin/false"}),
    "a ptxas that fails": found({"TRITON_PTXAS_PATH": sys.argv[1]}),
    "no results": found({}),
    "by name": found({}, "triton"),
}))
"""
PTXAS = """#!/bin/sh
[ "$1" = --version ] && echo "Cuda compilation tools, release 12.8, V12.8.93" && exit 0
echo "ptxas fatal   : Unsupported .version 9.0" >&2
exit 255
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a CUDA device of its own")
def test_what_triton_lacks_is_the_reason_and_the_definition_runs(tmp_path: Path) -> None:
    try:
        triton_driver.libraries()
    except RuntimeError as error:
        pytest.skip(str(error))
    ptxas = tmp_path / "ptxas"
    ptxas.write_text(PTXAS)
    ptxas.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "CC")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(ptxas)],
        cwd=fake_cuda.ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert {name: one["reason"] for name, one in found.items()} == {
        "no compiler": "triton finds no C compiler for its launcher: install gcc or clang, or set CC",
        "a compiler that fails": "false returned 1",
        "a ptxas that fails": "PTXASError: PTXAS error: Internal Triton PTX codegen error "
        "ptxas fatal   : Unsupported .version 9.0",
        "no results": "its result is wrong",
        "by name": "its result is wrong",
    }
    by_name = found.pop("by name")
    assert by_name["error"] == "bn_silu: backend 'triton' is set and cannot run: its result is wrong"
    assert [one["error"] for one in found.values()] == [None] * 4
    launched = found.pop("no results")["launches"]
    assert launched == [["bn_silu_apply_kernel", 1]], "once, on the tensors' GPU"
    assert all(one["launches"] == [] for one in found.values())
