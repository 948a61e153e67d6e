"""The fused blocks against their eager definition: values, gradients, statistics, copies, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import yolov9_fast as yf
from yolov9_fast.models import create_model
from yolov9_fast.nn import (
    CSPELAN,
    ELAN,
    SPPCSPC,
    SPPELAN,
    AConv,
    ADown,
    CBFuse,
    CBLinear,
    Conv,
    MPDown,
    RepBottleneck,
    RepConv,
    RepCSP,
)
from yolov9_fast.ops._bn_silu import OPERATOR

pytestmark = pytest.mark.skipif(not OPERATOR.has_kernels(torch.device("cpu")), reason="no compiled bn_silu")

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: Conv(12, 20, 3, 2),
    "conv 1×1": lambda: Conv(12, 20),
    "grouped": lambda: Conv(12, 20, 3, groups=4),
    "rep_conv": lambda: RepConv(12, 20),
    "bottleneck": lambda: RepBottleneck(12, 12),
    "bottleneck without residual": lambda: RepBottleneck(12, 20),
    "csp": lambda: RepCSP(12, 20, 2),
    "elan": lambda: ELAN(12, 20, 16, 8),
    "elan of depth 3": lambda: ELAN(12, 20, 16, 8, elan_depth=3),
    "csp_elan": lambda: CSPELAN(12, 20, 16, 8, csp_depth=2),
    "csp_elan, odd widths": lambda: CSPELAN(12, 7, 10, 6),
    "a_conv": lambda: AConv(12, 20),
    "a_down": lambda: ADown(12, 20),
    "spp_elan": lambda: SPPELAN(12, 20, 6),
    "mp_down": lambda: MPDown(12, 20),
    "sppcspc": lambda: SPPCSPC(12, 10),
}
LAYOUTS = [torch.channels_last, torch.contiguous_format]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    block = BLOCKS[name]()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return block


def run(block: nn.Module, x: Any) -> dict[str, Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = block(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    (y * weights).sum().backward()
    result = {"y": y.detach(), "x.grad": x.grad} | {k: b.clone() for k, b in block.named_buffers()}
    return result | {f"{k}.grad": p.grad for k, p in block.named_parameters()}


def assert_as_exact(fast: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """All entries together at most twice eager's distance from float64, none of them far worse."""
    total = total_own = 0.0
    for key, true in exact.items():
        norm = true.double().norm().item() + 1e-12
        error, own = ((result[key].double() - true.double()).norm().item() / norm for result in (fast, eager))
        assert error <= 4 * own + 4e-6, f"{key}: {error:.3g} against eager's {own:.3g}"
        total, total_own = total + error, total_own + own
    assert total <= 2 * total_own + 1e-6 * len(exact), f"{total:.3g} against eager's {total_own:.3g}"


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(2, 12, 10, 6), (1, 12, 7, 9)])
def test_a_block_is_as_exact_as_its_definition(
    name: str, layout: torch.memory_format, size: tuple[int, ...], device: str
) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(device).contiguous(memory_format=layout)
    with yf.backend("eager"):
        eager = run(build(name).to(device).to(memory_format=layout), x)
        exact = run(build(name).to(device).double(), x.double())
    assert_as_exact(run(build(name).to(device).to(memory_format=layout), x), eager, exact)


