"""What the targets of operators share: drawn tensors, the backends that can run here, and the comparison of results.

A target draws an `Invocation`, which every backend runs on tensors of its own. All must give the eager result, or the
same error: a `TypeError` or `ValueError` with a message `argument: expected X, got Y`. docs/architecture.md states what
a value that is not finite gives.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import yolov9_fast as yf
from tests.fuzz.frame import Case
from tests.ops import emulated
from yolov9_fast import ops
from yolov9_fast._layout import row_stride
from yolov9_fast.ops import _backend
from yolov9_fast.ops._operator import operators

DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
RELATIVE = {torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3, torch.float64: 1e-8}
SPECIAL = [float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 1e-42, 0.0, -0.0]
GOOD_MESSAGE = re.compile(r"^[\w., \[\]]+: expected .*got .*", re.DOTALL)
THREADS_OF_A_BLOCK, ORDER = 32, 3


@dataclass
class Made:
    """How to make a tensor: the same values and strides at each call."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int
    layout: str = "contiguous"
    kind: str = "normal"
    special: tuple[float, ...] = ()
    scale: float = 1.0
    shift: float = 0.0
    gradient: bool = False

    def __call__(self) -> Tensor:
        values = self._values().to(self.dtype)
        made = _laid_out(values, self.layout)
        return made.requires_grad_() if self.gradient and made.is_floating_point() else made

    def _values(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        if self.kind == "integers":
            return torch.randint(0, max(int(self.scale), 1), self.shape, generator=generator) + int(self.shift)
        if self.kind == "booleans":
            return torch.rand(self.shape, generator=generator) < 0.7
        uniform = self.kind == "uniform"
        values = (
            torch.rand(self.shape, generator=generator) if uniform else torch.randn(self.shape, generator=generator)
        )
        if self.kind == "ties":
            values = (2 * values).round() / 2
        values = (values * (0 if self.kind == "constant" else 1) * self.scale + self.shift).double()
        if self.kind == "boxes" and values.numel():
            values = torch.cat((values[..., :2], values[..., :2] + values[..., 2:].abs()), -1)
        places = torch.randint(0, max(values.numel(), 1), (len(self.special),), generator=generator)
        for place, value in zip(places.tolist(), self.special, strict=True):
            if values.numel():
                values.view(-1)[place] = value
        return values


def _laid_out(values: Tensor, layout: str) -> Tensor:
    """`values` with the strides of `layout`; the memory around them holds NaN."""

    def around(shape: Iterable[int]) -> Tensor:
        filler = float("nan") if values.is_floating_point() else 1
        return torch.full(tuple(shape), filler, dtype=values.dtype)

    shape = values.shape
    if layout == "contiguous" or not shape:
        return values.clone()
    if layout == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2) if len(shape) > 1 else values.clone()
    if layout == "every_second":
        wide = around((*shape[:-1], 2 * shape[-1]))
        wide[..., ::2] = values
        return wide[..., ::2]
    if layout == "expanded":  # equal images: the values of the first
        return values[:1].clone().expand(shape) if shape[0] else values.clone()
    if layout == "permuted":
        order = list(reversed(range(len(shape))))
        return values.permute(order).contiguous().permute(order)
    if len(shape) != 4:
        return values.clone()
    if layout == "channels_last":
        return values.to(memory_format=torch.channels_last)
    batch, channels, height, width = shape
    if layout == "crop":
        wide = around((batch, channels, height + 3, width + 2))
        wide[:, :, 1 : 1 + height, 2:] = values
        return wide[:, :, 1 : 1 + height, 2:]
    wide = around((batch, channels + 5, height, width))
    if layout == "slice_last":
        wide = wide.to(memory_format=torch.channels_last)
    wide[:, 3 : 3 + channels] = values
    return wide[:, 3 : 3 + channels]


LAYOUTS = [
    *("contiguous", "channels_last", "slice", "slice_last", "crop", "transposed", "every_second", "expanded"),
    "permuted",
]
SEEDS = st.integers(0, 2**31)


