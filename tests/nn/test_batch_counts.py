"""`num_batches_tracked` counts as with torch's own layers, though the norms of a forward are counted together."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

import yolov9_fast as yf
from yolov9_fast.nn import Conv, sync_batch_norm
from yolov9_fast.nn.sync_batch_norm import counted_together, counting


def counts(model: nn.Module) -> dict[str, int]:
    return {name: int(value) for name, value in model.named_buffers() if name.endswith("num_batches_tracked")}


@pytest.fixture
def additions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many counters each addition was for."""
    found: list[int] = []
    add = torch._foreach_add_

    def noted(tensors: list[Tensor], number: int) -> None:
        found.append(len(tensors))
        add(tensors, number)

    monkeypatch.setattr(sync_batch_norm.torch, "_foreach_add_", noted)
    return found


def test_a_forward_adds_once_for_all_norms(additions: list[int]) -> None:
    model = yf.create_model("gelan-t", 1)
    with yf.backend("cpu", op="bn_silu"):
        model.train()(torch.rand(2, 3, 64, 64))
        model.eval()(torch.rand(2, 3, 64, 64))
        model.train()(torch.rand(2, 3, 64, 64))
    assert set(counts(model).values()) == {2}
    assert additions == [len(counts(model))] * 2


class _Shared(nn.Module):
    """One unit that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.unit, self.other = Conv(4, 4), Conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.unit(self.unit(x)))


def test_a_norm_that_runs_twice_counts_twice(additions: list[int]) -> None:
    model = _Shared()
    with yf.backend("cpu", op="bn_silu"), counted_together(), counted_together():
        model(torch.rand(2, 4, 4, 4))
        assert set(counts(model).values()) == {0}
    assert counts(model) == {"unit.bn.num_batches_tracked": 2, "other.bn.num_batches_tracked": 1}
    assert not additions, "two places of one kernel would add to one counter"


def test_an_exception_and_another_thread_lose_no_count() -> None:
    model, other = _Shared(), _Shared()
    with yf.backend("cpu", op="bn_silu"):
        with pytest.raises(ValueError, match="wrong"), counted_together():
            model(torch.rand(2, 4, 4, 4))
            thread = threading.Thread(target=lambda: other(torch.rand(2, 4, 4, 4)))
            thread.start()
            thread.join()
            assert max(counts(other).values()) == 2, "it counts for itself"
            raise ValueError("wrong")
        assert counts(model) == counts(other)
    assert counting.pending is None


def test_a_cumulative_average_counts_at_once() -> None:
    unit = Conv(4, 4)
    unit.bn.momentum = None
    x = torch.rand(2, 4, 4, 4)
    with yf.backend("cpu", op="bn_silu"), counted_together():
        unit(x)
        assert set(counts(unit).values()) == {1}
    torch.testing.assert_close(unit.bn.running_mean, unit.conv(x).mean((0, 2, 3)))
