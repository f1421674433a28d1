"""What arguments may be: what several checks ask, or refuse. In Python a bool is an int; here it is no number."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from se_fx.errors import SqueezeExciteError, first_line, hint, shown

__all__ = ["as_device", "as_path", "check_flag", "check_floating", "chosen_names", "is_count", "is_number"]


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


def check_flag(name: str, value: Any) -> None:
    """Raise `SqueezeExciteError` where `value` is neither True nor False."""
    if not isinstance(value, bool):
        raise SqueezeExciteError(f"{name}={shown(value)}: expected True or False")


def check_floating(name: str, dtype: Any, otherwise: str = "") -> None:
    """Raise `SqueezeExciteError` where `dtype` is no real floating-point dtype; the message says what else may be given."""
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise SqueezeExciteError(f"{name}={shown(dtype)}: expected {otherwise}a floating-point dtype such as torch.bfloat16")


def chosen_names(argument: str, names: Any, table: Mapping[str, Any]) -> list[str]:
    """The names of a table's entries that were asked for, in the table's order; None asks for all.

    Raises:
        SqueezeExciteError: `names` is no list, or one of them isn't in the table.
    """
    if names is None:
        return list(table)
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise SqueezeExciteError(f"{argument}={shown(names)}: expected names in a list, such as [{next(iter(table))!r}]")
    given = list(names)
    for name in given:
        if not isinstance(name, str) or name not in table:
            raise SqueezeExciteError(f"{argument}: there is no {shown(name)}; {hint(name, table, 'some of')}")
    return [name for name in table if name in given]


def as_path(name: str, value: Any) -> Path:
    """The path of a file.

    Raises:
        SqueezeExciteError: `value` is none.
    """
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise SqueezeExciteError(f"{name}={shown(value)}: expected the path of a file")
    return Path(value)


def as_device(device: Any) -> torch.device:
    """The CPU or a CUDA device of this machine.

    Raises:
        SqueezeExciteError: `device` is neither.
    """
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        expected = "expected such as 'cpu' or 'cuda:0'"
        raise SqueezeExciteError(f"device={shown(device)}: {expected}. {first_line(error)}") from error
    if where.type != "cpu" and not (where.type == "cuda" and (where.index or 0) < torch.cuda.device_count()):
        raise SqueezeExciteError(f"device={str(where)!r}: expected 'cpu', or a CUDA device that this machine has")
    return where