def tensor(
    case: Case, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32, *, kinds: Sequence[str] = (),
    specials: Sequence[float] = SPECIAL, gradient: bool = False, **fixed: Any,
) -> Made:  # fmt: skip
    """Draw how to make a tensor of this shape."""
    special = case.draw(st.lists(st.sampled_from(specials), max_size=2), f"{name}.special") if specials else []
    drawn = {
        "layout": case.draw(st.sampled_from(LAYOUTS), f"{name}.layout"),
        "kind": case.draw(st.sampled_from(kinds or ["normal", "ties", "constant"]), f"{name}.kind"),
        "gradient": gradient and case.draw(st.booleans(), f"{name}.gradient"),
    }
    seed = case.draw(SEEDS, f"{name}.seed")
    return Made(tuple(shape), dtype, seed, special=tuple(special), **{**drawn, **fixed})


def side(case: Case, name: str, largest: int = 9) -> int:
    return case.draw(st.integers(0, largest), name)


@dataclass
class Invocation:
    """A call of an operator: `call(*tensors)`, each made anew, and how its results are compared.

    `magnitude(*tensors)`: for each output about what its largest summand was, for the rounding that is allowed.
    `exact`: results are equal bit for bit. `gradients`: compare those too.
    """

    op: str
    call: Callable[..., Any]
    arguments: list[Any]
    exact: bool = False
    magnitude: Callable[..., Any] | None = None
    gradients: bool = True
    relative: float | None = None
    skip: Callable[[str, int, Tensor], Tensor | None] | None = None
    """`skip(backend, output, expected)`: the elements that are not compared."""
    backends: tuple[str, ...] | None = None
    """Those to run beside "auto"; None: all that can run here."""


def finite(*made: Made | None) -> bool:
    """Whether the tensors have a gradient that is the same for every order of the sums."""
    return not any(each is not None and each.special for each in made)


def spoil(case: Case, arguments: list[Any]) -> list[Any]:
    """Now and then one argument that no backend can take."""
    if case.draw(st.integers(0, 9), "spoil") or not arguments:
        return arguments
    index = case.draw(st.integers(0, len(arguments) - 1), "spoiled")
    wrong = [
        *(None, "text", 3, [], torch.zeros(()), torch.zeros(3), torch.zeros(2, 3, 4, 4, dtype=torch.int64)),
        *(torch.zeros(1, 2, 3), torch.zeros(0, 0, 0, 0), torch.zeros(1, 7, 5, 5, dtype=torch.complex64)),
        *(torch.zeros(2, 3, 4, 4, device="meta"), torch.zeros(1, 1, 1, 1, 1)),
    ]
    wrong_one = wrong[case.draw(st.integers(0, len(wrong) - 1), "by")]
    return [*arguments[:index], wrong_one, *arguments[index + 1 :]]


@dataclass
class Outcome:
    error: Exception | None = None
    outputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)


def check(invocation: Invocation) -> None:
    """Run `invocation` on every backend; raises AssertionError where one differs from eager."""
    expected = _run("eager", invocation)
    if expected.error is not None:
        _check_error(expected.error)
    bound = _magnitudes(invocation) if expected.error is None else []
    errors = _errors_of_gradients(invocation, expected)
    names = backends_of(invocation.op) if invocation.backends is None else invocation.backends
    for name in ("auto", *names):
        found = _run(name, invocation)
        if isinstance(found.error, ops.BackendUnavailable):
            continue
        if expected.error is not None or found.error is not None:
            same = type(found.error) is type(expected.error) and str(found.error) == str(expected.error)
            assert same, f"{name}: {found.error!r}; eager: {expected.error!r}"
            continue
        assert len(found.outputs) == len(expected.outputs), name
        for number, (mine, theirs) in enumerate(zip(found.outputs, expected.outputs, strict=True)):
            skipped = invocation.skip(name, number, theirs) if invocation.skip else None
            rounding = bound[number] * _relative(theirs, invocation) if bound else None
            _compare(f"{name}: output {number}", mine, theirs, invocation, rounding, skipped)
        for number, (mine, theirs) in enumerate(zip(found.gradients, expected.gradients, strict=True)):
            _compare(f"{name}: gradient {number}", mine, theirs, invocation, errors[number] if errors else None, None)


