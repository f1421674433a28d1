"""Changes: what a rewrite is, and what it says of the places it looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx

from se_fx.rewrites.algebra import Algebra

__all__ = ["Change", "Rewrite", "place_of"]


@dataclass(frozen=True)
class Change:
    """What a rewrite did, or why it did nothing, in one place.

    Attributes:
        place: the module, or node of the graph, that it is about.
        applied: whether anything was done.
        detail: what, or why not.
    """

    place: str
    applied: bool
    detail: str

    def within(self, path: str) -> Change:
        """The same, of the region at `path`: the place named as in the model."""
        return dataclasses.replace(self, place=f"{path}.{self.place}".lstrip("."))


#: Edits the graph, and tells what it did where.
Rewrite = Callable[[Algebra], Iterator[Change]]


def place_of(node: fx.Node) -> str:
    """A node's name for people: that of the module it calls, if it calls one."""
    return str(node.target) if node.op == "call_module" else node.name
