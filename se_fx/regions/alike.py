"""Alike: which classes made for graphs run the same code, so that one of them does for all.

Models made alike are then of one class, as they were before they were rewritten, and what one of them has compiled serves the
others.
"""

from __future__ import annotations

import weakref
from typing import Any

from se_fx.regions.forwards import Forwards

__all__ = ["first_alike"]

_first: weakref.WeakValueDictionary[tuple[Any, ...], type[Any]] = weakref.WeakValueDictionary()
_PLAIN = (int, float, bool, str, type(None))


def first_alike(made: type[Any], own: type[Any], added: Any, keeps: bool, excited: bool, *code: Forwards | None) -> type[Any]:
    """The first class that was given with these attributes and the same code; `made` itself, if there was none."""
    return _first.setdefault((own, added, keeps, excited, *map(_told_by, code)), made)


def _told_by(forwards: Forwards | None) -> tuple[Any, ...]:
    """What tells generated functions apart: the mode, the code, what this refers to by name, and defaults of arguments."""
    told: list[Any] = []
    for mode, forward in sorted((forwards or {}).items()):
        refers = {name: id(forward.__globals__[name]) for name in forward.__code__.co_names if name in forward.__globals__}
        told += [mode, forward.__code__, tuple(refers.items())]
        told += [(type(each), repr(each)) if type(each) in _PLAIN else id(each) for each in forward.__defaults__ or ()]
    return tuple(told)
