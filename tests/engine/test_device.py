"""Devices by name, image preparation, precision, loader processes."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from yolov9_fast.engine.device import (
    autocast,
    automatic_amp,
    cpu_bf16_units,
    default_workers,
    has_bf16,
    inference_model,
    parse_device,
    prepare_images,
    resolve_amp,
    round_image_size,
    single_device,
)
from yolov9_fast.errors import UserError
from yolov9_fast.models import create_model, fuse

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "local_rank", "expected"),
    [
        ("cpu", 0, "cpu"),
        (None, 0, "cuda:0"),
        (None, 2, "cuda:2"),
        ("1", 0, "cuda:1"),
        ("cuda:1", 0, "cuda:1"),
        ("1,3", 0, "cuda:1"),
        ("1,3", 1, "cuda:3"),
        ("0", 3, "cuda:3"),
    ],
)
def test_a_device_is_named_by_index_list_or_cpu(
    device: str | None, local_rank: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert str(parse_device(device, local_rank)) == expected
    if device != "cpu":
        with pytest.raises(UserError, match="device: expected a CUDA index below 4, got 7"):
            parse_device("7")


def test_a_command_of_one_process_takes_one_device() -> None:
    assert single_device("cpu") == CPU
    with pytest.raises(UserError, match="device: expected one device"):
        single_device("0,1")


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_become_floats_in_the_unit_range(channels_last: bool) -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    prepared = prepare_images(images, CPU, channels_last=channels_last)
    assert prepared.dtype == torch.float32
    torch.testing.assert_close(prepared[1, :, 3, 4], torch.tensor([0.0, 0.2, 1.0]))
    assert prepared.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def processor(monkeypatch: pytest.MonkeyPatch, **units: bool) -> None:
    """Make torch say that the processor has these units alone."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, **units}, raising=False)


@pytest.mark.parametrize(
    ("units", "words"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "AVX512-BF16"),
        ({"avx512_bf16": True, "amx_bf16": True}, "AVX512-BF16 and AMX-BF16"),
    ],
)
def test_automatic_precision_on_a_cpu_that_computes_in_bf16(
    units: dict[str, bool], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, **units)
    assert resolve_amp("auto", CPU) == "bf16"
    assert words in automatic_amp(CPU)[1]
    assert has_bf16(CPU)


@pytest.mark.parametrize("units", [{}, {"avx512_bf16": False, "amx_bf16": False}])
def test_automatic_precision_is_off_on_a_cpu_that_emulates_bf16(
    units: dict[str, bool], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    processor(monkeypatch, **units)
    assert automatic_amp(CPU) == ("off", "the processor has neither AVX512-BF16 nor AMX-BF16")
    with caplog.at_level(logging.WARNING, "yolov9_fast"):
        assert resolve_amp("auto", CPU) == "off"
        assert not caplog.records
        assert resolve_amp("bf16", CPU) == "bf16"
    assert caplog.messages == ["amp: cpu emulates bf16, which is slow; off is not"]


@pytest.mark.parametrize("supported", [False, True])
def test_a_torch_without_the_table_of_units_is_asked_otherwise(
    supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    assert cpu_bf16_units() == (["AVX512-BF16"] if supported else [])


def test_autocast_by_name() -> None:
    with autocast(CPU, "bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast(CPU, "off"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize(("size", "rounded"), [(1, 32), (64, 64), (65, 96)])
def test_image_sizes_are_rounded_up_to_multiples_of_32(size: int, rounded: int) -> None:
    assert round_image_size(size) == rounded


@pytest.mark.parametrize("size", [16_416, 10**9, 10**30])
def test_a_size_above_the_limit_of_pixels_is_refused(size: int) -> None:
    with pytest.raises(UserError, match="imgsz: expected at most 268,435,456 pixels"):
        round_image_size(size)
    assert round_image_size(16_384) == 16_384


@pytest.mark.parametrize(
    ("cores", "processes", "batch", "workers"),
    [(1, 1, 16, 0), (4, 1, 16, 3), (4, 2, 16, 1), (64, 1, 16, 8), (64, 1, 2, 2)],
)
def test_loader_processes_use_the_cores_that_are_left(
    cores: int, processes: int, batch: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert default_workers(processes, batch) == workers


def test_the_inference_model_is_a_copy_of_a_fused_model_too() -> None:
    fused = fuse(create_model("gelan-t", 1).eval()).train()
    copy = inference_model(fused, CPU)
    assert copy is not fused
    assert not copy.training
    assert fused.training


def test_weights_in_the_dtype_of_autocast_give_the_same_maps(tiny_graph: Path) -> None:
    torch.manual_seed(0)
    model = create_model(tiny_graph, 3, class_tower=8)
    plain, converted = inference_model(model, CPU), inference_model(model, CPU, "bf16")
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode(), autocast(CPU, "bf16"):
        maps = [each.raw(images, auxiliary=False).main for each in (plain, converted)]
    assert all(torch.equal(own, other) for own, other in zip(*maps, strict=True))
    weights = [module.weight.dtype for module in converted.modules() if isinstance(module, nn.Conv2d)]
    assert set(weights) == {torch.bfloat16}
    assert {module.weight.dtype for module in model.modules() if isinstance(module, nn.Conv2d)} == {torch.float32}
