"""Triton's interpreter with the arithmetic of PTX: what a GPU may answer where the interpreter is exact.

An approximate instruction may give any value within the bound that the PTX ISA documents. Under `arithmetic(answer)`
the interpreter gives, of these float32 values, the one

    "short"      of the least magnitude
    "long"       of the greatest magnitude
    "scattered"  of either, or the nearest to the exact result, chosen by a hash of that result

so equal operands have equal results, as on a device. `python -m tests.ptx [pytest arguments]` runs tests under all
three, by default those of every operator that Triton has a kernel for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

ANSWERS = ("short", "long", "scattered")
LEAST_NORMAL = 2.0**-126
LOG2_E = np.float32(1.4426950408889634)


@dataclass(frozen=True)
class Bound:
    """The largest error of an instruction; `flushes`: subnormal operands and results count as zeros of their sign."""

    ulps: float = 0.0
    relative: float = 0.0
    flushes: bool = False


BOUNDS = {
    "div.full.f32": Bound(ulps=2),
    "ex2.approx.f32": Bound(ulps=2),
    "ex2.approx.ftz.f32": Bound(ulps=2, flushes=True),
    "sqrt.approx.ftz.f32": Bound(relative=2.0**-23, flushes=True),
    "rsqrt.approx.ftz.f32": Bound(relative=2.0**-22.9, flushes=True),
}
"""The approximate instructions that are emulated, with the bounds of PTX ISA 8.7, section 9.7.3."""
EXACT = frozenset({"div.rn.f32", "sqrt.rn.f32", "cvt.rna.tf32.f32"})
"""Instructions of the same names that round correctly."""
USED_FOR = {"exp": "ex2.approx.f32", "fdiv": "div.full.f32", "sqrt": "sqrt.approx.ftz.f32"}
"""What Triton compiles an operation of its interpreter to; `test_ptx.py` compares it with what it built."""
OF_AN_INSTRUCTION = 8
"""Products that an instruction of the tensor cores adds up: of TF32; of 16-bit numbers twice as many."""


def approximate(exact: np.ndarray, bound: Bound, answer: str) -> np.ndarray:
    """Float32 results within `bound` of `exact` (float64)."""
    with np.errstate(all="ignore"):
        magnitude = np.abs(exact)
        ulp = np.ldexp(1.0, np.maximum(np.frexp(magnitude)[1] - 24, -149))
        error = bound.ulps * ulp + bound.relative * magnitude
        nearest = magnitude.astype(np.float32)
        least = _towards(np.maximum(magnitude - error, 0.0), np.float32(np.inf))
        most = _towards(magnitude + error, np.float32(0.0))
        usual = np.isfinite(nearest) & (magnitude > 0) & (least <= most)
        if answer == "scattered":
            draw = _hash(exact)
            chosen = np.where(draw == 0, least, np.where(draw == 1, most, nearest))
        else:
            chosen = least if answer == "short" else most
        result = np.copysign(np.where(usual & np.isfinite(chosen), chosen, nearest), exact).astype(np.float32)
        return flushed(result) if bound.flushes else result


def _towards(values: np.ndarray, direction: np.float32) -> np.ndarray:
    """In float32, those that cannot be represented rounded towards `direction`: infinity, or zero."""
    rounded = values.astype(np.float32)
    wrong = rounded < values if direction > 0 else rounded > values
    return np.where(wrong, np.nextafter(rounded, direction), rounded)


def _hash(exact: np.ndarray) -> np.ndarray:
    """0, 1 or 2, evenly."""
    bits = np.ascontiguousarray(exact, dtype=np.float64).view(np.uint64)
    return ((bits ^ (bits >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)) % np.uint64(3)


def flushed(x: np.ndarray) -> np.ndarray:
    """Subnormal values as zeros of their sign."""
    return np.where(np.abs(x) < LEAST_NORMAL, np.copysign(np.float32(0), x), x).astype(x.dtype)


def cut_to_tf32(x: np.ndarray) -> np.ndarray:
    """Without the 13 low bits, as `wgmma` and `mma` take the operands that nothing has converted."""
    return (np.ascontiguousarray(x, dtype=np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def rounded_to_tf32(x: np.ndarray) -> np.ndarray:
    """`cvt.rna.tf32.f32`: to the nearest of 10 bits, ties away from zero; infinity and NaN as they are."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return np.where(np.isfinite(x), cut_to_tf32((bits + np.uint32(0x1000)).view(np.float32)), x)


