"""Slots, taps and splits: the same numbers as cat and slicing, and no copy in a block shaped as CSP-ELAN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import yolov9_fast as yf
from tests.devices import backends
from tests.ops.feature_maps import (
    DTYPES,
    LAYOUTS,
    assert_as_exact_as_eager,
    feature_map,
    outputs_and_gradients,
    threads,
)
from yolov9_fast.ops._concat import (
    OPERATOR,
    ConcatBuffer,
    concat_reference,
    placed,
    split_view_reference,
    tap_backward_reference,
    tap_reference,
)

BACKENDS = backends(OPERATOR)
KERNELS = backends(OPERATOR, eager=False, interpreted=False)
needs_cpu = pytest.mark.skipif(OPERATOR.why_not("cpu") is not None, reason=str(OPERATOR.why_not("cpu")))


class Unit(torch.autograd.Function):
    """A producer as the operators are: SiLU(x) written into a slot, its gradient from x alone, read strided."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        torch.mul(x, torch.sigmoid(x), out=slot)
        return slot.view_as(slot)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradient * (s * (1 + x * (1 - s))), None


def csp_elan(x: Tensor, first: Tensor, second: Tensor, last: Tensor) -> Tensor:
    """cv1's unit writes both halves; two stages of a pair of 1×1 and a unit each; the aggregation."""
    half, width = x.shape[1] // 2, first.shape[0] // 2
    buffer = ConcatBuffer.like(x, (half, half, width, width))
    y = Unit.apply(x, buffer.slot(0, 2))
    y, y1 = yf.ops.tap(y, half)
    a, b = yf.ops.conv1x1_pair(y1, *first.split(width))
    y2 = Unit.apply(a + b, buffer.slot(2))
    a, b = yf.ops.conv1x1_pair(y2, *second.split(width))
    y3 = Unit.apply(a + b, buffer.slot(3))
    return yf.ops.conv1x1(buffer.join(y, y2, y3), last)


def csp_elan_reference(x: Tensor, first: Tensor, second: Tensor, last: Tensor) -> Tensor:
    width = first.shape[0] // 2
    y0, y1 = F.silu(x).chunk(2, 1)
    y2 = F.silu(F.conv2d(y1, first[:width]) + F.conv2d(y1, first[width:]))
    y3 = F.silu(F.conv2d(y2, second[:width]) + F.conv2d(y2, second[width:]))
    return F.conv2d(torch.cat((y0, y1, y2, y3), 1), last)


def block_arguments(batch: int = 2, size: int = 5, layout: str = "channels_last", device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(*shape, 1, 1, generator=generator).to(device) / 3 for shape in ((12, 4), (12, 6), (7, 20))]
    x = feature_map(batch, 8, size, size, layout=layout, device=device)
    return [x, *(weight.requires_grad_() for weight in weights)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("batch", "size"), [(2, 5), (1, 4), (1, 1), (3, 1)])
