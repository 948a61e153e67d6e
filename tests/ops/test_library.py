"""Compiled files that are missing, damaged or of another machine: a reason for `info`, never an error at import."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from yolov9_fast.ops import _library as library


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(library, "PACKAGE_FOLDER", tmp_path)
    monkeypatch.delenv("YOLOV9_FAST_SKIP_LOADING", raising=False)
    return tmp_path


def test_a_package_that_was_never_installed(package: Path) -> None:
    assert library.build_info() == {}
    assert library._load("cpu", {}) == "not compiled: the package was not installed (pip install)"


def test_an_uncompiled_tree_says_so_once_and_in_the_report(tmp_path: Path) -> None:
    source, installed = tmp_path / "clone", tmp_path / "site"
    (installed / "yolov9_fast").mkdir(parents=True)
    (installed / "yolov9_fast" / "_build_info.json").write_text("{}")
    ignored = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    shutil.copytree(Path(library.__file__).parents[1], source / "yolov9_fast", ignore=ignored)
    code = "import yolov9_fast.ops, yolov9_fast.info as info; print(*info._build(), sep=chr(10))"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    environment.pop("YOLOV9_FAST_SKIP_LOADING", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True, timeout=120
    )
    expected = f"{source / 'yolov9_fast'} is not compiled: all operators run in eager PyTorch; "
    expected += f"start Python in another folder to use the installation in {installed / 'yolov9_fast'}\n"
    assert done.stderr == expected
    assert done.stdout.startswith(expected)


def test_only_an_uncompiled_tree_says_so(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setitem(library.loaded, "cpu", "not compiled: the package was not installed (pip install)")
    assert str(library.uncompiled_tree()).endswith("compile with `pip install`")
    for reason in (None, "YOLOV9_FAST_SKIP_LOADING is set", "_C_cpu.so cannot be loaded: x"):
        monkeypatch.setitem(library.loaded, "cpu", reason)
        assert library.uncompiled_tree() is None
    monkeypatch.setitem(library.loaded, "cpu", "not compiled: no compiler")
    (package / "_build_info.json").write_text('{"parts": {}}')
    assert library.uncompiled_tree() is None


def test_a_part_that_the_installation_could_not_compile_keeps_its_reason(package: Path) -> None:
    (package / "_build_info.json").write_text('{"parts": {"cuda": {"file": null, "reason": "no nvcc on PATH"}}}')
    assert library._load("cuda", library.build_info()) == "not compiled: no nvcc on PATH"


def test_a_damaged_file_is_a_reason(package: Path) -> None:
    (package / "_C_cpu.so").write_bytes(b"no library")
    reason = library._load("cpu", {})
    assert reason is not None
    assert reason.startswith("_C_cpu.so cannot be loaded: ")


def test_a_file_for_vector_units_that_this_cpu_lacks_is_not_loaded(package: Path) -> None:
    (package / "_C_cpu.so").write_bytes(b"would stop the process with an illegal instruction")
    reason = library._load("cpu", {"cpu_features": ["avx4096"]})
    assert reason is not None
    assert "a CPU with avx4096" in reason
    assert "YOLOV9_FAST_PORTABLE=1" in reason


def test_a_file_of_another_architecture_is_not_loaded(package: Path) -> None:
    (package / "_C_cuda.so").write_bytes(b"")
    reason = library._load("cuda", {"machine": "riscv64"})
    assert reason is not None
    assert reason.startswith("compiled for riscv64, this machine is ")


def test_a_damaged_build_report_counts_as_none(package: Path) -> None:
    (package / "_build_info.json").write_text("[1, 2")
    assert library.build_info() == {}


def test_a_defined_operator_runs_and_traces_without_a_compiled_form() -> None:
    def reference(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    double = library.define("test_double(Tensor x) -> Tensor", fake=torch.empty_like, reference=reference)
    x = torch.arange(3.0)
    assert torch.equal(double(x), x * 2)
    assert double(x.to("meta")).shape == (3,)
    assert library.why_not_compiled("test_double", "cpu") is not None
    torch.library.opcheck(torch.ops.yolov9_fast.test_double.default, (x,))
