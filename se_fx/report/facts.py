"""Facts: what a report tells, and how it is told apart. What it looks like is for others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from se_fx.cost import Cost, Operator
from se_fx.planning import Part, Site, Skip

__all__ = ["Facts", "by_reason"]


@dataclass(frozen=True)
class Facts:
    """What `transform` did to a model. The attributes are those of `se_fx.Report`."""

    model: str
    sites: tuple[Site, ...]
    skipped: tuple[Skip, ...]
    base: Cost
    added: Cost
    measured: bool = False
    opaque: tuple[tuple[str, str], ...] = ()
    alone: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    uncounted: tuple[tuple[str, int], ...] = ()
    activation_bytes: tuple[int, int] | None = None
    activation_bytes_optimized: int | None = None
    excerpt: tuple[Part, ...] = field(default=(), repr=False, compare=False)
    operators: tuple[Operator, ...] = field(default=(), repr=False, compare=False)


def by_reason(skipped: Iterable[Skip]) -> dict[str, list[Skip]]:
    """Convs without a block by the reason, in which their own number of channels is left out."""
    groups: dict[str, list[Skip]] = {}
    for skip in skipped:
        groups.setdefault(skip.reason.removeprefix(f"{skip.channels} "), []).append(skip)
    return groups
