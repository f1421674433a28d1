"""Recomputing products: what a product with a gate keeps of its map is computed again from what is kept anyway.

u = norm(x)              y = u * g           keeps u for the gate's gradient; u is a x + b of what the norm keeps
u = act(norm(x))                             the same, and the activation once more
u = act(z)                                   from z, which the activation keeps
"""

from __future__ import annotations

from collections.abc import Iterator

from se_fx.rewrites.change import Change, place_of
from se_fx.rewrites.training.calls import product
from se_fx.rewrites.training.keeping import Keeping
from se_fx.rewrites.training.weaving import exchange, insert_wrapped, names_of, weave

__all__ = ["recompute_products"]


def recompute_products(keeping: Keeping) -> Iterator[Change]:
    """What a product with a gate keeps of its map is computed again from what the norm or activation before keeps."""
    for unit in keeping.units:
        place, known = place_of(unit.scale.value), unit.scale.value in keeping.woven.recipes
        way = unit.from_norm if known and unit.from_norm.source is not None else unit.way
        recipe = weave(keeping, unit, way)
        if recipe is None or way.source is None:
            yield Change(place, False, way.reason)
            continue
        node, value, gate = keeping.now(unit.scale)
        with keeping.graph.inserting_before(node):
            exchange(keeping, node, insert_wrapped(keeping, node, product, value, gate, recipe))
        source = f"what {place_of(way.source)} keeps" if way.is_norm else place_of(way.source)
        yield Change(place, True, f"is computed again from {source}" + (f", by {names_of(way.steps)}" if way.steps else ""))
