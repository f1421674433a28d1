"""What arguments may be: the questions that several checks ask. In Python a bool is an int; here it is no number."""

from __future__ import annotations

from typing import Any

__all__ = ["is_count", "is_number"]


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float; NaN is one.

    >>> is_number(0.5), is_number(True), is_number("1")
    (True, False, False)
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is an int of at least so much.

    >>> is_count(1), is_count(0), is_count(1.0), is_count(True)
    (True, False, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
