"""Results have the strides that their fakes say, for maps of any layout and size, by every kernel of every backend.

torch.compile plans a program with the strides of the fakes; a kernel that then gives others is an error or a wrong
number. Sides of length 1 count too, though a comparison of tensors would not tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.devices import backends
from yolov9_fast import ops
from yolov9_fast.ops import Norm
from yolov9_fast.ops._operator import Kernel, operators

LAST = torch.channels_last
Shape = tuple[int, int, int, int]
Make = Callable[..., Tensor]
"""A random map of a shape, in a layout that was drawn."""


def odd_sides(x: Tensor) -> Tensor:
    """`x` with 7 as the stride of each side of length 1, which nothing reads."""
    steps = [7 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return x.as_strided(x.shape, steps)


LAYOUTS: dict[str, Callable[[int, int, int, int], Tensor]] = {
    "contiguous": lambda n, c, h, w: torch.rand(n, c, h, w),
    "channels_last": lambda n, c, h, w: torch.rand(n, c, h, w).clone(memory_format=LAST),
    "slice of contiguous": lambda n, c, h, w: torch.rand(n, c + 4, h, w)[:, 2:-2],
    "slice of channels_last": lambda n, c, h, w: torch.rand(n, c + 4, h, w).clone(memory_format=LAST)[:, 2:-2],
    "contiguous, odd sides": lambda n, c, h, w: odd_sides(torch.rand(n, c, h, w)),
    "channels_last, odd sides": lambda n, c, h, w: odd_sides(torch.rand(n, c, h, w).clone(memory_format=LAST)),
    "every second column": lambda n, c, h, w: torch.rand(n, c, h, 2 * w)[..., ::2],
    "every second channel": lambda n, c, h, w: torch.rand(n, 2 * c, h, w)[:, ::2],
    "transposed": lambda n, c, h, w: torch.rand(n, c, w, h).transpose(2, 3),
    "channels first": lambda n, c, h, w: torch.rand(c, n, h, w).transpose(0, 1),
    "rows before channels": lambda n, c, h, w: torch.rand(n, h, c, w).permute(0, 2, 1, 3),
    "columns first": lambda n, c, h, w: torch.rand(w, h, c, n).permute(3, 2, 1, 0),
    "expanded channels": lambda n, c, h, w: torch.rand(n, 1, h, w).expand(n, c, h, w),
    "expanded batch": lambda n, c, h, w: torch.rand(1, c, h, w).expand(n, c, h, w),
    "cropped": lambda n, c, h, w: torch.rand(n, c, h + 2, w + 2).clone(memory_format=LAST)[:, :, 1:-1, 1:-1],
}
READABLE = list(LAYOUTS)[:6]
"""What compiled kernels read; any other layout is copied before they are called."""


def norm(c: int) -> list[Tensor]:
    """γ, β, mean and rstd."""
    return [torch.rand(c) + 0.5 for _ in range(4)]


def loss_arguments(m: Make, n: int, c: int, h: int, w: int) -> tuple[Any, ...]:
    maps = [m(n, 64 + max(c, 1), *size) for size in ((h, w), (w, 1))]
    anchors, truths = sum(level.shape[2] * level.shape[3] for level in maps), 2
    return (
        maps,
        torch.randint(-1, truths, (n, anchors)),
        torch.rand(n, anchors),
        torch.randint(0, max(c, 1), (n, truths)),
        torch.rand(n, truths, 4) * 8,
        torch.tensor(2.0),
        [8, 16],
        1.0,
        0.0,
        0.0,
        [7.5, 0.5, 1.5],
    )


def arguments(kernel: str, m: Make, n: int, c: int, h: int, w: int) -> tuple[Any, ...]:
    """Of a call of this kernel."""
    shape = (n, c, h, w)
    v = norm(c)
    even = (n, 2 * c, h + 2, w + 2)
    halves = (n, c, h + 1, w + 1), (n, c, (h + 2) // 2, (w + 2) // 2)
    makes: dict[str, Callable[[], tuple[Any, ...]]] = {
        "bn_stats": lambda: (m(*shape),),
        "bn_combine": lambda: (torch.rand(h + 1, 2 * c + 1) + 1, v[0], v[1], 0.1, 1e-3),
        "bn_silu_forward": lambda: (m(*shape), *v, 0.1, 1e-3, m(*shape), torch.empty(shape), True),
        "bn_silu_backward": lambda: (m(*shape), m(*shape), *v, True),
        "bn_silu_backward_sums": lambda: (m(*shape), m(*shape), *v, True),
        "bn_silu_backward_apply": lambda: (m(*shape), m(*shape), *v, v[0], v[1], True),
        "rep_bn_silu_forward": lambda: (
            *(m(*shape), *v),
            *(m(*shape), *norm(c)),
            *(0.1, 1e-3, m(*shape), torch.empty(shape), True),
        ),
        "rep_bn_silu_backward": lambda: (m(*shape), m(*shape), *v, m(*shape), *v, True),
        "rep_bn_silu_backward_sums": lambda: (m(*shape), m(*shape), *v, m(*shape), *v, True),
        "rep_bn_silu_backward_apply": lambda: (m(*shape), m(*shape), *v, m(*shape), *v, *v[:3], True),
        "spp_backward": lambda: tuple(m(*shape) for _ in range(7)),
        "adown_pool_forward": lambda: (m(*even), n != 1),
        "adown_pool_backward": lambda: (m(*halves[0]), m(*halves[1]) if h else None, m(*even), True),
        "cbfuse_forward": lambda: ([m(n, c, h + 1, w + 1), m(n, c, 1, 2)], m(*shape)),
        "cbfuse_backward": lambda: (m(n, c, h + 1, w + 1), [1, h], [1, 3]),
        "conv1x1_input_grad": lambda: (m(n, c + 1, h, w), torch.rand(c + 1, 5, 1, 1), [1, 2, 2]),
        "conv1x1_weight_grad": lambda: (m(n, c + 1, h, w), [m(*shape), m(n, 2, h, w)]),
        "tap_backward": lambda: (m(n, c + 2, h, w), m(n, c, h, w), 1),
        "decode_forward": lambda: ([m(n, 65 + c, h, w), m(n, 65 + c, w, 1)], [8, 16]),
        "decode_for_assignment": lambda: (
            [m(n + 1, 65 + c, h, w), m(n + 1, 65 + c, w, 1)],
            torch.randint(0, 1 + c, (n + 1, h)) if w else None,
            [8, 16],
        ),
        "detection_loss_forward": lambda: (*loss_arguments(m, n, c, h, w), True),
        "detection_loss_backward": lambda: (torch.rand(3), *loss_arguments(m, n, c, h, w)),
        "assign": lambda: (
            torch.rand(n, h * w, c + 1),
            torch.rand(n, h * w, 4) * 64,
            torch.rand(h * w, 2) * 64,
            torch.randint(0, c + 1, (n, w)),
            torch.rand(n, w, 4) * 64,
            torch.rand(n, w) > 0.5,
            *(None, 3, 0.5, 6.0, 0),
        ),
        "nms": lambda: (m(n, 5 + c, h, w).flatten(2).contiguous(), 0.1, 0.5, c > 1, h > 1, None, 5, 100),
        "nms_boxes": lambda: (torch.rand(h * w, 4), torch.rand(h * w), None, 0.5, n),
        "box_iou": lambda: (torch.rand(h, 4), torch.rand(w, 4)),
        "augment": lambda: (
            torch.randint(0, 256, (3 * h * w,)).byte(),
            torch.tensor([0, h, w, 1, -1]).repeat(n, 2, 1, 1),
            torch.full((n, 2, 2), 4 + c),
            torch.eye(3, dtype=torch.float64).repeat(n, 2, 1, 1),
            torch.arange(256).byte().repeat(n, 3, 1) if c else None,
            torch.rand(n, 2) > 0.5,
            torch.rand(n, dtype=torch.float64),
            *(h + 1, c > 1),
        ),
    }
    return makes[kernel]()


def declared() -> dict[str, Kernel]:
    """All kernels that return something, by name; those of `convs` take few layouts and channels (`test_convs.py`)."""
    kernels = [kernel for name, one in operators.items() if name != "convs" for kernel in one._declared]
    return {kernel.name: kernel for kernel in kernels if not kernel.schema.endswith("-> ()")}


def strides(results: Any) -> list[tuple[torch.dtype, torch.Size, tuple[int, ...]]]:
    return [(each.dtype, each.shape, each.stride()) for each in tree_leaves(results) if isinstance(each, Tensor)]


def of_fake(function: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    with FakeTensorMode() as mode:
        return strides(function(*tree_map_only(Tensor, mode.from_tensor, given)))


def kernels_of(name: str) -> dict[str, Callable[..., Any]]:
    """By backend: the compiled kernel if there is one, the interpreted one, the definition."""
    packet = torch.ops.yolov9_fast
    found = {"registered": getattr(packet, name).default, "definition": declared()[name].reference}
    if hasattr(packet, name + "_triton"):
        found["triton"] = getattr(packet, name + "_triton").default
    return found


def compare_kernels(kernel: str, size: Shape, layouts: list[str]) -> None:
    torch.manual_seed(0)
    made: list[Tensor] = []

    def make(*shape: int) -> Tensor:
        made.append(LAYOUTS[layouts[len(made) % len(layouts)]](*shape))
        return made[-1]

    given = arguments(kernel, make, *size)
    expected = of_fake(getattr(torch.ops.yolov9_fast, kernel).default, given)
    for backend, function in kernels_of(kernel).items():
        try:
            real = strides(function(*given))
        except RuntimeError as error:
            # Compiled kernels refuse what is copied before they are called, PyTorch's functions some empty maps.
            if not (": expected " in str(error) if backend == "registered" else 0 in size):
                raise
        else:
            assert real == expected, (backend, [(x.shape, x.stride()) for x in made])


SIZE = st.tuples(*[st.integers(0, 3)] * 4)
ONE = st.lists(st.sampled_from(list(LAYOUTS)), min_size=1, max_size=1)
SOME = st.one_of(ONE, st.lists(st.sampled_from(READABLE), min_size=1, max_size=3))
"""The layouts of the maps of a call, in turn."""


@pytest.mark.parametrize("kernel", declared())
@settings(max_examples=8)
@given(size=SIZE, layouts=SOME)
def test_kernels_give_the_strides_that_their_fakes_say(kernel: str, size: Shape, layouts: list[str]) -> None:
    compare_kernels(kernel, size, layouts)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", declared())
@settings(max_examples=40)
@given(size=SIZE, layouts=SOME)
def test_many_kernels_give_the_strides_that_their_fakes_say(kernel: str, size: Shape, layouts: list[str]) -> None:
    compare_kernels(kernel, size, layouts)


# ---- the operators with their gradients, which copy maps that kernels do not read


def called(operator: str, m: Make, n: int, c: int, h: int, w: int) -> tuple[Callable[..., Any], list[Tensor]]:
    """A call of the operator: a function of maps, and the maps, which get gradients."""
    n, c, h, w = shape = n, *(max(side, 1) for side in (c, h, w))  # empty maps of other sides are refused
    mean, var = torch.rand(c), torch.rand(c) + 0.5
    options: dict[str, Any] = {"training": n * h * w > 1, "momentum": 0.1, "eps": 1e-3}
    weight = torch.rand(3, c + 2, 1, 1)
    calls: dict[str, Callable[[], tuple[Callable[..., Any], list[Tensor]]]] = {
        "bn_silu": lambda: (
            lambda x, residual: ops.bn_silu(x, mean, var, mean, var, residual=residual, **options),
            [m(*shape), m(*shape)],
        ),
        "rep_bn_silu": lambda: (
            lambda x, y: ops.rep_bn_silu(x, Norm(mean, var, mean, var), y, Norm(None, None, mean, var), **options),
            [m(*shape), m(*shape)],
        ),
        "spp": lambda: (ops.spp_with_input, [m(*shape)]),
        "adown_pool": lambda: (lambda x: ops.adown_pool(x, n != 1), [m(n, 2 * c, h + 2, w + 2)]),
        "cbfuse": lambda: (
            lambda x, y, target: ops.cbfuse([x, y], target),
            [m(n, c, h + 1, w + 1), m(n, c, 1, 2), m(*shape)],
        ),
        "conv1x1": lambda: (
            lambda x, y: ops.conv1x1([x, y], weight.requires_grad_(), None),
            [m(*shape), m(n, 2, h, w)],
        ),
        "conv1x1_pair": lambda: (
            lambda x: ops.conv1x1_pair(x, weight[:1, :c], weight[:, :c]),
            [m(*shape)],
        ),
        "tap_backward": lambda: (lambda x: ops.tap(x, 1), [m(n, c + 1, h, w)]),
        "decode": lambda: (lambda x: ops.decode([x.detach()], [8]), [m(n, 64 + c, h, w)]),
        "decode_for_assignment": lambda: (
            lambda x: ops.decode_for_assignment([x], torch.zeros((n, 2), dtype=torch.int64), [8]),
            [m(n, 64 + c, h, w)],
        ),
    }
    return calls[operator]()


OF_MAPS = ("bn_silu", "rep_bn_silu", "spp", "adown_pool", "cbfuse", "conv1x1", "conv1x1_pair", "tap_backward")
OF_MAPS += ("decode", "decode_for_assignment")
OPERATORS = [
    pytest.param(name, *values.values, marks=values.marks)
    for name, operator in operators.items()
    if name in OF_MAPS
    for values in backends(operator, eager=False)
]


@pytest.mark.parametrize(("operator", "backend", "device"), OPERATORS)
@settings(max_examples=6)
@given(size=SIZE, layouts=ONE)
def test_operators_and_their_gradients_have_the_strides_of_fakes(
    operator: str, backend: str, device: str, size: Shape, layouts: list[str]
) -> None:
    def make(*shape: int) -> Tensor:
        return LAYOUTS[layouts[0]](*shape)

    torch.manual_seed(0)
    function, maps = called(operator, make, *size)
    if operator == "tap_backward" and backend == "cpu" and layouts[0] not in READABLE:
        return  # it runs the definition
    upstream: list[Tensor] = []

    def run(of: Callable[[Tensor], Tensor]) -> list[Any]:
        inputs = [of(x).detach().requires_grad_() for x in maps]
        with ops.backend(backend, operator):
            results = [each for each in tree_leaves(function(*inputs)) if isinstance(each, Tensor)]
            outputs = [each for each in results if each.requires_grad]
            upstream.extend(make(*each.shape) for each in outputs[len(upstream) :])
            return [
                strides(results),
                strides(torch.autograd.grad(outputs, inputs, [of(each) for each in upstream]) if outputs else []),
            ]

    real = run(lambda x: x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = run(mode.from_tensor)
    assert fake == real, maps[0].stride()
