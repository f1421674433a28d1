"""Fusing scales: a feature map is scaled where it is added, or in place, so that no scaled copy of it is written.

u g + x      as one operator, addcmul(x, u, g)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from se_fx.analysis import changes_in_place
from se_fx.rewrites.algebra import Algebra
from se_fx.rewrites.change import Change, place_of
from se_fx.rewrites.editing import replace, sweep
from se_fx.rewrites.terms import Scale

__all__ = ["fuse_scales"]


def fuse_scales(algebra: Algebra) -> Iterator[Change]:
    """A scaled map is added in the same operator, where a sum alone reads it; else scaled in place, if nobody else reads it."""
    for scale in algebra.scales():
        readers = algebra.readers(scale.node)
        reader, place = readers[0] if len(readers) == 1 else None, place_of(scale.value)
        if reader is not None and _adds(algebra, reader, scale) and not algebra.is_written(scale.value, reader):
            summand = next(source for source in reader.all_input_nodes if source is not scale.node)
            with algebra.graph.inserting_before(reader):
                new = algebra.graph.call_function(torch.addcmul, (summand, scale.value, scale.gate))
            replace(algebra, reader, new)
            sweep(algebra, scale.node)
            yield Change(place, True, "with the sum that reads it")
        elif changes_in_place(scale.node, algebra.modules):
            continue
        elif algebra.is_own(scale.value) and not algebra.is_read_after(scale.value, scale.node):
            with algebra.graph.inserting_before(scale.node):
                new = algebra.graph.call_method("mul_", (scale.value, scale.gate))
            replace(algebra, scale.node, new)
            yield Change(place, True, "in place")
        else:
            yield Change(place, False, "others read the value, or may")


def _adds(algebra: Algebra, reader: fx.Node, scale: Scale) -> bool:
    """Whether a node adds the scaled map and another of its shape, and nobody sees whether it does so in place."""
    own = not changes_in_place(reader, algebra.modules) or reader.args[0] is scale.node
    both = algebra.adds(reader) and len(set(reader.args)) == 2
    return both and own and all(algebra.maps.get(each) == algebra.maps[scale.node] for each in reader.all_input_nodes)
