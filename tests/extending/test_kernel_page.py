"""What docs/extending/kernel.md says, done exactly so."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import yolov9_fast as yf
from tests.extending.pages import code_blocks, write_files
from tests.ops.feature_maps import LAYOUTS, assert_as_exact_as_eager, feature_map
from yolov9_fast import ops
from yolov9_fast.ops._operator import operators

PAGE = "kernel.md"


@pytest.fixture
def shifted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The imported module of the page; its implementation is removed at the end."""
    write_files(PAGE, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(operators["adown_pool"].implementations)
    yield importlib.import_module("shifted")
    ops.unregister_implementation("adown_pool", "cpu")
    assert operators["adown_pool"].implementations == before


@pytest.fixture
def diou() -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    before = ops.list_operators()
    names: dict[str, Any] = {}
    exec(code_blocks(PAGE, "python")[1], names)
    yield names["diou"]
    ops.unregister_operator("box_diou")
    assert ops.list_operators() == before


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", [True, False])
def test_the_kernel_and_its_gradient_are_as_exact_as_the_reference(shifted: Any, layout: str, split: bool) -> None:
    x = feature_map(2, 6, 7, 8, layout=layout, sliced=True)
    assert_as_exact_as_eager("cpu", lambda x: yf.ops.adown_pool(x, split), [x])
    with yf.backend("cpu"):
        for result in yf.ops.adown_pool(x, split):
            assert result is None or result.is_contiguous(memory_format=LAYOUTS[layout])


def test_the_kernel_runs_under_auto(shifted: Any) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yf.ops.adown_pool(torch.randn(1, 4, 6, 6))
    assert any(event.key.startswith("yolov9_fast::adown_pool_forward_cpu_") for event in profile.key_averages())


def test_the_kernel_compiles_in_one_graph(shifted: Any) -> None:
    x = torch.randn(1, 4, 6, 6)
    with yf.backend("cpu"):
        compiled = torch.compile(yf.ops.adown_pool, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), yf.ops.adown_pool(x))


def test_a_block_restores_the_registered_implementation(shifted: Any) -> None:
    registered = operators["adown_pool"].implementations["cpu"]
    with ops.implementation("adown_pool", "cpu", ops.reference("adown_pool")):
        assert operators["adown_pool"].found("cpu") is not registered
    assert operators["adown_pool"].found("cpu") is registered


def test_kernels_that_the_operator_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="kernels: expected some of forward, backward, got sideways"):
        ops.register_implementation("adown_pool", "cpu", kernels={"sideways": torch.relu})
    with pytest.raises(ValueError, match="backend: expected one registered for adown_pool, got 'cpu'"):
        ops.unregister_implementation("adown_pool", "cpu")


def test_the_new_operator_runs_and_takes_implementations(diou: Callable[[Tensor, Tensor], Tensor]) -> None:
    a, b = torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[0.0, 0.0, 2.0, 2.0], [2.0, 0.0, 4.0, 2.0]])
    # The centres of the second pair are 2 apart, the diagonal of the box around both is √20.
    torch.testing.assert_close(diou(a, b), torch.tensor([[1.0, -0.2]]))
    a.requires_grad_()
    diou(a, b).sum().backward()
    assert a.grad is not None
    with ops.implementation("box_diou", "cpu", lambda a, b: torch.zeros(len(a), len(b))):
        assert not diou(a, b).any()
        with yf.backend("eager", "box_diou"):
            assert diou(a, b).any()


def test_built_in_operators_stay() -> None:
    with pytest.raises(ValueError, match="name: expected a registered operator, got 'nms'"):
        ops.unregister_operator("nms")
