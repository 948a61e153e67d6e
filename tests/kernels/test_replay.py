"""A launcher's later calls repeat its first one with their own tensors, numbers and device, and give the same."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from yolov9_fast.kernels import bn_silu, cbfuse, conv1x1, launch, replay
from yolov9_fast.kernels.launch import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="neither a GPU nor interpreted"
)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the launchers whose Python ran, in order."""
    found: list[str] = []
    noted = replay._noted

    def counted(launcher: Any, arguments: Any) -> Any:
        found.append(launcher.__name__)
        return noted(launcher, arguments)

    monkeypatch.setattr(replay, "_noted", counted)
    return found


def map_of(seed: int, channels: int = 8, side: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def plain(launcher: Any, *arguments: Any) -> Any:
    """The launcher's result without notes."""
    with replay.paused():
        return launcher(*arguments)


def unit(seed: int, momentum: float = 0.1, eps: float = 1e-3, **of_map: Any) -> list[Any]:
    x = map_of(seed, **of_map)
    vectors = [torch.rand(x.shape[1], generator=torch.Generator().manual_seed(seed + i)).to(DEVICE) for i in range(4)]
    return [x, *vectors, momentum, eps, None, torch.empty_like(x), True]


def clones(arguments: list[Any]) -> list[Any]:
    return [value.clone() if isinstance(value, Tensor) else value for value in arguments]


@pytest.mark.parametrize("single_pass", [True, False])
def test_later_calls_use_their_own_tensors_and_numbers(
    runs: list[str], single_pass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not single_pass:
        monkeypatch.setattr(bn_silu.bn_silu_single_pass, "tile_of", lambda *arguments: None)
    for seed, momentum, eps in ((0, 0.1, 1e-3), (1, 0.5, 0.25), (2, 0.5, 0.5), (3, 0.125, 0.125)):
        expected, given = unit(seed, momentum, eps), unit(seed, momentum, eps)
        wanted = plain(bn_silu.bn_silu_forward, *expected)
        found = bn_silu.bn_silu_forward(*given)
        for a, b in zip((*wanted, *expected[:5], expected[8]), (*found, *given[:5], given[8]), strict=True):
            assert torch.equal(a, b)
    assert runs == ["bn_silu_forward"]


def test_a_tensor_passed_twice_is_two_tensors_later(runs: list[str]) -> None:
    x, dz, other = map_of(0), map_of(1), map_of(2)
    vectors = [torch.rand(8, device=DEVICE) + 0.5 for _ in range(4)]
    for gradient, values in ((x, x), (dz, x), (other, dz)):
        wanted = plain(bn_silu.bn_silu_backward, gradient, values, *vectors, True)
        found = bn_silu.bn_silu_backward(gradient, values, *vectors, True)
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert runs == ["bn_silu_backward"]


def test_results_of_two_calls_share_no_memory() -> None:
    first = bn_silu.bn_stats(map_of(0))
    kept = [vector.clone() for vector in first]
    second = bn_silu.bn_stats(map_of(1))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert not {vector.data_ptr() for vector in first} & {vector.data_ptr() for vector in second}


def other_forms() -> dict[str, list[Any]]:
    base = unit(0)
    x = base[0]
    wide = torch.zeros(2, 16, 4, 4, device=DEVICE).contiguous(memory_format=torch.channels_last)
    buffer = torch.zeros(x.numel() + 1, device=DEVICE)[1:].as_strided(x.shape, x.stride())
    longer = torch.rand(9, device=DEVICE)
    return {
        "shape": unit(0, side=5),
        "dtype": unit(0, dtype=torch.bfloat16),
        "strides": [x.contiguous(), *base[1:]],
        "a slice": [*base[:8], wide[:, :8], True],
        "an address without alignment": [*base[:8], buffer, True],
        "a vector without alignment": [x, longer[1:], *base[2:]],
        "absent statistics": [*base[:3], None, None, *base[5:]],
        "a residual": [*base[:7], map_of(5), *base[8:]],
        "no activation": [*base[:9], False],
        "weights in bfloat16": [x, base[1].bfloat16(), *base[2:]],
    }


@pytest.mark.parametrize("name", other_forms())
def test_another_form_runs_the_launcher_again(name: str, runs: list[str]) -> None:
    bn_silu.bn_silu_forward(*unit(0))
    for _ in range(2):
        given, expected = other_forms()[name], clones(other_forms()[name])
        torch.manual_seed(0)
        wanted = plain(bn_silu.bn_silu_forward, *expected)
        expected_out = expected[8]
        found = bn_silu.bn_silu_forward(*given)
        if name != "a vector without alignment":  # its values are drawn at each call
            assert torch.equal(given[8], expected_out)
            assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert runs == ["bn_silu_forward"] * 2


def test_copies_and_casts_inside_a_launcher_are_repeated(runs: list[str]) -> None:
    """A map in another layout, vectors in another dtype, more inputs than one launch takes."""
    for seed in range(3):
        x, dz = map_of(seed), map_of(seed + 10).contiguous()
        vectors = [torch.rand(8, generator=torch.Generator().manual_seed(seed)).to(DEVICE).double() for _ in range(4)]
        wanted = plain(bn_silu.bn_silu_backward, dz, x, *vectors, True)
        found = bn_silu.bn_silu_backward(dz, x, *vectors, True)
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
        inputs = [map_of(seed + place, side=2) for place in range(cbfuse.MOST + 2)]
        assert torch.equal(plain(cbfuse.cbfuse_forward, inputs, x), cbfuse.cbfuse_forward(inputs, x))
        weight = torch.randn(4, 8, 1, 1, device=DEVICE)
        channels = [2] * (conv1x1.MOST + 1)
        weight = torch.randn(8, sum(channels), 1, 1, device=DEVICE)
        parts = zip(
            plain(conv1x1.conv1x1_input_grad, x, weight, channels),
            conv1x1.conv1x1_input_grad(x, weight, channels),
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in parts)
    assert sorted(runs) == ["bn_silu_backward", "cbfuse_forward", "conv1x1_input_grad"]


def test_a_setting_that_a_launcher_reads_is_part_of_the_form(runs: list[str]) -> None:
    dy, x = map_of(0, side=2), map_of(1, side=2)
    conv: Any = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        for precision in ("ieee", "tf32", "ieee"):
            conv.fp32_precision = precision
            conv1x1.conv1x1_weight_grad(dy, [x])
    finally:
        conv.fp32_precision = before
    assert len(runs) == 2


def test_a_recording_records_each_call_and_leaves_no_notes(runs: list[str]) -> None:
    given = unit(0)
    bn_silu.bn_silu_forward(*given)
    with launch.recording(90) as seen:
        bn_silu.bn_silu_forward(*given)
        bn_silu.bn_silu_forward(*given)
    assert len(seen) == 2
    assert runs == ["bn_silu_forward"]


def test_an_error_leaves_nothing_behind(runs: list[str]) -> None:
    given = unit(0)
    wrong = [*given[:8], torch.empty(2, 8, 4, 4, device=DEVICE).transpose(2, 3), True]
    for _ in range(2):
        with pytest.raises(ValueError, match="out: expected channels_last"):
            bn_silu.bn_silu_forward(*wrong)
    assert replay.noting.tape is None
    bn_silu.bn_silu_forward(*given)
    assert len(runs) == 3


def test_a_tensor_from_elsewhere_is_never_repeated() -> None:
    table, calls = torch.ones(3), []

    @replay.replayed()
    def launcher(x: Tensor) -> Tensor:
        calls.append(1)
        return x * table

    assert [launcher(torch.full((3,), value)).sum().item() for value in (1.0, 2.0, 3.0)] == [3.0, 6.0, 9.0]
    assert len(calls) == 3


def test_forms_are_not_remembered_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST", 3)
    calls = []

    @replay.replayed()
    def launcher(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return x + 1

    for size in (1, 2, 3, 3, 4, 4, 1):
        assert launcher(torch.zeros(size)).tolist() == [1.0] * size
    assert [shape[0] for shape in calls] == [1, 2, 3, 4, 1]


def test_every_launcher_of_an_operator_is_replayed() -> None:
    from yolov9_fast import ops

    found = 0
    for entry in pkgutil.iter_modules(ops.__path__, "yolov9_fast.ops."):
        load = getattr(importlib.import_module(entry.name), "_triton", None)
        for launcher in load() if load else ():
            assert launcher.__wrapped__.__module__.startswith("yolov9_fast.kernels."), launcher
            found += 1
    assert found > 15
