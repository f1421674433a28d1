"""Fusing scales: a feature map is scaled where it is added, or in place, so that no scaled copy of it is written.

u g + x      as one operator, addcmul(x, u, g); to compilers as a product and a sum, which a convolution that makes x can take
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from se_fx.rewrites.algebra import Algebra
from se_fx.rewrites.change import Change, place_of
from se_fx.rewrites.editing import drop, insert, promoted, replace
from se_fx.rewrites.products import scaled, scaled_sum
from se_fx.rewrites.terms import Scale

__all__ = ["fuse_scales"]


def fuse_scales(algebra: Algebra) -> Iterator[Change]:
    """A scaled map is added in the same operator, where a sum alone reads it; else scaled in place, if nobody else reads it."""
    for scale in algebra.scales():
        readers = algebra.readers(scale.node)
        reader, place = readers[0] if len(readers) == 1 else None, place_of(scale.value)
        if reader is not None and _adds(algebra, reader, scale):
            _fuse(algebra, reader, scale)
            yield Change(place, True, "with the sum that reads it")
        elif algebra.effects.of(scale.node).writes:
            continue
        elif algebra.effects.is_own(scale.value) and algebra.effects.is_forgotten(scale.value, scale.node):
            with algebra.graph.inserting_before(scale.node):
                new = insert(algebra, scale.node, scaled, scale.value, scale.gate)
            replace(algebra, scale.node, new)
            yield Change(place, True, "in place")
        else:
            yield Change(place, False, "others read the value, or may")


def _adds(algebra: Algebra, reader: fx.Node, scale: Scale) -> bool:
    """Whether a node adds the scaled map and another of its shape, and nobody sees how, nor when."""
    effects, summands = algebra.effects, algebra.summands(reader)
    if not summands or any(algebra.maps.get(each) != algebra.maps[scale.node] for each in summands):
        return False
    if any(effects.may_change(each, scale.node, reader) for each in (scale.value, scale.gate)):
        return False
    if any(not effects.is_forgotten(each, reader) for each in effects.of(reader).writes):
        return False
    return algebra.can_be_left_out(scale, reader)


def _fuse(algebra: Algebra, reader: fx.Node, scale: Scale) -> None:
    (summand,) = (each for each in algebra.summands(reader) if each is not scale.node)
    written = algebra.effects.of(reader).writes
    with algebra.graph.inserting_before(reader):
        new = insert(algebra, reader, scaled_sum, summand, scale.value, scale.gate)
        # Under autocast they may be of two types, and what is added to in place keeps its own.
        if scale.node in written:
            new = promoted(algebra, new, scale.value, scale.gate)
        elif summand in written:
            new = insert(algebra, reader, "type_as", new, summand)
    replace(algebra, reader, new)
    drop(algebra, scale.node)
