"""The compiled detection_loss, on the CPU and by emulated CUDA blocks, against eager and float64 autograd."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import yolov9_fast as yf
from tests.ops import CASES, emulated
from yolov9_fast.ops import Assignment, detection_loss
from yolov9_fast.ops import _library as library
from yolov9_fast.ops._decode import with_one_pixel_stride
from yolov9_fast.ops._detection_loss import OPERATOR, LossOptions, detection_loss_reference

REASON = OPERATOR.why_not("cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no compiled detection_loss: {REASON}")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Case(NamedTuple):
    maps: list[Tensor]
    assignment: Assignment
    labels: Tensor
    boxes: Tensor
    normaliser: Tensor
    options: LossOptions

    def to(self, dtype: torch.dtype) -> Case:
        """The same values in `dtype`; the maps keep their memory format."""
        weight = self.assignment.weight.to(dtype)
        return Case(
            [level.to(dtype) for level in self.maps],
            Assignment(self.assignment.gt_index, weight),
            self.labels,
            self.boxes.to(dtype),
            self.normaliser.to(dtype),
            self.options,
        )

    def fixed(self) -> tuple[Assignment, Tensor, Tensor, Tensor]:
        return self.assignment, self.labels, self.boxes, self.normaliser

    def kernel_maps(self) -> list[Tensor]:
        return [with_one_pixel_stride(level) for level in self.maps]

    def kernel_arguments(self) -> tuple[object, ...]:
        """The arguments of the kernels after the maps."""
        return *self.assignment, self.labels, self.boxes, self.normaliser, *self.options


def in_layout(level: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return level.to(memory_format=torch.channels_last)
    if layout == "slice":  # channels out of a wider map
        wide = torch.full((level.shape[0], level.shape[1] + 3, *level.shape[2:]), math.nan, dtype=level.dtype)
        wide[:, 2:-1] = level
        return wide[:, 2:-1]
    if layout == "crop":  # rows of pixels with gaps between them
        wide = torch.full((*level.shape[:3], level.shape[3] + 2), math.nan, dtype=level.dtype)
        wide[..., 1:-1] = level
        return wide[..., 1:-1]
    return level


def random_case(seed: int, dtype: torch.dtype = torch.float32) -> Case:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, classes, objects = draw.randint(1, 3), draw.choice((1, 2, 3, 17, 33)), draw.choice((0, 1, 1, 4))
    strides = tuple((8, 16, 32)[: draw.randint(1, 3)])
    sizes = [(draw.randint(1, 5), draw.randint(1, 5)) for _ in strides]
    layout = draw.choice(("contiguous", "channels_last", "slice", "crop"))
    spread = draw.choice((0.1, 1.0, 4.0, 30.0))
    maps = [
        in_layout((torch.randn(batch, 64 + classes, *size, generator=generator) * spread).to(dtype), layout)
        for size in sizes
    ]
    anchors = sum(h * w for h, w in sizes)
    assigned = (torch.rand(batch, anchors, generator=generator) < draw.random()) & (objects > 0)
    index = torch.randint(0, max(objects, 1), (batch, anchors), generator=generator)
    weight = torch.rand(batch, anchors, generator=generator) * draw.choice((0.0, 1.0, 1.0))
    corner = torch.rand(batch, objects, 2, generator=generator) * 40 - 5
    side = torch.rand(batch, objects, 2, generator=generator) * draw.choice((0.0, 30.0, 600.0))
    real = torch.promote_types(dtype, torch.float32)
    options = LossOptions(
        strides,
        draw.choice((1.0, 1.0, 2.5)),
        draw.choice((0.0, 0.0, 0.1)),
        draw.choice((0.0, 0.0, 1.5, 2.0)),
        draw.choice(((1.0, 1.0, 1.0), (7.5, 0.5, 1.5), (0.0, 1.0, 0.0))),
    )
    return Case(
        maps,
        Assignment(torch.where(assigned, index, -1), (weight * assigned).to(real)),
        torch.randint(0, classes, (batch, objects), generator=generator),
        torch.cat((corner, corner + side), 2).to(real),
        torch.tensor(draw.choice((1.0, 3.7)), dtype=real),
        options,
    )


def eager(case: Case, upstream: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    leaves = [level.detach().clone().requires_grad_() for level in case.maps]
    items = detection_loss_reference(leaves, *case.fixed(), case.options)
    d_items = torch.ones_like(items) if upstream is None else upstream.to(items.dtype)
    return items.detach(), list(torch.autograd.grad(items, leaves, d_items))


def compiled(case: Case, upstream: Tensor | None = None, backend: str = "cpu") -> tuple[Tensor, list[Tensor]]:
    leaves = [level.detach().requires_grad_() for level in case.maps]
    strides, class_pos_weight, smoothing, gamma, gains = case.options
    with yf.backend(backend):
        items = detection_loss(
            leaves,
            *case.fixed(),
            strides=strides,
            class_pos_weight=class_pos_weight,
            label_smoothing=smoothing,
            focal_gamma=gamma,
            gains=gains,
        )
    d_items = torch.ones_like(items) if upstream is None else upstream.to(items.dtype)
    return items.detach(), list(torch.autograd.grad(items, leaves, d_items))


def by_blocks(
    case: Case, gradient: bool, threads: int, shuffle: int, upstream: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Items and gradients by emulated CUDA blocks of `threads`, in an order given by `shuffle`."""
    operator = emulated.operators().detection_loss
    items, gradients = operator(upstream, case.kernel_maps(), *case.kernel_arguments(), gradient, threads, shuffle)
    return items, gradients


