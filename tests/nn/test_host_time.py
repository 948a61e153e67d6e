"""From how large a map on "auto" runs a block fused on a GPU. With a device: `tests/fake_cuda/test_host_time.py`."""

from __future__ import annotations

import math

import pytest
import torch

import yolov9_fast as yf
from yolov9_fast.errors import UserError
from yolov9_fast.models import create_model
from yolov9_fast.nn import host_time, plan


def test_a_map_is_large_enough_when_its_saved_bytes_take_the_gpu_longer_than_the_host() -> None:
    for gradients, (microseconds, passes) in ((True, host_time.TRAINING), (False, host_time.INFERENCE)):
        saved = host_time.least_bytes(gradients) * passes
        assert saved / host_time.BYTES_PER_SECOND == pytest.approx(microseconds * 1e-6)
        assert 10e6 < host_time.least_bytes(gradients) < 200e6


def test_the_variable_replaces_the_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    default = host_time.least_bytes(True)
    monkeypatch.setenv(host_time.VARIABLE, str(2 * host_time.TRAINING[0]))
    assert host_time.least_bytes(True) == pytest.approx(2 * default)
    monkeypatch.setenv(host_time.VARIABLE, "0")
    assert host_time.least_bytes(True) == host_time.least_bytes(False) == 0


@pytest.mark.parametrize("text", ["fast", "-1", "nan", "inf"])
def test_another_value_is_an_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(host_time.VARIABLE, text)
    with pytest.raises(UserError, match=f"{host_time.VARIABLE}: expected microseconds, 0 or more, got '{text}'"):
        host_time.least_bytes(True)


def test_no_size_matters_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(host_time.VARIABLE, "1e9")
    x = torch.zeros(1, 1, 1, 1)
    assert plan._least_bytes(x) in (0.0, math.inf)
    assert not host_time.is_captured(x)


@pytest.mark.parametrize("least", [10_000.0, 20_000.0, 40_000.0])
def test_large_and_small_blocks_of_one_network_agree(least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are large enough, so parts of maps are not joined; blocks that read them are not."""
    torch.manual_seed(0)
    model = create_model("gelan-t", 3).train()
    images = torch.rand(2, 3, 64, 64)
    assert images.nbytes > 40_000
    with yf.backend("eager"):
        expected = model(images).main
    sizes: list[bool] = []
    fused = plan.fused

    def noted(x: object) -> bool:
        sizes.append(fused(x))
        return sizes[-1]

    monkeypatch.setattr(plan, "_decisions", {})
    monkeypatch.setattr(plan, "_least_bytes", lambda x: least)
    monkeypatch.setattr(plan, "fused", noted)
    found = model(images).main
    assert {True, False} <= set(sizes)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