def _check_error(error: Exception) -> None:
    good = isinstance(error, TypeError | ValueError) and GOOD_MESSAGE.match(str(error)) and "\n" not in str(error)
    if not good:
        raise AssertionError(f"no clear error: {error!r}") from error


def _errors_of_gradients(invocation: Invocation, eager: Outcome) -> list[Tensor]:
    """How far eager's gradients are from those of the same values in float64, with strides as usual.

    PyTorch's BatchNorm in bfloat16 loses all digits where the gradient of a channel cancels, and is wrong where x has
    unusual strides of sides of length 1 and the gradient has another layout.
    """
    if not eager.gradients:
        return []
    exact = _run("eager", invocation, [output.dtype for output in eager.outputs])
    pairs = zip(eager.gradients, exact.gradients, strict=True) if exact.error is None else []
    return [(mine.double() - true.double()).abs().nan_to_num(0, 0, 0) for mine, true in pairs]


def _run(name: str, invocation: Invocation, in_float64: Sequence[torch.dtype] = ()) -> Outcome:
    """The outcome on backend `name`. `in_float64`: compute so, the gradients of results rounded to these dtypes."""
    made = [_make(argument, wide=bool(in_float64)) for argument in invocation.arguments]
    leaves = [leaf for argument in made for leaf in _leaves(argument) if leaf.requires_grad]
    try:
        with yf.backend(name):
            outputs = _leaves(invocation.call(*made))
            gradients: list[Tensor] = []
            recorded = [(n, output) for n, output in enumerate(outputs) if output.requires_grad]
            if invocation.gradients and recorded and leaves:
                dtypes = in_float64 or [output.dtype for output in outputs]
                upstream = [_upstream(n, output).to(dtypes[n]).to(output.dtype) for n, output in recorded]
                recorded = [output for _, output in recorded]
                found = torch.autograd.grad(recorded, leaves, upstream, allow_unused=True)
                pairs = zip(found, leaves, strict=True)
                gradients = [torch.zeros_like(leaf) if each is None else each for each, leaf in pairs]
    except Exception as error:
        return Outcome(error)
    return Outcome(None, [output.detach() for output in outputs], gradients)


def _upstream(number: int, output: Tensor) -> Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(number))


def _make(argument: Any, wide: bool = False) -> Any:
    if isinstance(argument, Made):
        made = argument()
        if not wide or not made.is_floating_point():
            return made
        return made.detach().double().contiguous().requires_grad_(made.requires_grad)
    if isinstance(argument, tuple) and hasattr(argument, "_make"):
        return argument._make(_make(each, wide) for each in argument)
    if isinstance(argument, list | tuple):
        return type(argument)(_make(each, wide) for each in argument)
    return argument.clone() if isinstance(argument, Tensor) else argument


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for each in value for leaf in _leaves(each)] if isinstance(value, list | tuple) else []


def _magnitudes(invocation: Invocation) -> list[Tensor]:
    if invocation.magnitude is None:
        return []
    made = [_make(argument) for argument in invocation.arguments]
    with torch.no_grad():
        return [each.double().abs().nan_to_num(0, 0, 0) for each in _leaves(invocation.magnitude(*made))]


def _relative(result: Tensor, invocation: Invocation) -> float:
    return invocation.relative or RELATIVE[result.dtype]


def _compare(
    what: str, found: Tensor, expected: Tensor, invocation: Invocation, bound: Tensor | None, skipped: Tensor | None
) -> None:
    assert found.shape == expected.shape, f"{what}: {found.shape}, {expected.shape}"
    assert found.dtype == expected.dtype, f"{what}: {found.dtype}, {expected.dtype}"
    assert found.device == expected.device, what
    if found.is_meta:
        return
    if invocation.exact or not found.is_floating_point():
        same = torch.equal(found.nan_to_num(nan=1.25e9), expected.nan_to_num(nan=1.25e9))
        assert same, f"{what}: {found} instead of {expected}"
        return
    a, b = found.double(), expected.double()
    finite = b.isfinite()
    skip = torch.zeros_like(finite) if skipped is None else skipped
    wrong = (a.isfinite() != finite) & ~skip
    assert not wrong.any(), f"{what}: finite where eager is not, or the reverse: {a[wrong][:4]}, {b[wrong][:4]}"
    compared = finite & ~skip
    a, b = a[compared], b[compared]
    if not a.numel():
        return
    relative = _relative(found, invocation)
    # Gradients are compared where nothing is special: the largest one tells what rounding may do to a sum.
    scale = b.abs().max() if "gradient" in what else b.abs().quantile(0.9)
    allowed = relative * (b.abs() + scale) + 1e-30
    if bound is not None:
        allowed += bound[compared]
    far = (a - b).abs() > allowed
    assert not far.any(), f"{what}: {a[far][:4]} instead of {b[far][:4]}"


