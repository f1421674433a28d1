"""Remembering: what was found out about a graph is found out once, where nobody changes its modules in between."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import fx, nn

__all__ = ["remembered", "remembering"]

Found = TypeVar("Found")
_FOUND: ContextVar[dict[Any, Any] | None] = ContextVar("found", default=None)


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """Within this, graphs compute what they compute now, and their modules stay as they are."""
    token = _FOUND.set({} if (known := _FOUND.get()) is None else known)
    try:
        yield
    finally:
        _FOUND.reset(token)


def remembered(function: Callable[[fx.Graph, nn.Module], Found]) -> Callable[[fx.Graph, nn.Module], Found]:
    """A function of a graph and its root that is called once for each within `remembering`."""

    @functools.wraps(function)
    def once(graph: fx.Graph, root: nn.Module) -> Found:
        known = _FOUND.get()
        if known is None:
            return function(graph, root)
        key = function, graph, id(root)
        if key not in known:
            known[key] = function(graph, root), root  # which keeps its id
        return known[key][0]  # type: ignore[no-any-return]

    return once