def errors(got: Sequence[Tensor], exact: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a.double() - b).abs().max() for a, b in zip(got, exact, strict=True)])


def assert_as_good_as_eager(got: tuple[Tensor, list[Tensor]], case: Case, upstream: Tensor | None = None) -> None:
    """The error against float64 is at most twice that of eager in the same dtype, plus float32's rounding."""
    items, gradients = got
    exact_items, exact_gradients = eager(case.to(torch.float64), upstream)
    own_items, own_gradients = eager(case, upstream)
    allowed = 2 * (own_items.double() - exact_items).abs() + 3e-7 * exact_items.abs() + 1e-30
    assert ((items.double() - exact_items).abs() <= allowed).all(), (items, own_items, exact_items)
    scale = torch.stack([each.abs().max() for each in exact_gradients])
    error, own = errors(gradients, exact_gradients), errors(own_gradients, exact_gradients)
    assert (error <= 2 * own + 3e-7 * scale + 1e-30).all(), (error, own, scale)


@pytest.mark.slow
def test_random_cases_agree_with_eager() -> None:
    for seed in range(CASES):
        case = random_case(seed)
        items, gradients = compiled(case)
        own_items, own_gradients = eager(case)
        torch.testing.assert_close(items, own_items, rtol=2e-5, atol=2e-5, msg=lambda text, s=seed: f"seed {s}: {text}")
        for got, own in zip(gradients, own_gradients, strict=True):
            bound = 2e-5 * max(1.0, own.abs().max().item())
            torch.testing.assert_close(got, own, rtol=1e-4, atol=bound, msg=lambda text, s=seed: f"seed {s}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_float64_is_at_most_twice_that_of_eager(dtype: torch.dtype) -> None:
    upstream = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    for seed in range(60):
        case = random_case(10_000 + seed, dtype)
        assert_as_good_as_eager(compiled(case), case)
        assert_as_good_as_eager(compiled(case, upstream), case, upstream)


def test_float64_maps_are_computed_in_float64() -> None:
    for seed in range(100):
        case = random_case(20_000 + seed, torch.float64)
        (items, gradients), (exact, exact_gradients) = compiled(case), eager(case)
        torch.testing.assert_close(items, exact, rtol=1e-10, atol=1e-12)
        for got, own in zip(gradients, exact_gradients, strict=True):
            torch.testing.assert_close(got, own, rtol=1e-7, atol=1e-10)


def test_gradcheck_in_float64() -> None:
    case = random_case(5, torch.float64)
    # Without the box term: complete IoU treats α as a constant, so its gradient is not that of its value.
    with yf.backend("cpu"):
        maps = [level.detach().contiguous().requires_grad_() for level in case.maps[:1]]
        anchors = maps[0].shape[2] * maps[0].shape[3]
        part = Assignment(*(each[:, :anchors] for each in case.assignment))
        assert torch.autograd.gradcheck(
            lambda x: detection_loss([x], part, case.labels, case.boxes, case.normaliser, strides=(8,))[1:], maps
        )


@pytest.mark.parametrize(("threads", "shuffle"), [(1, 0), (3, 1), (32, 2), (256, 3)])
def test_emulated_blocks_agree_with_the_cpu(threads: int, shuffle: int) -> None:
    for seed in range(75):
        case = random_case(30_000 + seed)
        items, gradients = by_blocks(case, True, threads, shuffle)
        expected, own = compiled(case)
        torch.testing.assert_close(items, expected, rtol=3e-6, atol=1e-6)
        for a, b in zip(gradients, own, strict=True):
            assert torch.equal(a, b)
        upstream = torch.tensor([0.5, 2.0, 3.0])
        _, gradients = by_blocks(case, True, threads, shuffle, upstream)
        for a, b in zip(gradients, compiled(case, upstream)[1], strict=True):
            assert torch.equal(a, b)
        alone, none = by_blocks(case, False, threads, shuffle)
        assert torch.equal(alone, items)
        assert not none


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_emulated_blocks_take_every_dtype(dtype: torch.dtype) -> None:
    for seed in range(20):
        case = random_case(40_000 + seed, dtype)
        items, gradients = by_blocks(case, True, 64, 1)
        torch.testing.assert_close(items, compiled(case)[0], rtol=3e-6, atol=1e-6)
        for level, each in zip(case.maps, gradients, strict=True):
            assert each.dtype == dtype
            assert each.shape == level.shape


def test_an_index_out_of_range_is_an_error_on_the_cpu_and_nan_on_the_gpu() -> None:
    case = next(each for each in map(random_case, range(100)) if (each.assignment.gt_index >= 0).any())
    invalid = case._replace(labels=torch.full_like(case.labels, 1000))
    with pytest.raises(ValueError, match="gt_labels: expected classes in"):
        compiled(invalid)
    items, _ = by_blocks(invalid, False, 32, 0)
    assert items[1].isnan()


def test_gradients_have_the_memory_format_of_their_maps() -> None:
    level = torch.randn(2, 70, 4, 3).to(memory_format=torch.channels_last)
    case = Case([level], Assignment(torch.full((2, 12), -1), torch.zeros(2, 12)), torch.zeros(2, 0, dtype=torch.long),
                torch.zeros(2, 0, 4), torch.tensor(1.0), LossOptions((8,)))  # fmt: skip
    assert compiled(case)[1][0].is_contiguous(memory_format=torch.channels_last)
    plain = case._replace(maps=[level.contiguous()])
    assert compiled(plain)[1][0].is_contiguous()
    assert torch.equal(compiled(plain)[1][0], compiled(case)[1][0])


def test_without_objects_the_bins_have_no_gradient() -> None:
    level = torch.randn(2, 67, 3, 3)
    case = Case([level], Assignment(torch.full((2, 9), -1), torch.zeros(2, 9)), torch.zeros(2, 0, dtype=torch.long),
                torch.zeros(2, 0, 4), torch.tensor(1.0), LossOptions((8,)))  # fmt: skip
    items, (gradient,) = compiled(case)
    assert items[0] == items[2] == 0
    assert gradient[:, :64].count_nonzero() == 0
    torch.testing.assert_close(gradient[:, 64:], level[:, 64:].sigmoid())


def test_a_batch_without_images_is_zero() -> None:
    nothing = Assignment(torch.zeros(0, 9, dtype=torch.long), torch.zeros(0, 9))
    case = Case([torch.zeros(0, 67, 3, 3)], nothing, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2, 4),
                torch.tensor(1.0), LossOptions((8,)))  # fmt: skip
    assert compiled(case)[0].tolist() == [0, 0, 0]
    assert by_blocks(case, True, 32, 0)[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channel", [0, 20, 64, 66])
@pytest.mark.parametrize("focal_gamma", [0.0, 2.0])
def test_logits_that_are_not_finite_agree_with_eager(bad: float, channel: int, focal_gamma: float) -> None:
    level = torch.randn(1, 67, 2, 2, generator=torch.Generator().manual_seed(0))
    level[0, channel, 0, 0] = bad
    index = torch.tensor([[0, 0, -1, -1]])
    weight = torch.tensor([[0.5, 1.0, 0.0, 0.0]])
    case = Case([level], Assignment(index, weight), torch.tensor([[2]]), torch.tensor([[[1.0, 2.0, 14.0, 13.0]]]),
                torch.tensor(1.5), LossOptions((8,), focal_gamma=focal_gamma))  # fmt: skip
    items, (gradient,) = compiled(case)
    own, (own_gradient,) = eager(case)
    torch.testing.assert_close(items, own, equal_nan=True)
    finite = own_gradient.isfinite() & gradient.isfinite()
    torch.testing.assert_close(gradient[finite], own_gradient[finite], rtol=1e-4, atol=1e-6)
    if focal_gamma == 0:
        assert torch.equal(gradient.isnan(), own_gradient.isnan())


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(4, 144, s, s, generator=generator) for s in (40, 20, 10)]
    index = torch.where(torch.rand(4, 2100, generator=generator) < 0.1, 0, -1)
    case = Case(maps, Assignment(index, torch.rand(4, 2100, generator=generator) * (index == 0)),
                torch.full((4, 1), 3), torch.tensor([[[10.0, 20.0, 200.0, 150.0]]]).repeat(4, 1, 1),
                torch.tensor(50.0), LossOptions())  # fmt: skip
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(compiled(case))
    finally:
        torch.set_num_threads(before)
    for items, gradients in results[1:]:
        assert torch.equal(items, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, results[0][1], strict=True))


