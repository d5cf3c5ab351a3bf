"""Checks of what the constructors of layers and gates are given, by the argument's name."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any


def whole_number(name: str, value: Any) -> int:
    """A whole number of at least 1, NumPy's kinds included.

    Raises:
        TypeError: it is of another kind, also a float such as 2.0.
        ValueError: it is less.
    """
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{name} = {value!r}: must be a whole number, not {type(value).__name__}")
    number = operator.index(value)
    if number < 1:
        raise ValueError(f"{name} = {number}: must be at least 1")
    return number


def finite_number(name: str, value: Any, least: float, why: str = "") -> float:
    """A finite number of at least `least`.

    Args:
        name: of the argument.
        value: given.
        least: smallest one.
        why: what follows in the message, about the value.

    Raises:
        TypeError: it is no number.
        ValueError: it is less, infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} = {value!r}: must be a number, not {type(value).__name__}")
    number = float(value)
    if not least <= number < math.inf:
        raise ValueError(f"{name} = {number:g}: must be at least {least:g} and finite{why}")
    return number
