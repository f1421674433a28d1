"""The placements in residual units, which are the paper's: SE, SE-PRE, SE-POST and SE-Identity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx, nn

from se_fx.analysis import Effects, Modules, Unit, activation_after, called, modules_of, residual_units, values_of
from se_fx.placement.spot import Spot

__all__ = ["identity", "post", "pre", "residual"]


def residual(graph: fx.Graph, root: nn.Module) -> Iterator[Spot]:
    """At the end of each residual branch, before the addition: the paper's standard block, SE."""
    return _one_per_conv(Spot(unit.conv, unit.channels, (unit.end,)) for unit in residual_units(graph, root))


def pre(graph: fx.Graph, root: nn.Module) -> Iterator[Spot]:
    """On what each residual branch reads, its shortcut reading the plain value: the paper's SE-PRE."""
    modules = modules_of(root)
    effects = Effects(root, modules, values_of(graph, root))

    def spots() -> Iterator[Spot]:
        for unit in residual_units(graph, root):
            readers = frozenset(user for user in unit.start.users if user in unit.branch)
            width = unit.start_channels or _width_read(readers, modules)
            # Changed in place, the plain value would reach the shortcut changed; scaled, unchanged.
            if width is not None and effects.may_be_given_a_copy(unit.start, readers):
                yield Spot(unit.conv, width, (unit.start,), readers)

    return _one_per_conv(spots())


def post(graph: fx.Graph, root: nn.Module) -> Iterator[Spot]:
    """After each residual unit's addition and the activation that follows it: the paper's SE-POST."""
    modules = modules_of(root)

    def value(unit: Unit) -> fx.Node:
        return activation_after(unit.add, modules) or unit.add

    return _one_per_conv(Spot(unit.conv, unit.channels, (value(unit),)) for unit in residual_units(graph, root))


def identity(graph: fx.Graph, root: nn.Module) -> Iterator[Spot]:
    """On the shortcut of each residual unit: the paper's SE-Identity."""
    effects = Effects(root, modules_of(root), values_of(graph, root))
    return _one_per_conv(
        Spot(unit.conv, unit.channels, (unit.shortcut,), frozenset({unit.add}))
        for unit in residual_units(graph, root)
        # Added to in place, the value itself must hold the sum, if anyone reads it later.
        if effects.may_be_given_a_copy(unit.shortcut, {unit.add})
    )


def _width_read(readers: Iterable[fx.Node], modules: Modules) -> int | None:
    """The channels of a value by the convs among those that read it."""
    convs = (called(reader, modules) for reader in readers)
    return next((conv.in_channels for conv in convs if isinstance(conv, nn.Conv2d)), None)


def _one_per_conv(spots: Iterable[Spot]) -> Iterator[Spot]:
    """Units that share their modules share their block."""
    by_conv: dict[str, list[Spot]] = {}
    for spot in spots:
        by_conv.setdefault(spot.conv, []).append(spot)
    for same in by_conv.values():
        readers = [spot.readers for spot in same if spot.readers is not None]
        if len({spot.channels for spot in same}) == 1:
            nodes = tuple(dict.fromkeys(node for spot in same for node in spot.nodes))
            yield Spot(same[0].conv, same[0].channels, nodes, frozenset().union(*readers) if readers else None)