# ---- backends


def backends_of(op: str) -> list[str]:
    """The backends that can run here apart from eager; emulated CUDA blocks and matrix products are added below."""
    found = [name for name in operators[op].implementations if name != "eager"]
    return [name for name in found if operators[op].implementations[name].unavailable is None]


def _only_by_name(op: str, name: str, supports: Callable[..., str | None]) -> Callable[..., str | None]:
    def supports_by_name(*arguments: Any) -> str | None:
        if _backend.chosen(op) != name:
            return "runs only when selected by name"
        return supports("cpu", *arguments)

    return supports_by_name


def _register_emulated() -> None:
    """CUDA's block algorithms on the CPU as the backend "emulated"."""
    from yolov9_fast.ops import _assign, _decode, _detection_loss, _nms, _nms_boxes

    try:
        raw = emulated.operators()
    except pytest.skip.Exception:
        return
    block = (THREADS_OF_A_BLOCK, ORDER)
    ops.register_backend("emulated", devices=("cpu",), before="eager")
    kernels: dict[str, dict[str, Callable[..., Any]]] = {
        "assign": {"forward": lambda *a: raw.assign(*a, *block)},
        "decode": {"forward": lambda *a: raw.decode(*a, *block)},
        "decode_for_assignment": {"forward": lambda *a: raw.decode_for_assignment(*a, *block)},
        "nms": {"forward": lambda *a: raw.nms(*a, *block, True)},
        "nms_boxes": {"forward": lambda *a: raw.nms_boxes(*a, *block, True)},
        "detection_loss": {
            "forward": lambda *a: raw.detection_loss(None, *a, *block),
            "backward": lambda *a: raw.detection_loss(*a, True, *block)[1],
        },
    }
    supports: dict[str, Callable[..., str | None]] = {
        "assign": _assign._supports,
        "decode": _decode._supports,
        "decode_for_assignment": _decode._supports_for_assignment,
        "nms": _nms._supports,
        "nms_boxes": _nms_boxes._supports,
        "detection_loss": _detection_loss._supports,
    }
    for op, functions in kernels.items():
        ops.register_implementation(
            op, "emulated", kernels=functions, supports=_only_by_name(op, "emulated", supports[op])
        )


def _register_matrix() -> None:
    """The CUDA backend of the 1x1 convolutions, which is matrix products of PyTorch, as the backend "matrix"."""
    from yolov9_fast.ops import _conv1x1

    def supports(device: str, *arguments: Any) -> str | None:
        maps = [leaf for leaf in _leaves([*arguments[:1], *arguments[3:]]) if leaf.ndim == 4]
        return None if all(row_stride(x) is not None for x in maps) else "it reads channels_last maps"

    ops.register_backend("matrix", devices=("cpu",), before="eager")
    for op in ("conv1x1", "conv1x1_pair"):
        run = _conv1x1._run if op == "conv1x1" else _conv1x1._run_pair
        kernels = _conv1x1._cublas()

        def call(*arguments: Any, run: Any = run, kernels: Any = kernels) -> Any:
            return run(kernels, *arguments)

        ops.register_implementation(op, "matrix", call, supports=_only_by_name(op, "matrix", supports))


@functools.cache
def prepare() -> None:
    """Add both to the operators of this process: only a process that runs a target does."""
    _register_emulated()
    _register_matrix()


LIMITS: dict[str, Any] = {"memory_mib": 1024, "case_seconds": 30.0, "prepare": prepare}
"""Of a target. Interpreted Triton kernels take up to a few seconds on a busy machine."""
