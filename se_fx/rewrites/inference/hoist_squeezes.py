"""Hoisting squeezes: a gate's average over space is taken before pointwise convolutions and norms, where that moves less.

With a pointwise convolution W x + b, the average m over space, and a gate's first layer V m + c:

    m(W x + b) = W m(x) + b                      the squeeze can read the convolution's input,
    V (W m(x) + b) + c = (V W) m(x) + (V b + c)  and the two matrices are one, multiplied offline
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import fx, nn

from se_fx.analysis import called
from se_fx.rewrites.algebra import Algebra
from se_fx.rewrites.change import Change, place_of
from se_fx.rewrites.editing import insert, multiply
from se_fx.rewrites.terms import Affine

__all__ = ["hoist_squeezes"]


def hoist_squeezes(algebra: Algebra) -> Iterator[Change]:
    """A gate's average over space is taken before pointwise convolutions and norms, where that moves fewer bytes.

    Their matrices go into the gate's first one.
    """
    gates = algebra.gate_nodes()
    for node in [node for node in algebra.graph.nodes if node in gates]:
        value = algebra.average(node)
        if value is None:
            continue
        stages, stop = _affine_stages(algebra, value, node)
        widths = [algebra.maps[value], *(algebra.maps[affine.source] for _, affine in stages)]
        upstream = widths.index(min(widths))
        if not upstream:
            reason = f"its convolution reads {min(widths[1:])} channels, no fewer" if stages else stop
            yield Change(place_of(value), False, reason)
            continue
        first, composed = stages[upstream - 1]
        for _, outer in reversed(stages[: upstream - 1]):
            composed = _composed(outer, composed)
        products = _products_reading(algebra, node)
        if products is None and algebra.vectors[node][1:] not in ((), (1, 1)):
            yield Change(place_of(value), False, "its average is neither (N, C) nor (N, C, 1, 1)")
            continue
        matrix = f"{widths[0]} x {widths[upstream]} matrix"
        if products is None and not _saves_bytes(first, widths[0], widths[upstream]):
            known = (
                "moves more bytes than it saves" if "size" in first.meta else "may move more bytes: pass example_inputs to tell"
            )
            yield Change(place_of(value), False, f"its {matrix}, which no other absorbs, {known}")
            continue
        replaced = [(product, _composed(affine, composed)) for product, affine in products or ()]
        for old, affine in replaced or [(node, dataclasses.replace(composed, dtype=algebra.dtype(node) or composed.dtype))]:
            flat = len(algebra.vectors[old]) == 1
            with algebra.graph.inserting_before(first):
                average = insert(algebra, node, torch.mean, affine.source, (-2, -1), not flat)
            algebra.vectors[average] = (widths[upstream],) if flat else (widths[upstream], 1, 1)
            multiply(algebra, old, average, affine)
        absorbed = "" if products else f", then multiplies by a {matrix}"
        yield Change(place_of(value), True, f"averages {widths[upstream]} channels instead of {widths[0]}{absorbed}")


def _affine_stages(algebra: Algebra, value: fx.Node, reader: fx.Node) -> tuple[list[tuple[fx.Node, Affine]], str]:
    """The affine maps of channels that `value` comes from, the last one first, and why there are no more."""
    stages: list[tuple[fx.Node, Affine]] = []
    while not algebra.effects.may_change(value, value, reader):
        affine = algebra.affine(value)
        if affine is None:
            return stages, f"{_described(value, algebra)} stands before it"
        if affine.source not in algebra.maps:
            return stages, f"{_described(value, algebra)} reads what need not be (N, C, H, W), such as the model's own input"
        stages.append((value, affine))
        value, reader = affine.source, value
    return stages, "a change in place stands before it"


def _composed(outer: Affine, inner: Affine) -> Affine:
    """``outer(inner(x))`` as one map."""
    if outer.weight.ndim == 1:
        weight, bias = outer.weight[:, None] * inner.matrix, outer.weight * inner.bias
    else:
        weight = outer.weight @ inner.weight if inner.weight.ndim == 2 else outer.weight * inner.weight
        bias = outer.weight @ inner.bias
    return Affine(inner.source, weight, bias + outer.bias, outer.dtype)


def _products_reading(algebra: Algebra, vector: fx.Node) -> list[tuple[fx.Node, Affine]] | None:
    """The products that a vector is read by, through changes of shape; None where it is read otherwise too."""
    found: list[tuple[fx.Node, Affine]] = []
    for reader in algebra.readers(vector):
        product = algebra.product(reader)
        if product is not None:
            found.append((reader, product))
            continue
        inner = _products_reading(algebra, reader) if algebra.is_reshape(reader) else None
        if inner is None:
            return None
        found += inner
    return found


def _saves_bytes(node: fx.Node, wide: int, narrow: int) -> bool:
    """Whether the positions averaged outnumber what the matrix moves, on the example inputs."""
    batch, height, width = node.meta.get("size", (0, 0, 0))
    return bool(batch * height * width * (wide - narrow) > wide * narrow)


def _described(node: fx.Node, algebra: Algebra) -> str:
    """A node in words, for reasons."""
    module = called(node, algebra.modules)
    if isinstance(module, nn.Conv2d):
        kernel = "x".join(map(str, module.kernel_size))
        return f"a {kernel} convolution of stride {module.stride[0]} ({node.target})"
    if module is not None:
        return f"{type(module).__name__} ({node.target})"
    return str(getattr(node.target, "__name__", node.target))
