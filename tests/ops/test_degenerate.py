"""One answer of every form for empty inputs, one channel, one pixel and odd strides, and for arguments of no use."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import yolov9_fast as yf
from yolov9_fast import ops
from yolov9_fast.ops import Norm
from yolov9_fast.ops._operator import operators


def laid_out(values: Tensor) -> dict[str, Tensor]:
    """`values` [B, C, H, W] in several memory layouts."""
    batch, channels, height, width = values.shape
    found = {"contiguous": values.clone(), "channels_last": values.to(memory_format=torch.channels_last)}
    for name in ("contiguous", "channels_last"):
        wide = torch.full((batch, channels + 4, height, width), float("nan"), device=values.device)
        wide = wide.to(memory_format=getattr(torch, f"{name}_format" if name == "contiguous" else name))
        wide[:, 2 : 2 + channels] = values
        found[f"slice of {name}"] = wide[:, 2 : 2 + channels]
    wide = torch.zeros(batch, channels, height + 1, width + 2, device=values.device)
    wide[:, :, 1:, 2:] = values
    found["crop"] = wide[:, :, 1:, 2:]
    return found


def assert_as_eager(call: Callable[[], Any]) -> None:
    with yf.backend("eager"):
        expected = call()
    for name in ("auto", "cpu"):
        with yf.backend(name):
            try:
                found = call()
            except ops.BackendUnavailable:
                continue
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(2, 3, 4), (2, 1, 1), (1, 1, 3), (0, 2, 2)])
@pytest.mark.parametrize("channels", [(1, 1), (1, 3), (3, 1)])
def test_one_channel_and_one_pixel_in_any_mixture_of_layouts(
    size: tuple[int, int, int], channels: tuple[int, int], device: str
) -> None:
    batch, height, width = size
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(batch, c, height, width, generator=generator).to(device) for c in channels)
    weight = torch.randn(second.shape[1], first.shape[1], 1, 1, generator=generator).to(device)
    both = torch.randn(2, sum(channels), 1, 1, generator=generator).to(device)
    for x, y in itertools.product(laid_out(first).values(), laid_out(second).values()):

        def gradients(call: Callable[[Tensor, Tensor], Any], x: Tensor = x, y: Tensor = y) -> Any:
            a, b = x.detach().requires_grad_(), y.detach().requires_grad_()
            outputs = [each for each in call(a, b) if each.requires_grad]
            return torch.autograd.grad(sum(each.square().sum() for each in outputs), (a, b), allow_unused=True)

        assert_as_eager(lambda x=x, y=y: ops.conv1x1([x, y], both))
        assert_as_eager(lambda x=x, y=y: ops.conv1x1(x, weight, out=torch.empty_like(y).copy_(y)))
        assert_as_eager(lambda x=x, y=y: ops.conv1x1(x, weight, out=y.clone().as_strided(y.shape, y.stride()))
                        if y.is_contiguous() else ())  # fmt: skip
        assert_as_eager(lambda g=gradients: g(lambda a, b: [ops.conv1x1([a, b], both)]))
        assert_as_eager(lambda g=gradients: g(lambda a, b: ops.conv1x1_pair(a, weight, weight[:1])))


@pytest.mark.parametrize("channels", [1, 3])
def test_slots_of_any_layout(channels: int, device: str) -> None:
    x = torch.randn(2, channels, 3, 4, device=device)
    for source, name in itertools.product(laid_out(x).values(), laid_out(x)):

        def pooled(source: Tensor = source, name: str = name) -> Any:
            return ops.spp(source, [laid_out(torch.zeros_like(x))[name] for _ in range(3)])

        def convolved(source: Tensor = source, name: str = name) -> Tensor:
            weight = torch.ones(channels, channels, 1, 1, device=device)
            return ops.conv1x1(source, weight, out=laid_out(torch.zeros_like(x))[name])

        assert_as_eager(pooled)
        assert_as_eager(convolved)


def test_an_empty_transposed_batch_has_no_detections(device: str) -> None:
    for shape in ((0, 20, 7), (0, 0, 7)):
        prediction = torch.zeros(shape, device=device).transpose(1, 2)
        assert_as_eager(lambda p=prediction: tuple(ops.nms(p, max_det=5)))


def test_an_empty_batch_has_anchor_points(device: str) -> None:
    maps, labels = (
        [torch.zeros(0, 70, 2, 3, device=device), torch.zeros(0, 70, 1, 1, device=device)],
        torch.zeros(0, 2, dtype=torch.int64, device=device),
    )
    for name in ("eager", "auto"):
        with yf.backend(name):
            points = ops.decode_for_assignment(maps, labels, (8, 16)).points
        assert points.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8]]


def test_an_empty_crop_of_a_map(device: str) -> None:
    """No pixel, so no copy either, which would join the rows."""
    level = torch.zeros(0, 70, 3, 3, device=device)[..., :2, :2].requires_grad_()
    indices, boxes = torch.zeros(0, 4, dtype=torch.int64, device=device), torch.zeros(0, 0, 4, device=device)
    assignment = ops.Assignment(indices, torch.zeros(0, 4, device=device))
    labels = torch.zeros(0, 0, dtype=torch.int64, device=device)
    assert_as_eager(lambda: (ops.decode([level.detach()], (8,)),))
    assert_as_eager(lambda: tuple(ops.decode_for_assignment([level], labels, (8,))[1:3]))
    one = torch.ones((), device=device)
    assert_as_eager(lambda: (ops.detection_loss([level], assignment, labels, boxes, one, strides=(8,)).detach(),))


def test_a_label_of_no_class_has_score_zero_in_the_assignment(device: str) -> None:
    maps = [torch.randn(1, 68, 4, 4, device=device)]
    labels, gt = (
        torch.tensor([[7, -1, 2]], device=device),
        torch.tensor([[[1.0, 1, 20, 20], [8, 8, 30, 30], [3, 3, 31, 31]]], device=device),
    )
    results = []
    for name in ("eager", "auto"):
        with yf.backend(name):
            found = ops.decode_for_assignment(maps, labels, (8,))
            results.append(ops.assign(*found[:3], found.columns, gt, torch.ones(1, 3, device=device)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_vectors_with_gaps(device: str) -> None:
    x = torch.randn(2, 6, 3, 3, device=device)
    weight, bias, mean, var = (torch.rand(12, device=device)[::2] + 0.5 for _ in range(4))
    for training in (False, True):

        def call(training: bool = training) -> Any:
            norm = Norm(weight, bias, mean.clone().as_strided((6,), (1,)), var.clone())
            gaps = Norm(weight, bias, torch.zeros(12, device=device)[::2], torch.ones(12, device=device)[::2])
            options: dict[str, Any] = {"training": training, "momentum": 0.1, "eps": 1e-3}
            return (
                ops.bn_silu(x, *norm, **options),
                ops.bn_silu(x, *gaps, **options),
                ops.rep_bn_silu(x, norm, x, gaps, **options),
                gaps.running_mean,
                gaps.running_var,
            )

        with yf.backend("eager"):
            expected = call()
        with yf.backend("auto"):
            torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-5)


X = torch.zeros(1, 2, 4, 4)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "shared memory": (
        lambda: ops.spp(X, [torch.zeros(1, 2, 4, 1).expand(1, 2, 4, 4)] * 3),
        r"out\[0\]: expected elements",
    ),
    "no channels": (lambda: ops.spp(torch.zeros(1, 0, 4, 4)), r"x: expected \[B, C, H, W\] with C, H and W of at"),
    "no rows": (lambda: ops.conv1x1(torch.zeros(1, 2, 0, 4), torch.zeros(1, 2, 1, 1)), r"inputs\[0\]: expected \[B, C"),
    "no outputs": (lambda: ops.conv1x1(X, torch.zeros(0, 2, 1, 1)), "weight: expected"),
    "no list": (lambda: ops.cbfuse(None, X), "inputs: expected a list of tensors, got"),
    "no tensor": (
        lambda: ops.conv1x1(3, torch.zeros(1, 2, 1, 1)),
        "inputs: expected a tensor or a list of tensors, got",
    ),
    "no maps": (lambda: ops.decode(None), "maps: expected a list of tensors, got"),
    "text": (lambda: ops.bn_silu(X, "w", None, None, None, training=True, momentum=0.1, eps=0.1), "weight: expected a"),
}


@pytest.mark.parametrize("name", ["eager", "auto"])
@pytest.mark.parametrize("wrong", WRONG)
def test_an_argument_of_no_use_is_named(wrong: str, name: str) -> None:
    call, message = WRONG[wrong]
    with yf.backend(name), pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call()


@pytest.mark.parametrize("name", ["eager", "auto"])
def test_a_ground_truth_that_does_not_exist_is_an_error_of_the_loss(name: str) -> None:
    maps, boxes, one = [torch.zeros(1, 66, 2, 2)], torch.ones(1, 1, 4), torch.ones(1, 4)
    call: Any = lambda index, label: ops.detection_loss(  # noqa: E731
        maps, ops.Assignment(torch.tensor([[index, -1, -1, -1]]), one), torch.tensor([[label]]), boxes,
        torch.tensor(1.0), strides=(8,),
    )  # fmt: skip
    with yf.backend(name):
        call(0, 1)
        call(-1, 9)
        with pytest.raises(ValueError, match=r"assignment.gt_index: expected indices below 1, got 1"):
            call(1, 0)
        with pytest.raises(ValueError, match=r"gt_labels: expected classes in \[0, 2\), got 2"):
            call(0, 2)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_operators_of_several_maps_compile_without_gradients(count: int) -> None:
    maps = [torch.randn(2, 3, 4, 4) for _ in range(count)]
    weight, target = torch.randn(2, 3 * count, 1, 1), torch.randn(2, 3, 5, 4)

    def call(target: Tensor, *maps: Tensor) -> Any:
        buffer = ops.ConcatBuffer.like(maps[0], [3] * count)
        return ops.conv1x1(maps, weight), ops.cbfuse(maps, target), buffer.join(*maps)

    torch._dynamo.reset()
    name = "cpu" if operators["conv1x1"].why_not("cpu") is None else "eager"
    with yf.backend(name), torch.no_grad():
        compiled = torch.compile(call, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(target, *maps), call(target, *maps))


def test_products_of_compiled_operators_are_counted() -> None:
    def counted(name: str) -> int:
        x, y = (torch.randn(2, c, 5, 5, requires_grad=True) for c in (3, 4))
        weights = [torch.randn(o, c, 1, 1, requires_grad=True) for o, c in ((6, 7), (5, 3), (2, 3))]
        with yf.backend(name), FlopCounterMode(display=False) as counter:
            outputs = [ops.conv1x1([x, y], weights[0]), *ops.conv1x1_pair(x, *weights[1:])]
            sum(each.sum() for each in outputs).backward()
        return counter.get_total_flops()

    name = "cpu" if operators["conv1x1"].why_not("cpu") is None else "eager"
    assert counted(name) == counted("eager") == 3 * 2 * 50 * (7 * 6 + 3 * 5 + 3 * 2)
