"""Folding norms: one with fixed statistics, s u + t of each channel, goes into what computes u.

s (W x + b) + t = (s W) x + (s b + t)        into the convolution before it
s (u g) + t     = u (s g) + t                behind a block, into the block's gate
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import fx, nn

from se_fx.regions import clone
from se_fx.rewrites.algebra import Algebra
from se_fx.rewrites.change import Change, place_of
from se_fx.rewrites.editing import drop, insert, insert_buffer, insert_call, promoted, replace
from se_fx.rewrites.terms import Affine, Scale, with_parameters

__all__ = ["fold_norms"]


def fold_norms(algebra: Algebra) -> Iterator[Change]:
    """A norm with fixed statistics goes into the convolution before it; behind a gate, its scale goes into the gate."""
    for node in list(algebra.graph.nodes):
        norm = algebra.normalization(node) if not node._erased else None
        if norm is None:
            continue
        conv, scale = algebra.convolution(norm.source), algebra.scale(norm.source)
        if conv is None and scale is None:
            continue
        if algebra.readers(norm.source) != [node]:
            yield Change(place_of(node), False, f"others read {place_of(norm.source)} too")
        elif algebra.dtype(norm.source) != norm.dtype:
            yield Change(place_of(node), False, f"is of another type than {place_of(norm.source)}")
        elif conv is not None:
            yield _into_conv(algebra, conv, norm, node)
        elif scale is not None and norm.raw is None:
            yield _into_gate(algebra, scale, norm, node)


def _into_conv(algebra: Algebra, conv: nn.Conv2d, norm: Affine, node: fx.Node) -> Change:
    like = conv.weight
    weight = like.detach().to(norm.weight) * norm.weight[:, None, None, None]
    bias = norm.bias if conv.bias is None else conv.bias.detach().to(norm.weight) * norm.weight + norm.bias
    folded = with_parameters(cast("nn.Conv2d", clone(conv)), weight.to(like), bias.to(like))
    source = norm.source
    with algebra.graph.inserting_before(source):
        new = insert_call(algebra, source, "folded", folded, algebra.given(source)["input"])
    change = Change(place_of(node), True, f"into {place_of(source)}")
    if norm.raw is None:
        replace(algebra, node, new)
    else:
        with algebra.graph.inserting_before(node):
            replace(algebra, node, promoted(algebra, new, new, norm.raw))
    replace(algebra, source, new)
    return change


def _into_gate(algebra: Algebra, scale: Scale, norm: Affine, node: fx.Node) -> Change:
    place, effects = place_of(node), algebra.effects
    if any(effects.may_change(each, scale.node, node) for each in (scale.value, scale.gate)):
        return Change(place, False, f"what {place_of(scale.node)} reads is changed before")
    if not algebra.can_be_left_out(scale, node):
        return Change(place, False, f"others read {place_of(scale.value)}, scaled in place")
    with algebra.graph.inserting_before(node):
        factor, summand = (
            insert_buffer(algebra, node, name, each.to(norm.dtype)[:, None, None])
            for name, each in (("scale", norm.weight), ("shift", norm.bias))
        )
        # Under autocast, gate and map are of another type than weights, and a norm's result is of theirs.
        gate = insert(algebra, node, torch.mul, scale.gate, insert(algebra, node, "type_as", factor, scale.gate))
        shift = insert(algebra, node, "type_as", summand, scale.value)
        if algebra.exported:
            new = insert(algebra, node, torch.add, insert(algebra, node, torch.mul, scale.value, gate), shift)
        else:
            new = insert(algebra, node, torch.addcmul, shift, scale.value, gate)
    algebra.vectors[gate] = algebra.vectors[scale.gate]
    replace(algebra, node, new)
    drop(algebra, scale.node)
    return Change(place, True, f"its scale into the gate of {place_of(scale.value)}")