@pytest.mark.parametrize("name", BLOCKS)
def test_evaluation_equals_the_definition(name: str, device: str) -> None:
    x = torch.randn(2, 12, 10, 6, device=device)
    block = build(name).to(device).eval()
    with torch.no_grad():
        with yf.backend("eager"):
            expected = block(x)
        with yf.backend(
            OPERATOR.first(torch.device(device)), op="bn_silu"
        ):  # "auto" leaves it to eager, which is faster without gradients
            torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_routing_and_fusion_of_levels(layout: torch.memory_format, device: str) -> None:
    def fuse(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        return CBFuse([1, 0])([linears[0](x), linears[1](y), target])

    linears = [CBLinear(6, [4, 8]).to(device), CBLinear(10, [8]).to(device)]
    inputs = [
        torch.randn(2, 6, 4, 4, device=device),
        torch.randn(2, 10, 2, 2, device=device),
        torch.randn(2, 8, 8, 8, device=device),
    ]
    results = []
    for name in ("auto", "eager"):
        with yf.backend(name):
            leaves = [x.contiguous(memory_format=layout).requires_grad_() for x in inputs]
            y = fuse(*leaves)
            (y * y).sum().backward()
            results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for fast, eager in zip(*results, strict=True):
        torch.testing.assert_close(fast, eager)


def test_nothing_is_copied_inside_a_csp_elan_block() -> None:
    block = build("csp_elan").to(memory_format=torch.channels_last)
    x = torch.randn(4, 12, 40, 40).contiguous(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn(4, 20, 40, 40).contiguous(memory_format=torch.channels_last)
    block(x).backward(gradient)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        block(x).backward(gradient)

    def inside_convolution(event: Any) -> bool:
        while event is not None:
            if event.name == "aten::convolution_backward":
                return True
            event = event.cpu_parent
        return False

    # Maps are what must not move; weights are small. PyTorch's own convolution may fill its results with zeros.
    maps = [event for event in profile.events() if "40, 40]" in str(event.input_shapes)]
    moved = [
        event.name for event in maps if event.name in ("aten::copy_", "aten::cat", "aten::clone", "aten::contiguous")
    ]
    filled = [e.name for e in maps if e.name in ("aten::fill_", "aten::zero_") and not inside_convolution(e)]
    assert len(maps) > 50
    assert not moved
    assert not filled


def unique_saved_bytes(run_forward: Callable[[], Any], parameters: set[int]) -> int:
    """Bytes that autograd keeps for the backward, every storage once, parameters left out."""
    seen: dict[int, tuple[int, Any]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run_forward()
    del output
    return sum(size for size, _ in seen.values())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("yolov9-t", 0.72), ("yolov9-c", 0.70)])
def test_the_backward_keeps_less(name: str, most: float, device: str) -> None:
    model = create_model(name, 80).to(device).to(memory_format=torch.channels_last).train()
    x = torch.rand(1, 3, 64, 64, device=device).contiguous(memory_format=torch.channels_last)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    fused = unique_saved_bytes(lambda: model(x), parameters)
    with yf.backend("eager"):
        eager = unique_saved_bytes(lambda: model(x), parameters)
    assert fused <= most * eager, f"{fused} of {eager} bytes: {fused / eager:.3f}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov9-t", "yolov9-c"])
def test_a_whole_training_graph_is_as_exact_as_eager(name: str, device: str) -> None:
    """Outputs and gradients of the fused graph against the eager one, both measured against float64.

    A batch's error is the median over its tensors. Rounding is amplified through two hundred normalised layers, and
    where it lets a max pool choose another pixel the error of that batch jumps, in either form and by chance. The
    geometric mean over batches compares the forms without that chance.
    """

    def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        output = model.train()(x)
        maps = [*output.main, *output.auxiliary]
        torch.stack([m.square().mean() for m in maps]).sum().backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        return {f"map {i}": m.detach() for i, m in enumerate(maps)} | gradients

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return create_model(name, 3).to(device)

    medians = []
    for seed in (2, 3, 4, 5):
        x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)).to(device)
        fast = step(fresh().to(memory_format=torch.channels_last), x)
        with yf.backend("eager"):
            eager = step(fresh().to(memory_format=torch.channels_last), x)
            exact = step(fresh().double(), x.double())
        assert fast.keys() == eager.keys() == exact.keys()
        errors = [
            [((form[key].double() - true).norm() / (true.norm() + 1e-12)).item() for form in (fast, eager)]
            for key, true in exact.items()
        ]
        medians.append(torch.tensor(errors).median(0).values)
    fast_error, eager_error = torch.stack(medians).log().mean(0).exp().tolist()
    assert fast_error <= 2 * eager_error
    assert fast_error < 0.02
