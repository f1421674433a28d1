"""Blends: as much of a block as was learned is told by the block's gate alone.

u + s (u g - u) = u (1 - s + s g)      and where s is 0, no block is left
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, fx

from se_fx.rewrites.algebra import Algebra
from se_fx.rewrites.change import Change, place_of
from se_fx.rewrites.editing import drop, insert, insert_buffer, replace
from se_fx.rewrites.terms import Scale

__all__ = ["blends"]

_DIFFERENCES = frozenset({operator.sub, torch.sub, "sub"})


class _Blend(NamedTuple):
    """The sum `node` of a map `value` and `strength` times the difference that what `made` yields makes to it."""

    node: fx.Node
    value: fx.Node
    made: fx.Node
    strength: Tensor


def blends(algebra: Algebra) -> Iterator[Change]:
    """A map and a share of the difference that a block makes to it: the map scaled by a gate of that share, or the map."""
    for node in list(algebra.graph.nodes):
        blend = _blend(algebra, node) if not node._erased else None
        if blend is None:
            continue
        place = place_of(blend.made)
        if not blend.strength.any():
            with algebra.graph.inserting_before(node):
                is_free = algebra.effects.is_forgotten(blend.value, node)
                new = blend.value if is_free else insert(algebra, node, torch.clone, blend.value)
            replace(algebra, node, new)
            yield Change(place, True, "has no share in the sum")
            continue
        scale = algebra.scale(blend.made)
        if scale is None or not _same(algebra, scale, blend):
            yield Change(place, False, "is no product of the value and a gate")
            continue
        replace(algebra, node, _scaled(algebra, blend, scale))
        drop(algebra, scale.node)
        yield Change(place, True, "its share is in the gate")


def _blend(algebra: Algebra, node: fx.Node) -> _Blend | None:
    summands = algebra.summands(node)
    for value, share in (summands, summands[::-1]) if summands else ():
        found = algebra.normalization(share)
        if found is None or found.bias.is_meta or found.bias.any() or algebra.maps.get(value) != algebra.maps.get(node):
            continue
        difference, given = found.source, algebra.given(found.source)
        if difference.target not in _DIFFERENCES or given.keys() != {"input", "other"} or given["other"] is not value:
            continue
        made = given["input"]
        way = [node, share, difference]
        while isinstance(made, fx.Node) and made.target == "type_as" and made.args[1:] == (value,):
            way.append(made)
            made = made.args[0]
        types = {algebra.dtype(each) for each in (*way, made, value)} if isinstance(made, fx.Node) else {None}
        alone = all(len(algebra.readers(each)) == 1 for each in (*way[1:], made)) if len(types) == 1 else False
        if None not in types and alone and not any(algebra.effects.of(each).writes for each in way):
            return _Blend(node, value, made, found.weight)
    return None


def _same(algebra: Algebra, scale: Scale, blend: _Blend) -> bool:
    """Whether a scale is of the very value of a blend, which nothing changes on the way, nor the gate."""
    effects = algebra.effects
    unchanged = not any(effects.may_change(each, scale.node, blend.node) for each in (scale.value, scale.gate))
    return scale.value is blend.value and not effects.of(scale.node).writes and unchanged


def _scaled(algebra: Algebra, blend: _Blend, scale: Scale) -> fx.Node:
    """The map times the share of the gate."""
    node, strength = blend.node, blend.strength.reshape(-1, 1, 1)
    with algebra.graph.inserting_before(node):
        gate = scale.gate
        if not bool((strength == 1).all()):
            for suffix, call, constant in (("strength", torch.mul, strength), ("rest", torch.add, 1 - strength)):
                buffer = insert_buffer(algebra, node, suffix, constant)
                gate = insert(algebra, node, call, gate, insert(algebra, node, "type_as", buffer, gate))
        return insert(algebra, node, torch.mul, blend.value, insert(algebra, node, "type_as", gate, blend.value))
