"""Recomputing readers: what the layer after a product keeps of it is computed again, as the product of what is kept.

y = u * g,  conv(y)          keeps y for the gradient of its weight; y is the product of u, or its recipe, and g
y = u * g,  norm(y)          the same: SE before a norm
"""

from __future__ import annotations

from collections.abc import Iterator

from se_fx.rewrites.change import Change, place_of
from se_fx.rewrites.training.calls import held, reading, scaled
from se_fx.rewrites.training.keeping import Keeping
from se_fx.rewrites.training.weaving import callee, exchange, insert_wrapped, names_of, normalize

__all__ = ["recompute_readers"]


def recompute_readers(keeping: Keeping) -> Iterator[Change]:
    """What convolutions, norms and activations keep of a product with a gate is multiplied again."""
    for unit in keeping.units:
        place = place_of(unit.scale.value)
        if not unit.readers:
            yield Change(place, False, unit.unread)
            continue
        node, value, gate = keeping.now(unit.scale)
        with keeping.graph.inserting_after(node):
            again = insert_wrapped(keeping, node, scaled, None, gate)
        with keeping.graph.inserting_before(again):
            known = keeping.woven.recipes.get(unit.scale.value)
            again.args = (known or insert_wrapped(keeping, node, held, value), gate)
        for reader in unit.readers:
            if keeping.norm(reader):
                normalize(keeping, reader, again)
                continue
            with keeping.graph.inserting_before(reader):
                module, rest = callee(keeping, reader), reader.args[1:]
                exchange(keeping, reader, insert_wrapped(keeping, reader, reading, module, node, again, *rest, **reader.kwargs))
        yield Change(place, True, f"is scaled again for {names_of(unit.readers)}")
