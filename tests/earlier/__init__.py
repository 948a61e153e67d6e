"""The simulated checks on an earlier commit: what they said before the faults that they show were mended.

    python -m tests.earlier before

takes the package of `COMMIT` out of git into `build/earlier`, compiles its operators for the CPU, runs each check of
`checks.py` on it in a process of its own, and writes what was printed to `bench/results/gpu_checks`. A check asserts
what a test of today asserts, through the functions that the commit has. `now` runs those tests of today; `launches`
and `host-time` write the records of both in `bench/results/traced`.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "ac6b147"
"""The commit whose functions `checks.py` and `trace.py` call."""
TREE = ROOT / "build" / "earlier" / COMMIT
BUILD = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("recipe", "csrc/build.py")
sys.modules["recipe"] = recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)
recipe.build(Path("csrc"), Path("yolov9_fast"), Path("objects"))
"""


def tree() -> Path:
    """The commit's folders, with `kernels` and `bench` inside the package, and its operators for the CPU."""
    if (TREE / "yolov9_fast" / "_C_cpu.so").exists():
        return TREE
    shutil.rmtree(TREE, ignore_errors=True)
    _take_out("yolov9_fast", "csrc", "tests", "pyproject.toml")
    for inner in ("kernels", "bench"):
        _take_out(inner)
        (TREE / inner).rename(TREE / "yolov9_fast" / inner)
    subprocess.run(
        [sys.executable, "-P", "-c", BUILD], cwd=TREE, env=os.environ | {"YOLOV9_FAST_SKIP_CUDA": "1"}, check=True
    )
    return TREE


def _take_out(*paths: str) -> None:
    TREE.mkdir(parents=True, exist_ok=True)
    archive = subprocess.run(["git", "archive", COMMIT, *paths], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x"], cwd=TREE, input=archive, check=True)


def environment(**variables: str) -> dict[str, str]:
    """Of a process of Python that imports the commit's package and today's tests; run it with -P."""
    return os.environ | {"PYTHONPATH": f"{TREE}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", **variables}


def part(name: str) -> ModuleType:
    """A module of the commit's package, which today's need not have."""
    return importlib.import_module(f"yolov9_fast.{name}")