def test_a_second_backward_computes_the_gradient_again() -> None:
    case = random_case(7)
    leaves = [level.detach().requires_grad_() for level in case.maps]
    with yf.backend("cpu"):
        total = detection_loss(leaves, *case.fixed(), strides=case.options.strides).sum()
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    kept = [each.clone() for each in first]
    doubled = torch.autograd.grad(total, leaves, torch.tensor(2.0), retain_graph=True)
    again = torch.autograd.grad(total, leaves)
    for a, b, c, d in zip(first, kept, again, doubled, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b, c)
        torch.testing.assert_close(d, 2 * b)


def test_a_second_derivative_is_refused() -> None:
    case = random_case(7)
    leaves = [level.detach().requires_grad_() for level in case.maps]
    with yf.backend("cpu"):
        total = detection_loss(leaves, *case.fixed(), strides=case.options.strides).sum()
    with pytest.raises(RuntimeError, match="detection_loss: compiled kernels have no second derivative"):
        torch.autograd.grad(total, leaves, create_graph=True)


def test_gains_scale_the_items_on_every_backend() -> None:
    case = random_case(11)
    gained = case._replace(options=case.options._replace(gains=(2.0, 3.0, 5.0)))
    plain = case._replace(options=case.options._replace(gains=(1.0, 1.0, 1.0)))
    factors = torch.tensor([2.0, 3.0, 5.0])
    for name in ("eager", "cpu"):
        torch.testing.assert_close(compiled(gained, backend=name)[0], compiled(plain, backend=name)[0] * factors)