def test_a_block_of_slots_is_the_block_of_copies(layout: str, batch: int, size: int, device: str) -> None:
    arguments = block_arguments(batch, size, layout, device=device)
    expected = outputs_and_gradients("eager", csp_elan_reference, arguments)
    for name in ("auto", "eager"):
        got = outputs_and_gradients(name, csp_elan, arguments)
        for a, b in zip(expected[0] + expected[1], got[0] + got[1], strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


COPIES = ("cat", "copy_", "clone", "contiguous", "_to_copy", "zeros", "new_zeros", "zero_", "fill_", "slice_backward")


class CopiesOfMaps(TorchDispatchMode):
    """Names of the copying and filling operators that ran on maps of `size` pixels."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in COPIES and isinstance(result, Tensor) and result.shape[2:] == (self.size, self.size):
            self.names.append(name)
        return result


@pytest.mark.parametrize(("name", "device"), KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_copy_in_a_block_forward_or_backward(name: str, device: str, layout: str) -> None:
    arguments = block_arguments(layout=layout, device=device)
    weights = torch.randn_like(csp_elan_reference(*arguments))
    names = []
    for call in (csp_elan, csp_elan_reference):
        with yf.backend(name), CopiesOfMaps(5) as mode:
            torch.autograd.grad(call(*arguments), arguments, weights)
        names.append(mode.names)
    assert names[0] == []
    assert "cat" in names[1], "the reference copies, and this sees it"


@needs_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_profiler_sees_no_copy_of_a_map(layout: str) -> None:
    arguments = block_arguments(layout=layout)
    weights = torch.randn_like(csp_elan_reference(*arguments))
    with (
        yf.backend("cpu"),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as run,
    ):
        torch.autograd.grad(csp_elan(*arguments), arguments, weights)
    # Of a list of tensors the profiler records no shapes, and of new_zeros not the result's: those the test above sees.
    names = {f"aten::{name}" for name in COPIES if name not in ("cat", "new_zeros")}
    found = [event.name for event in run.events() if event.name in names and [2, 8, 5, 5] in _maps(event)]
    assert not found
    assert any(event.name == "yolov9_fast::tap_backward" for event in run.events())


def _maps(event: Any) -> list[list[int]]:
    """Shapes of the maps among the arguments, as if all had eight channels."""
    return [[2, 8, *shape[2:]] for shape in event.input_shapes if len(shape) == 4 and shape[2:] == [5, 5]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_parts_are_views_of_the_whole_gradient(layout: str, device: str) -> None:
    x = feature_map(1, 2, 3, 3, layout=layout, device=device)
    buffer = ConcatBuffer.like(x, (2, 3))
    parts = [x, feature_map(1, 3, 3, 3, layout=layout, device=device)]
    seen: list[Tensor] = []
    parts = [part * 1 for part in parts]
    for part in parts:
        part.register_hook(seen.append)
    joined = buffer.join(*parts)
    gradient = torch.randn_like(joined)
    joined.backward(gradient)
    assert {part.untyped_storage().data_ptr() for part in seen} == {gradient.untyped_storage().data_ptr()}


def test_parts_that_are_not_in_their_slots_are_copied_there(device: str) -> None:
    x, other = feature_map(2, 3, 4, 4, device=device), feature_map(2, 2, 4, 4, layout="contiguous", device=device)
    buffer = ConcatBuffer.like(x, (3, 2))
    joined = buffer.join(x, other)
    assert torch.equal(joined, concat_reference([x, other]))
    assert joined.data_ptr() == buffer._buffer.data_ptr()


def test_filling_a_slot_does_not_invalidate_what_was_saved_of_another(device: str) -> None:
    x, weight = feature_map(1, 2, 3, 3, device=device), torch.randn(2, 2, 1, 1, requires_grad=True, device=device)
    buffer = ConcatBuffer.like(x, (2, 2))
    first = Unit.apply(x, buffer.slot(0))
    out = F.conv2d(first, weight)
    second = Unit.apply(out, buffer.slot(1))
    (out.sum() + buffer.join(first, second).sum()).backward()
    assert weight.grad is not None


def test_a_slot_is_returned_once(device: str) -> None:
    buffer = ConcatBuffer.like(feature_map(1, 2, 3, 3, device=device), (2, 3, 4))
    buffer.slot(0, 2)
    with pytest.raises(RuntimeError, match="a slot is written once"):
        buffer.slot(1)
    with pytest.raises(ValueError, match=r"^index: expected slots below 3, got 2 to 3"):
        buffer.slot(2, 2)


def test_a_graph_can_go_backward_twice(device: str) -> None:
    arguments = block_arguments(device=device)
    out = csp_elan(*arguments)
    once = torch.autograd.grad(out.sum(), arguments, retain_graph=True)
    twice = torch.autograd.grad(out.sum(), arguments)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_numbers_are_the_same(mode: Any, device: str) -> None:
    arguments = block_arguments(device=device)
    expected = csp_elan(*arguments)
    with mode():
        assert torch.equal(csp_elan(*arguments), expected)


@pytest.mark.parametrize(("name", "device"), BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tap_as_exact_as_slicing(name: str, device: str, layout: str, dtype: torch.dtype) -> None:
    if name == "triton" and dtype == torch.float64:
        pytest.skip("Triton's kernels compute in float32")

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        # A factor before and after, so that both gradients are new tensors.
        whole, part = yf.ops.tap(x * 1, 3, 4)
        return whole * 1, part * 1

    x = feature_map(2, 9, 4, 3, layout=layout, dtype=dtype, device=device)
    assert_as_exact_as_eager(name, call, [x])
    _whole, part = tap_reference(x, 3, 4)
    assert torch.equal(yf.ops.tap(x, 3, 4)[1], part)
    assert torch.equal(yf.ops.tap(x, 3)[1], x[:, 3:])


@needs_cpu
@pytest.mark.parametrize("layouts", [("channels_last", "contiguous"), ("contiguous", "channels_last")])
def test_tap_adds_gradients_of_two_layouts(layouts: Sequence[str], device: str) -> None:
    whole = feature_map(2, 5, 3, 4, layout=layouts[0], sliced=True, device=device).detach()
    part = feature_map(2, 2, 3, 4, seed=1, layout=layouts[1], device=device).detach()
    got = torch.ops.yolov9_fast.tap_backward(whole, part, 2)
    assert torch.equal(got, tap_backward_reference(whole, part, 2))


@pytest.mark.parametrize("used", [0, 1])
def test_a_tap_with_one_consumer(used: int, device: str) -> None:
    x = feature_map(1, 5, 2, 2, device=device)
    yf.ops.tap(x, 2)[used].sum().backward()
    expected = torch.ones(1, 5, 2, 2, device=device)
    expected[:, :2] = 1 - used
    assert x.grad is not None
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("used", [(0, 1, 2), (1,), (0, 2)])
def test_splits_as_slicing(layout: str, used: Sequence[int], device: str) -> None:
    gradients = []
    for split in (yf.ops.split_view, split_view_reference):
        x = feature_map(2, 6, 3, 2, layout=layout, device=device)
        parts = split(x, (1, 2, 3))
        assert [part.shape[1] for part in parts] == [1, 2, 3]
        sum((parts[index] * (index + 1)).square().sum() for index in used).backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adjacent_gradients_are_not_copied(layout: str, device: str) -> None:
    x = feature_map(2, 6, 3, 2, layout=layout, device=device)
    seen: list[Tensor] = []
    inner = x * 1
    inner.register_hook(seen.append)
    joined = yf.ops.concat(yf.ops.split_view(inner, (1, 5)))
    assert joined.data_ptr() == inner.data_ptr()
    gradient = torch.randn_like(joined)
    joined.backward(gradient)
    assert seen[0].data_ptr() == gradient.data_ptr()
    assert torch.equal(seen[0], gradient)


def test_concat_of_parts_from_elsewhere_is_the_concatenation(device: str) -> None:
    parts = [feature_map(1, 2, 3, 3, device=device), feature_map(1, 1, 3, 3, device=device)]
    assert torch.equal(yf.ops.concat(parts), concat_reference(parts))
    # Neighbours in memory, not in the order of the channels.
    whole = feature_map(1, 4, 3, 3, device=device)
    parts = [whole[:, 2:], whole[:, :2]]
    assert torch.equal(yf.ops.concat(parts), concat_reference(parts))


@needs_cpu
def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    arguments = block_arguments(size=40)
    with threads(1):
        one = outputs_and_gradients("cpu", csp_elan, arguments)
    with threads(2):
        two = outputs_and_gradients("cpu", csp_elan, arguments)
    assert torch.equal(one[1][0], two[1][0])


def test_gradcheck_once_and_twice() -> None:
    def call(x: Tensor, other: Tensor) -> Tensor:
        whole, part = yf.ops.tap(x, 1)
        first, second = yf.ops.split_view(part * part, (1, 1))
        buffer = ConcatBuffer.like(x, (3, 1, 1))
        return buffer.join(whole, first * other, second) ** 2

    x, other = feature_map(1, 3, 2, 2, dtype=torch.float64), feature_map(1, 1, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(call, [x, other])
    assert torch.autograd.gradgradcheck(call, [x, other])


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(1, 4, 3, 3)
    buffer = ConcatBuffer.like(x, (2, 3))
    with pytest.raises(ValueError, match=r"^parts: expected 5 channels in total, got 2"):
        buffer.join(x[:, :2])
    with pytest.raises(ValueError, match=r"^parts\[0\]: expected to end at one of the channels \[2, 5\], got 4"):
        buffer.join(x)
    with pytest.raises(ValueError, match=r"^parts\[0\]: expected torch.float32 on cpu, got torch.float64"):
        buffer.join(x[:, :2].double())
    with pytest.raises(ValueError, match=r"^channels: expected positive numbers"):
        ConcatBuffer.like(x, (2, 0))
    with pytest.raises(ValueError, match=r"^start, channels: expected channels below 4, got 3 to 4"):
        yf.ops.tap(x, 3, 2)
    with pytest.raises(ValueError, match=r"^sizes: expected positive numbers with the sum 4, got \[1, 2\]"):
        yf.ops.split_view(x, [1, 2])
    with pytest.raises(ValueError, match=r"^parts: expected at least one tensor"):
        yf.ops.concat([])
    with pytest.raises(ValueError, match=r"^parts\[1\]: expected the shape of parts\[0\]"):
        yf.ops.concat([x, torch.zeros(1, 4, 3, 4)])


@needs_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    whole = feature_map(2, 5, 3, 4, layout=layout).detach()
    part = feature_map(2, 2, 3, 4, layout=layout, sliced=True).detach()
    torch.library.opcheck(torch.ops.yolov9_fast.tap_backward.default, (whole, part, 1))


@needs_cpu
@pytest.mark.slow
def test_a_block_compiles_in_one_graph() -> None:
    arguments = block_arguments(1, 3)
    expected = outputs_and_gradients("cpu", csp_elan_reference, arguments)

    def block(x: Tensor, first: Tensor, second: Tensor, last: Tensor) -> Tensor:
        half = x.shape[1] // 2
        buffer = ConcatBuffer.like(x, (half, half, 6, 6))
        y, y1 = yf.ops.tap(placed(F.silu(x), buffer.slot(0, 2)), half)
        a, b = yf.ops.conv1x1_pair(y1, *first.split(6))
        y2 = placed(F.silu(a + b), buffer.slot(2))
        a, b = yf.ops.conv1x1_pair(y2, *second.split(6))
        y3 = placed(F.silu(a + b), buffer.slot(3))
        return yf.ops.conv1x1(buffer.join(y, y2, y3), last)

    got = outputs_and_gradients("cpu", torch.compile(block, fullgraph=True), arguments)
    for a, b in zip(expected[0] + expected[1], got[0] + got[1], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
