"""GELAN over computational blocks: the paper's, registered ones, and ones named by import path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import yolov9_fast as yf
from yolov9_fast.nn import CSPELAN, GELAN, Conv, block_names, gelan, load_block, register_block, registry


@pytest.fixture(autouse=True)
def forget_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_specs", dict(registry._specs))


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the working folder that is not on the import path."""
    (tmp_path / "blocks_of_a_user.py").write_text(
        "from yolov9_fast.nn import Conv\nclass Mine(Conv):\n    def __init__(self, a, b, depth):\n"
        "        super().__init__(a, b, 2 * depth + 1)\nNUMBER = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    yield "blocks_of_a_user"
    sys.modules.pop("blocks_of_a_user", None)


def test_csp_elan_is_gelan_over_csp() -> None:
    torch.manual_seed(0)
    first = CSPELAN(16, 24, 16, 8, 2, 3)
    torch.manual_seed(0)
    second = GELAN(16, 24, 16, 8, "csp", 2, 3)
    assert first.state_dict().keys() == second.state_dict().keys()
    x = torch.randn(2, 16, 9, 7)
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("block", ["conv", "res", "dark", "csp"])
@pytest.mark.parametrize("widths", [(16, 8), (32, 8)], ids=["equal widths", "first stage changes width"])
def test_fused_blocks_equal_the_definition_with_gradients(block: str, widths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = GELAN(12, 20, *widths, block, 2, 2).double().train()
    x = torch.randn(2, 12, 10, 6, dtype=torch.float64)
    results = []
    for backend in ("eager", "auto"):
        with yf.backend(backend):
            module.zero_grad()
            inputs = x.clone().requires_grad_()
            out = module(inputs)
            out.square().sum().backward()
            results.append((out.detach(), inputs.grad, [p.grad for p in module.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


def test_depth_is_the_number_of_units() -> None:
    assert [len(gelan.DarkBlock(8, 8, depth)) for depth in (1, 3)] == [1, 3]
    assert [len(gelan.ConvBlock(8, 8, depth)) for depth in (1, 3)] == [1, 3]


def test_a_registered_block_is_used_by_name() -> None:
    @register_block("twice")
    def twice(in_channels: int, out_channels: int, depth: int) -> nn.Module:
        return nn.Sequential(*(Conv(in_channels if i == 0 else out_channels, out_channels) for i in range(2 * depth)))

    assert "twice" in block_names()
    module = GELAN(8, 8, 8, 4, "twice", 2)
    assert len(module.cv2[0]) == 4
    assert module(torch.randn(1, 8, 4, 4)).shape == (1, 8, 4, 4)


def test_a_name_is_taken_once() -> None:
    register_block("same")(Conv)
    register_block("same")(Conv)
    with pytest.raises(ValueError, match="already registered"):
        register_block("same")(CSPELAN)
    with pytest.raises(ValueError, match="already registered"):
        register_block("csp")(Conv)


def test_an_import_path_is_loaded_from_the_working_folder(user_module: str) -> None:
    block = load_block(f"{user_module}:Mine")
    assert block.make(4, 6, 1)(torch.randn(1, 4, 5, 5)).shape == (1, 6, 5, 5)


def test_building_a_network_imports_nothing(user_module: str) -> None:
    """Graphs come inside weights files too; those must not be able to run code."""
    with pytest.raises(ValueError, match="not loaded; import blocks_of_a_user first"):
        GELAN(8, 8, 8, 4, f"{user_module}:Mine")
    assert user_module not in sys.modules
    load_block(f"{user_module}:Mine")
    GELAN(8, 8, 8, 4, f"{user_module}:Mine")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "unknown block 'nothing'; known are .*conv, csp, dark, res"),
        ("no_such_module_here:Block", "cannot import 'no_such_module_here'"),
        ("blocks_of_a_user:Missing", "no class or function Missing"),
        ("blocks_of_a_user:NUMBER", "no class or function NUMBER"),
        ("os.path/../x", "unknown block"),
    ],
)
def test_unknown_blocks_are_named(user_module: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_block(name)


class _WrongChannels(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, depth: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1]


class _Fails(_WrongChannels):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("inside")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (_WrongChannels, r"expected \[1, 4, 32, 32\].*got \[1, 1, 32, 32\]"),
        (_Fails, "fails on .*KeyError"),
        (lambda a, b, depth: 3, "expected a Module, got int"),
    ],
)
def test_a_block_that_breaks_its_promise_is_named_when_it_is_built(block: gelan.Block, message: str) -> None:
    register_block("wrong")(block)
    with pytest.raises(ValueError, match=message):
        GELAN(8, 8, 8, 4, "wrong")
