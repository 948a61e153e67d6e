"""The environment report: what is there, what is missing, what that costs and how to mend it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import yolov9_fast
from yolov9_fast import info
from yolov9_fast.engine import device
from yolov9_fast.ops import _probe
from yolov9_fast.ops._backend import backends
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


class Gpus:
    """A T4 without code for it, and an H100 on which everything runs."""

    names = ("Tesla T4", "NVIDIA H100 80GB HBM3")
    capabilities = ((7, 5), (9, 0))

    def properties(self, device: torch.device) -> SimpleNamespace:
        major, minor = self.capabilities[device.index]
        return SimpleNamespace(name=self.names[device.index], major=major, minor=minor, total_memory=16 * 2**30)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    state = Gpus()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", state.properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: state.capabilities[device.index])
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_probe, "_known", {})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def launch(device: torch.device) -> bool:
        if device.index == 0:
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
        return True

    for backend in _probe.LAUNCHES:
        monkeypatch.setitem(_probe.LAUNCHES, backend, launch)
    for operator in operators.values():
        for name, one in operator.implementations.items():
            if one.probed:
                monkeypatch.setitem(operator.implementations, name, dataclasses.replace(one, unavailable=None))
    for name in _probe.LAUNCHES:
        monkeypatch.setitem(backends, name, dataclasses.replace(backends[name], why_not=lambda: None))
    return state


def section(title: str) -> list[str]:
    parts = info.environment_report().split("\n\n")
    return next(part for part in parts if part.startswith(f"{title}\n")).splitlines()[1:]


def test_each_gpu_is_described_with_the_backends_that_run_on_it(gpus: Gpus, caplog: pytest.LogCaptureFixture) -> None:
    lines = section("GPUs")[1:]
    reason = "RuntimeError: CUDA error: no kernel image is available for execution on the device"
    assert lines[0] == "  cuda:0      Tesla T4, sm_75, 16.0 GiB"
    assert lines[1] == "    bf16      emulated: slow, and `--amp auto` does not take it"
    assert lines[2] == "    TF32      convolutions on, matrix products off; in float32, by torch.backends"
    assert lines[3] == f"    triton    no   {reason}"
    assert lines[4].startswith(f"    cuda      no   {reason}: compiled for ")
    assert lines[4].endswith("this GPU is sm_75; install again with YOLOV9_FAST_CUDA_ARCHS=7.5")
    assert [line.split() for line in lines[5:7]] == [
        ["cuda:1", "NVIDIA", "H100", "80GB", "HBM3,", "sm_90,", "16.0", "GiB"],
        ["bf16", "native"],
    ]
    assert [line.split() for line in lines[8:]] == [["triton", "yes"], ["cuda", "yes"]]
    assert not caplog.records, "the report says it, the log need not"


def test_an_operator_has_a_backend_where_one_gpu_runs_it(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "    triton  yes" in section("Operators")
    monkeypatch.setattr(_probe, "_known", {})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    lines = section("Operators")
    assert "    triton  yes" not in lines
    assert any(
        line.startswith("    triton  no   no GPU runs it: RuntimeError: CUDA error: no kernel") for line in lines
    )


def test_a_gpu_that_cannot_be_used_is_a_line(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def properties(device: torch.device) -> SimpleNamespace:
        if device.index == 0:
            raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nmore")
        return gpus.properties(device)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    lines = section("GPUs")[1:]
    assert lines[0].startswith(
        "  cuda:0      cannot be used: CUDA error: all CUDA-capable devices are busy or unavailable"
    )
    assert lines[1].startswith("  cuda:1      NVIDIA H100")


def test_an_old_driver_is_the_reason_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.199.02  Thu May 11\nGCC version:  gcc version 12"
    driver, read = Path("/proc/driver/nvidia/version"), Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path, *args, **options: text if path == driver else read(path, *args, **options)
    )
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 11040, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert section("GPUs") == [
        "  driver      NVIDIA 470.199.02, for CUDA up to 11.4",
        "  none        torch sees no GPU: The NVIDIA driver on your system is too old (found version 11040).",
    ]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert section("GPUs")[1] == "  none        this torch is built for CPUs"


@pytest.mark.parametrize(
    ("units", "lines"),
    [
        ([], ["emulated: slow", "off: the processor has neither AVX512-BF16 nor AMX-BF16"]),
        (["AVX512-BF16"], ["AVX512-BF16", "bf16: the processor has AVX512-BF16"]),
    ],
)
def test_the_precision_of_auto_on_this_processor_and_why(
    units: list[str], lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (device, info):
        monkeypatch.setattr(module, "cpu_bf16_units", lambda: units)
    assert section("Processor") == [f"  bf16        {lines[0]}", f"  amp auto    {lines[1]}"]
