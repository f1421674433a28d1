"""Placement policies: from a region's graph to the values that may be scaled. Knows nothing of how nodes are edited.

A policy is a function ``(graph, root) -> Iterable[Spot]``, `root` being the module the graph's targets refer to, not to be
changed. Any function of this kind does; `PLACEMENTS` names those that come along.

    unit:      start ──┬── conv ─ norm ─ relu ─ conv ─ norm ──── add ─ relu ──
                       └──────────── shortcut ──────────────────┘
    pre ───────────────▲                              ▲  ▲        ▲     ▲
    conv, norm ─────────────────(every conv)──────────┘──┤        │     │
    residual ────────────────────────────────────────────┘        │     │
    identity (on the shortcut) ───────────────────────────────────┘     │
    post ───────────────────────────────────────────────────────────────┘
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import fx, nn

from se_fx.dataflow import Modules, called, changes_in_place, modules_of
from se_fx.residual import Unit, activation_after, residual_units

__all__ = ["ELSEWHERE", "PLACEMENTS", "Policy", "Spot", "conv", "identity", "norm", "post", "pre", "residual"]


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


Policy = Callable[[fx.Graph, nn.Module], Iterable[Spot]]


# ------------------------------------------------------------------------------------------------------------ every conv
def conv(graph: fx.Graph, root: nn.Module) -> Iterator[Spot]:
    """Directly after each Conv2d (MosaicML Composer's placement): one block for a module, applied at each of its calls."""
    for module, nodes in _conv_calls(graph, modules_of(root)).items():
        yield Spot(str(nodes[0].target), module.out_channels, tuple(nodes))


def norm(graph: fx.Graph, root: nn.Module) -> Iterator[Spot]:
    """After the normalisation that follows each Conv2d, so that the two still fuse for inference."""
    modules = modules_of(root)
    for module, nodes in _conv_calls(graph, modules).items():
        norms = [_norm_after(node, modules) for node in nodes]
        if all(node is not None for node in norms):
            yield Spot(str(nodes[0].target), module.out_channels, tuple(node for node in norms if node is not None))


def _conv_calls(graph: fx.Graph, modules: Modules) -> dict[nn.Conv2d, list[fx.Node]]:
    calls: dict[nn.Conv2d, list[fx.Node]] = {}
    for node in graph.nodes:
        module = called(node, modules)
        if isinstance(module, nn.Conv2d):
            calls.setdefault(module, []).append(node)
    return calls


def _norm_after(node: fx.Node, modules: Modules) -> fx.Node | None:
    for user in node.users:
        module = called(user, modules)
        name = type(module).__name__ if module is not None else getattr(user.target, "__name__", "")
        if "norm" in name.lower() and user.args[:1] == (node,):
            return user
    return None


# --------------------------------------------------------------------------------------------------------- residual units
def residual(graph: fx.Graph, root: nn.Module) -> Iterator[Spot]:
    """At the end of each residual branch, before the addition: the paper's standard block, SE."""
    return _one_per_conv(Spot(unit.conv, unit.channels, (unit.end,)) for unit in residual_units(graph, root))


def pre(graph: fx.Graph, root: nn.Module) -> Iterator[Spot]:
    """On what each residual branch reads, its shortcut reading the plain value: the paper's SE-PRE."""
    modules = modules_of(root)

    def spots() -> Iterator[Spot]:
        for unit in residual_units(graph, root):
            readers = frozenset(user for user in unit.start.users if user in unit.branch)
            width = unit.start_channels or _width_read(readers, modules)
            # Changed in place, the plain value would reach the shortcut changed; scaled, unchanged.
            if width is not None and not any(changes_in_place(reader, modules) for reader in readers):
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
    modules = modules_of(root)
    return _one_per_conv(
        Spot(unit.conv, unit.channels, (unit.shortcut,), frozenset({unit.add}))
        for unit in residual_units(graph, root)
        # Added to in place, the value itself must hold the sum, if anyone reads it later.
        if not (changes_in_place(unit.add, modules) and unit.add.args[0] is unit.shortcut)
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


#: Placement policies by name.
PLACEMENTS: dict[str, Policy] = {
    "conv": conv,
    "norm": norm,
    "residual": residual,
    "pre": pre,
    "post": post,
    "identity": identity,
}
#: Why a Conv2d is not where a policy puts blocks.
ELSEWHERE = {
    "conv": "is never called by the code that was captured",
    "norm": "is followed by no normalisation",
    **dict.fromkeys(("residual", "pre", "post", "identity"), "is not the last Conv2d of a residual branch"),
}
