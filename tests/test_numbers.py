"""What counts as a number in files of others."""

from __future__ import annotations

import math

import numpy as np
import pytest

from yolov9_fast._numbers import finite_number, flag, integer


@pytest.mark.parametrize(
    ("value", "number"),
    [(3, 3.0), (2.5, 2.5), ("8", 8.0), (" -1e3 ", -1000.0), (np.float32(0.5), 0.5), (np.int64(4), 4.0)],
)
def test_finite_number(value: object, number: float) -> None:
    found = finite_number(value)
    assert (found, type(found)) == (number, float)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        "",
        "x",
        "1_0",
        "nan",
        "inf",
        "\uff11",
        math.nan,
        -math.inf,
        10**400,
        "9" * 400,
        [1],
        {},
        np.bool_(1),
    ],
)
def test_no_finite_number(value: object) -> None:
    assert finite_number(value) is None


@pytest.mark.parametrize(
    ("value", "number"),
    [(3, 3), (-2, -2), (3.0, 3), ("3", 3), ("3.0", 3), ("-7", -7), (2**63 - 1, 2**63 - 1), (np.int8(3), 3)],
)
def test_integer(value: object, number: int) -> None:
    found = integer(value)
    assert (found, type(found)) == (number, int)
    assert integer(str(2**63 - 1)) == 2**63 - 1


@pytest.mark.parametrize(
    "value", [None, True, 3.5, "3.5", "x", "\u00b2", math.nan, math.inf, 1e300, 2**63, str(2**63), "9" * 5000, [3], {3}]
)
def test_no_integer(value: object) -> None:
    assert integer(value) is None


@pytest.mark.parametrize("value", [1, 1.0, "1", "1.0", True])
def test_a_set_flag(value: object) -> None:
    assert flag(value) is True


@pytest.mark.parametrize("value", [None, 0, 0.0, "0", False])
def test_a_flag_that_is_not_set(value: object) -> None:
    assert flag(value) is False


@pytest.mark.parametrize("value", [2, -1, 0.5, "yes", "true", "", math.nan, [], {}])
def test_no_flag(value: object) -> None:
    assert flag(value) is None