def test_backend_cuda_with_tensors_on_the_cpu_raises() -> None:
    with pytest.raises(RuntimeError, match="cannot run"):
        compiled(random_case(0), backend="cuda")


@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(gradient: bool) -> None:
    case = random_case(3)
    ops = torch.ops.yolov9_fast
    torch.library.opcheck(ops.detection_loss_forward.default, (case.kernel_maps(), *case.kernel_arguments(), gradient))
    torch.library.opcheck(
        ops.detection_loss_backward.default, (torch.ones(3), case.kernel_maps(), *case.kernel_arguments())
    )


@pytest.mark.slow
def test_compiles_in_one_graph() -> None:
    case = random_case(3)
    expected = compiled(case)
    leaves = [level.detach().requires_grad_() for level in case.maps]
    strides, class_pos_weight, smoothing, gamma, gains = case.options

    def call(leaves: list[Tensor], assignment: Assignment, labels: Tensor, boxes: Tensor, normaliser: Tensor) -> Tensor:
        return detection_loss(
            leaves, assignment, labels, boxes, normaliser, strides=strides, class_pos_weight=class_pos_weight,
            label_smoothing=smoothing, focal_gamma=gamma, gains=gains,
        )  # fmt: skip

    items = torch.compile(call, fullgraph=True)(leaves, *case.fixed())
    torch.testing.assert_close(items.detach(), expected[0])
    for a, b in zip(torch.autograd.grad(items.sum(), leaves), expected[1], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(library.loaded["cuda"] is not None, reason=f"no CUDA part: {library.loaded['cuda']}")
@pytest.mark.parametrize("name", ["forward", "backward", "unless_ones"])
def test_the_cuda_part_loads_without_a_gpu(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"yolov9_fast::detection_loss_{name}", "CUDA")


def full_size(dtype: torch.dtype, layout: str, device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    maps = [in_layout(torch.randn(8, 144, s, s, generator=generator).to(dtype), layout) for s in (80, 40, 20)]
    index = torch.where(torch.rand(8, 8400, generator=generator) < 0.02, 0, -1)
    weight = torch.rand(8, 8400, generator=generator) * (index == 0)
    boxes = torch.tensor([[[10.0, 20.0, 400.0, 350.0]]]).repeat(8, 1, 1)
    return Case(
        [level.to(device) for level in maps],
        Assignment(index.to(device), weight.to(device)),
        torch.full((8, 1), 3, device=device),
        boxes.to(device),
        torch.tensor(500.0, device=device),
        LossOptions(),
    )


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_cuda_agrees_with_the_cpu_and_does_not_synchronise(dtype: torch.dtype, layout: str) -> None:
    on_cpu, on_cuda = (full_size(dtype, layout, device) for device in ("cpu", "cuda"))
    for upstream in (None, torch.tensor([0.5, 2.0, 3.0])):
        expected = compiled(on_cpu, upstream)
        d_items = None if upstream is None else upstream.cuda()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            items, gradients = compiled(on_cuda, d_items, "cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(items.cpu(), expected[0], rtol=1e-5, atol=0)
        for a, b in zip(gradients, expected[1], strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-8)


@pytest.mark.gpu
@needs_gpu
def test_cuda_is_captured_in_a_graph() -> None:
    case = full_size(torch.float32, "contiguous", "cuda")
    compiled(case, backend="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        items, gradients = compiled(case, backend="cuda")
    graph.replay()
    torch.cuda.synchronize()
    expected = compiled(case, backend="cuda")
    assert torch.equal(items, expected[0])
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected[1], strict=True))
