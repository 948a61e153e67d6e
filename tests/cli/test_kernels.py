"""`yolov9-fast kernels` and `tune` name what is missing."""

from __future__ import annotations

import pytest
import torch

from yolov9_fast.cli.main import main
from yolov9_fast.ops import _probe

pytest.importorskip("triton")


def test_interpreted_kernels_are_not_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["kernels"]) == 2
    assert "TRITON_INTERPRET=1 interprets kernels instead of compiling them; unset it" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_tuning_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 2
    assert "expected a GPU, torch sees none" in capsys.readouterr().err


def test_tuning_where_triton_cannot_run_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(_probe, "tried", lambda backend, index: f"{backend} on {index}: no C compiler")
    assert main(["tune"]) == 2
    assert "tune: triton cannot run on this GPU: triton on 1: no C compiler" in capsys.readouterr().err
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert main(["tune"]) == 2
    assert "tune: for NVIDIA GPUs only, this torch is for AMD's" in capsys.readouterr().err
