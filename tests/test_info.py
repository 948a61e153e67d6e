"""The environment report: what is there, what is missing, what that costs and how to mend it."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import yolov9_fast
from yolov9_fast import info
from yolov9_fast.ops._operator import operators


def test_the_report_names_versions_and_every_operator_with_every_backend() -> None:
    report = info.environment_report()
    assert f"yolov9_fast {yolov9_fast.__version__}" in report
    assert torch.__version__ in report
    lines = report.splitlines()
    for name in operators:
        at = next(index for index, line in enumerate(lines) if line.startswith(f"  {name}: "))
        assert [line.split()[0] for line in lines[at + 1 : at + 5]] == ["eager", "cpu", "triton", "cuda"]
        assert lines[at + 1].split() == ["eager", "yes"]


def test_a_missing_package_is_listed_with_its_cost_and_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pycocotools" else found(name))
    line = next(line for line in info.environment_report().splitlines() if "pycocotools" in line)
    assert "missing: no COCO AP" in line
    assert line.endswith("pip install pycocotools")


def test_a_gpu_backend_without_a_gpu_is_no_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cuda = [line.split()[:2] for line in info.environment_report().splitlines() if line.startswith("    cuda ")]
    assert cuda
    assert all(words == ["cuda", "no"] for words in cuda)


def test_variables_that_change_behaviour_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLOV9_FAST_BACKEND", "eager")
    assert "  YOLOV9_FAST_BACKEND=eager" in info.environment_report().splitlines()


def test_a_compiler_that_cannot_be_run_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "compiler    not found" in info.environment_report()