def by_multiply_adds(a: np.ndarray, b: np.ndarray, acc: np.ndarray) -> np.ndarray:
    """acc + a · b by `fma.rn.f32`, one after the other: the product of two float32 is exact in float64."""
    for k in range(a.shape[1]):
        acc = (acc + a[:, k : k + 1].astype(np.float64) * b[k : k + 1]).astype(np.float32)
    return acc


def by_tensor_cores(a: np.ndarray, b: np.ndarray, acc: np.ndarray, answer: str) -> np.ndarray:
    """acc + a · b of factors of at most TF32, whose products are exact.

    They are added "with at least single precision", in any order and rounding: here each instruction errs by up to
    2^-23 of the sum of all magnitudes, which is what cutting off the sum's low bits costs.
    """
    with np.errstate(all="ignore"):
        a, b = cut_to_tf32(a).astype(np.float64), cut_to_tf32(b).astype(np.float64)
        exact = a @ b + acc
        steps = math.ceil(a.shape[1] / OF_AN_INSTRUCTION)
        error = steps * 2.0**-23 * (np.abs(a) @ np.abs(b) + np.abs(acc))
        direction = {"short": -1.0, "long": 1.0}.get(answer, np.sign(_hash(exact).astype(np.float64) - 1))
        return (exact + np.where(np.isfinite(error), direction * np.sign(exact) * error, 0.0)).astype(np.float32)


@contextmanager
def arithmetic(answer: str) -> Iterator[None]:
    """Within the block interpreted kernels compute as PTX may; see the module."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if answer not in ANSWERS:
        raise ValueError(f"answer: expected one of {', '.join(ANSWERS)}, got {answer!r}")

    def unary(name: str, function: Callable[[np.ndarray], np.ndarray]) -> Any:
        bound, before = BOUNDS[USED_FOR[name]], getattr(InterpreterBuilder, f"create_{name}")

        def create(self: Any, arg: Any) -> Any:
            if arg.data.dtype != np.float32:
                return before(self, arg)
            with np.errstate(all="ignore"):
                operand = flushed(arg.data) if bound.flushes else arg.data
                return TensorHandle(approximate(function(operand), bound, answer), arg.dtype.scalar)

        return create

    divide_before = InterpreterBuilder.create_fdiv

    def divide(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.data.dtype != np.float32:
            return divide_before(self, lhs, rhs)
        with np.errstate(all="ignore"):
            exact = lhs.data.astype(np.float64) / rhs.data
        return TensorHandle(approximate(exact, BOUNDS[USED_FOR["fdiv"]], answer), lhs.dtype.scalar)

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if a.data.dtype != np.float32:
            raise NotImplementedError(f"a product of {a.data.dtype}: kernels/launch.py gives float32 when interpreted")
        with np.errstate(all="ignore"):
            if "TF32" in str(input_precision):
                result = by_tensor_cores(a.data, b.data, d.data, answer)
            else:
                result = by_multiply_adds(a.data, b.data, d.data)
        return TensorHandle(result, d.dtype.scalar)

    replaced = {
        # exp(x) = 2^(x log2 e), the product rounded to float32.
        "create_exp": unary("exp", lambda x: np.exp2((x * LOG2_E).astype(np.float64))),
        "create_sqrt": unary("sqrt", lambda x: np.sqrt(x.astype(np.float64))),
        "create_fdiv": divide,
        "create_dot": dot,
    }
    before = {name: getattr(InterpreterBuilder, name) for name in replaced}
    try:
        for name, function in replaced.items():
            setattr(InterpreterBuilder, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(InterpreterBuilder, name, function)
