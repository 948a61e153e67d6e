"""Targets of the operators that update all weights: buffers of any length, values up to infinity, any groups."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from tests.fuzz.frame import Case, target
from tests.fuzz.operators import LIMITS, Invocation, check, spoil, tensor
from yolov9_fast import ops

NUMBERS = st.sampled_from([0.0, 1e-3, 0.25, 0.7, 1.0, -0.3])
FACTORS = st.sampled_from([1.0, 0.5, 1e-4, 0.0, float("nan"), float("inf")])


def _buffers(case: Case, *names: str) -> tuple[int, list[Any]]:
    """Their length, and buffers of it; sometimes one of another length or dtype, or that cannot be written as it is."""
    count = case.draw(st.integers(0, 70) | st.sampled_from([1024, 1025, 2500]), "count")
    layout = case.draw(st.sampled_from(["contiguous"] * 9 + ["every_second"]), "layout")
    other = case.draw(st.integers(0, 60), "of another dtype or length")
    made = []
    for index, name in enumerate(names):
        shape = (count + (other == index),)
        dtype = torch.float64 if other == 10 + index else torch.float32
        fixed: dict[str, Any] = {"kind": "uniform"} if name == "second" else {}
        made.append(tensor(case, name, shape, dtype, layout=layout, **fixed))
    return count, made


def _ends(case: Case, count: int) -> list[int]:
    inner = case.draw(st.lists(st.integers(0, max(count, 1)), max_size=4), "ends")
    return [*(inner if case.draw(st.integers(0, 9), "unsorted") == 0 else sorted(inner)), count]


def _numbers(case: Case, shared: int, each: int, groups: int) -> torch.Tensor:
    drawn = [case.draw(FACTORS, "factor"), *(case.draw(NUMBERS, "shared") for _ in range(shared - 1))]
    drawn += [case.draw(NUMBERS, "of a group") for _ in range(each * groups)]
    return torch.tensor(drawn)


@target("sgd_update", **LIMITS)
def sgd_update(case: Case) -> None:
    count, buffers = _buffers(case, "parameters", "gradients", "momenta", "averages")
    ends = _ends(case, count)
    nesterov = case.draw(st.booleans(), "nesterov")

    def call(*arguments: Any) -> Any:
        ops.sgd_update(*arguments, nesterov=nesterov)
        return arguments[:4]

    check(Invocation("sgd_update", call, spoil(case, [*buffers, _numbers(case, 3, 2, len(ends)), ends])))


@target("adam_update", **LIMITS)
def adam_update(case: Case) -> None:
    count, buffers = _buffers(case, "parameters", "gradients", "first", "second", "averages")
    ends = _ends(case, count)
    decoupled = case.draw(st.booleans(), "decoupled")
    epsilon = case.draw(st.sampled_from([1e-8, 1e-3, 1.0]), "epsilon")

    def call(*arguments: Any) -> Any:
        ops.adam_update(*arguments, epsilon=epsilon, decoupled=decoupled)
        return arguments[:5]

    numbers = _numbers(case, 5, 3, len(ends))
    numbers[7::3].abs_().clamp_min_(0.25)  # the root of the correction is that of a positive number
    check(Invocation("adam_update", call, spoil(case, [*buffers, numbers, ends])))
