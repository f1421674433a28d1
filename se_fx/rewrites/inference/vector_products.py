"""Vector products: a gate's layers multiply one short vector for each sample, cheaper written out than as a library call.

V m  as  sum_i V[:, i] m[i]      for few samples, under a compiler, which fuses it with the average before it
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from se_fx.analysis import called
from se_fx.rewrites.algebra import Algebra
from se_fx.rewrites.change import Change, place_of
from se_fx.rewrites.editing import multiply
from se_fx.rewrites.products import VectorLinear, few

__all__ = ["vector_products"]


def vector_products(algebra: Algebra) -> Iterator[Change]:
    """A gate's linear layers, or convolutions of one position, become products of vectors and matrices: `VectorLinear`."""
    gates = algebra.gate_nodes()
    for node in [node for node in algebra.graph.nodes if node in gates]:
        product = algebra.product(node)
        if product is None:
            continue
        module: nn.Module | None
        module, change = called(node, algebra.modules), Change(place_of(node), True, "{1} to {0}".format(*product.matrix.shape))
        if not isinstance(module, VectorLinear):
            module = multiply(algebra, node, product.source, product)
        if isinstance(module, VectorLinear):
            module.few = few(module.weight)
        yield change
