"""Numbers of files that others wrote: what is taken as one, and what is not.

Strings of digits and integral floats are numbers, as some programs write them; true and false never are.
"""

from __future__ import annotations

import math

import numpy as np

LARGEST_INTEGER = 2**63 - 1
_EXACT_FLOAT = 2**53


def finite_number(value: object) -> float | None:
    """The number that `value` (a number or a string of one) is; None for anything else, NaN and infinities too."""
    if type(value) is not float:
        if isinstance(value, str):
            if "_" in value or not value.isascii():
                return None
        elif isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            return None
        try:
            value = float(value)
        except (ValueError, OverflowError):
            return None
    return value if math.isfinite(value) else None


def integer(value: object) -> int | None:
    """The integer of at most 63 bits that `value` is, or a string or float equals; None for anything else."""
    if type(value) is int:  # first, because it is what good files hold
        return value if abs(value) <= LARGEST_INTEGER else None
    if isinstance(value, str) and len(value) < 25 and value.isascii() and value.strip().removeprefix("-").isdecimal():
        value = int(value)
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        result = int(value)
    else:
        number = finite_number(value)
        if number is None or number != math.floor(number) or abs(number) > _EXACT_FLOAT:
            return None
        result = int(number)
    return result if abs(result) <= LARGEST_INTEGER else None


def flag(value: object) -> bool | None:
    """A mark such as `iscrowd`: 0, 1, "0", "1", false, true; a missing one is False; None for anything else."""
    if value is None:
        return False
    if type(value) is int:
        return bool(value) if value in (0, 1) else None
    number = float(value) if isinstance(value, bool) else finite_number(value)
    return bool(number) if number in (0.0, 1.0) else None
