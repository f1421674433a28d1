"""Constant gates: a gate whose last matrix is zero is the same for every input.

g = sigma(0 h + b) = sigma(b)      so the block is a constant factor of each channel, or, where that is 1, nothing
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from se_fx.rewrites.algebra import Algebra
from se_fx.rewrites.change import Change, place_of
from se_fx.rewrites.editing import drop, insert, insert_buffer, replace
from se_fx.rewrites.terms import Affine, Scale

__all__ = ["constant_gates"]


def constant_gates(algebra: Algebra) -> Iterator[Change]:
    """A gate whose last matrix is zero is the same for every input: a constant factor, or, where that is 1, nothing."""
    for scale in algebra.scales():
        found = _last_product(algebra, scale.gate)
        if found is None or found[1].weight.is_meta or bool(found[1].weight.any()):
            continue
        node, product = found
        place, factor = place_of(node), _through(algebra, node, scale, product)
        if factor is None:
            yield Change(place, False, "is zero, but what follows isn't known to act on each channel alone")
            continue
        if scale.value in algebra.effects.of(scale.node).writes and not algebra.effects.is_forgotten(scale.value, scale.node):
            yield Change(place, False, "is zero, but others read the value that is scaled in place")
            continue
        is_one = bool((factor == 1).all())
        if is_one and algebra.effects.is_forgotten(scale.value, scale.node):
            replace(algebra, scale.node, scale.value)
            drop(algebra, scale.node)
        else:
            with algebra.graph.inserting_before(scale.node):
                buffer = insert_buffer(algebra, scale.node, "factor", factor)
                adapted = insert(algebra, scale.node, "type_as", buffer, scale.value)
                new = insert(algebra, scale.node, torch.mul, scale.value, adapted)
            replace(algebra, scale.node, new)
            drop(algebra, scale.node)
        yield Change(place, True, "is 1 for every input" if is_one else "is the same for every input")


def _last_product(algebra: Algebra, gate: fx.Node) -> tuple[fx.Node, Affine] | None:
    """The last product on the way to a gate, along nodes with a single source."""
    node: fx.Node | None = gate
    while node is not None:
        product = algebra.product(node)
        if product is not None:
            return node, product
        sources = [source for source in algebra.effects.of(node).reads if source in algebra.vectors]
        node = sources[0] if len(sources) == 1 else None
    return None


def _through(algebra: Algebra, node: fx.Node, scale: Scale, product: Affine) -> Tensor | None:
    """What the way from a product to the gate makes of its bias, (C, 1, 1); None where it may not act on each channel alone."""
    if scale.gate is node:
        return product.bias.to(product.dtype).reshape(-1, 1, 1)
    maps = [each for each in algebra.maps if each < node]
    way = algebra.evaluation.way(scale.gate, {node, *maps})
    if way is None or algebra.effects.may_change(scale.gate, scale.gate, scale.node):
        return None
    for each in way:
        acts_alone = all(source is node or source in way for source in algebra.effects.of(each).reads)
        if not acts_alone or not algebra.effects.of(each).pointwise:
            return None
    found = [_at_batch(algebra, way, node, product, batch) for batch in (1, 2, 3)]
    factors = [gate for gate in found if gate is not None and gate.dtype == algebra.dtype(scale.node)]
    # Equal but for rounding: vector instructions compute most of a tensor's entries, and others the last ones.
    is_one_for_all = len(factors) == 3 and all(
        torch.allclose(gate, factors[0], rtol=4 * torch.finfo(gate.dtype).eps, atol=0) for gate in factors
    )
    return factors[0][0] if is_one_for_all else None


def _at_batch(algebra: Algebra, way: list[fx.Node], node: fx.Node, product: Affine, batch: int) -> Tensor | None:
    """What a way makes of a product's bias, for so many samples: (N, C, 1, 1)."""
    bias = product.bias.to(product.dtype)
    known = {node: bias.reshape(1, *algebra.vectors[node]).repeat(batch, *[1] * len(algebra.vectors[node]))}
    gate = algebra.evaluation.run(way, {**known, **algebra.evaluation.some(algebra.maps, way, batch, product.dtype)})
    return gate if isinstance(gate, Tensor) and gate.shape == (batch, bias.numel(), 1, 1) else None
