"""Spots: where in a graph a block can go, and what a policy that says so is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import fx, nn

__all__ = ["Policy", "Spot"]


@dataclass(frozen=True)
class Spot:
    """Where one block can go.

    Attributes:
        conv: the Conv2d the block is named after: its name in the region.
        channels: channels of the scaled value.
        nodes: the values to scale, of shape (N, channels, H, W); several where a shared module is called several times.
        readers: the users that are to read the scaled value; None for all.
    """

    conv: str
    channels: int
    nodes: tuple[fx.Node, ...]
    readers: frozenset[fx.Node] | None = None


#: Yields the spots of a region's graph; the second argument is the module that the graph's targets refer to.
Policy = Callable[[fx.Graph, nn.Module], Iterable[Spot]]
