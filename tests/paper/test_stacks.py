"""Random stacks: exactly as deep as they say, equally wide, and the same for the same seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from yolov9_fast.errors import UserError
from yolov9_fast.nn import Conv
from yolov9_fast.ops._backend import backend
from yolov9_fast.paper.stacks import ARCHITECTURES, FORMS, NORMALISATIONS, PLAIN, build_stack, plan

DEPTHS = (0, 1, 2, 3, 10, 25, 50, 100)
IMAGES = torch.rand(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))


def convolutions_on_paths(output: torch.Tensor) -> tuple[int, int]:
    """Convolutions on the longest and on the shortest path from `output` back to the input, from autograd's graph."""
    found: dict[Any, tuple[int, int] | None] = {}
    stack = [(output.grad_fn, False)]
    while stack:
        node, expanded = stack.pop()
        if node in found and not expanded:
            continue
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if not expanded:
            stack.append((node, True))
            stack.extend((parent, False) for parent in parents if parent not in found)
            continue
        if type(node).__name__ == "AccumulateGrad":
            # Only the image starts a path; weights are inputs of their own.
            found[node] = (0, 0) if getattr(node.variable, "is_image", False) else None
            continue
        known = [found[parent] for parent in parents]
        paths = [path for path in known if path is not None]
        own = int(type(node).__name__ == "ConvolutionBackward0")
        found[node] = (max(p[0] for p in paths) + own, min(p[1] for p in paths) + own) if paths else None
    result = found[output.grad_fn]
    assert result is not None
    return result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_depth_is_the_number_of_convolutions_on_the_longest_path(architecture: str) -> None:
    for depth in DEPTHS:
        stack = build_stack(architecture, depth, 8)
        image = torch.rand(1, 3, 4, 4, requires_grad=True)
        image.is_image = True  # type: ignore[attr-defined]
        with backend("eager"):
            longest, shortest = convolutions_on_paths(stack(image))
        assert longest == depth + 1, f"{depth} layers and the stem"
        assert shortest == sum(form.shortest for form in plan(architecture, depth)) + 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_block_keeps_width_and_resolution(architecture: str) -> None:
    stack = build_stack(architecture, 50, 16)
    x = stack.stem(IMAGES)
    for block in stack.blocks:
        x = block(x)
        assert x.shape == (2, 16, 12, 16)


def test_the_published_depths_are_mostly_published_blocks_and_need_no_plain_layers() -> None:
    for architecture in ARCHITECTURES:
        for depth in (50, 100, 150, 200):
            forms = plan(architecture, depth)
            assert architecture == "plainnet" or PLAIN not in forms
            assert sum(form.depth for form in forms if form == FORMS[architecture][0]) >= 0.7 * depth


def test_a_depth_that_no_blocks_make_is_filled_with_plain_layers_in_front() -> None:
    assert [form.depth for form in plan("resnet", 5)] == [1, 2, 2]
    assert [form.depth for form in plan("gelan", 4)] == [1, 1, 1, 1]


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_the_seed_alone_decides_the_features(normalisation: str) -> None:
    def features(seed: int) -> torch.Tensor:
        return build_stack("gelan", 12, 8, seed=seed, normalisation=normalisation).features(IMAGES)

    torch.manual_seed(99)
    first = features(1)
    after = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(first, features(1))
    assert not torch.equal(first, features(2))
    torch.manual_seed(99)
    assert torch.equal(after, torch.rand(1)), "the caller's generator was touched"


def test_the_normalisations_are_what_they_say() -> None:
    batch, initial, none = (build_stack("cspnet", 10, 8, normalisation=n) for n in NORMALISATIONS)
    for stack, normalised, biased in ((batch, True, False), (initial, True, False), (none, False, True)):
        units = [m for m in stack.modules() if isinstance(m, Conv)]
        assert all(isinstance(u.bn, nn.BatchNorm2d) is normalised for u in units)
        assert all((u.conv.bias is not None) is biased for u in units)
    assert batch.training
    assert not initial.training
    assert all(torch.equal(a, b) for a, b in zip(batch.parameters(), initial.parameters(), strict=True))
    bounded = [u.conv for u in none.modules() if isinstance(u, Conv)]
    assert all(c.bias is not None and c.bias.abs().max() <= c.weight[0].numel() ** -0.5 for c in bounded)


def test_the_activation_can_be_relu_everywhere() -> None:
    for architecture in ARCHITECTURES:
        stack = build_stack(architecture, 12, 8, activation="relu")
        assert not any(isinstance(m, nn.SiLU) for m in stack.modules())
        assert bool((stack.features(IMAGES) >= 0).all())


def test_a_stem_with_a_stride_lowers_the_resolution_once() -> None:
    assert build_stack("elan", 8, 8, stem_stride=2).features(IMAGES).shape == (2, 8, 6, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("transformer", 10), "no architecture 'transformer'; known are plainnet"),
        (("gelan", -1), "depth: expected at least 0"),
        (("gelan", 10, 30), "width: expected a positive multiple of 4, got 30"),
    ],
)
def test_what_makes_no_network_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_stack(*arguments)
    with pytest.raises(UserError, match="no normalisation 'layer'"):
        build_stack("gelan", 10, normalisation="layer")
    with pytest.raises(UserError, match="no activation 'tanh'"):
        build_stack("gelan", 10, activation="tanh")
    with pytest.raises(UserError, match="stem_stride: expected at least 1"):
        build_stack("gelan", 10, stem_stride=0)
