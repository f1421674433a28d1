"""Recomputing: what is kept for products with gates is computed again from what is kept anyway.

z = norm(x),  u = act(z),  y = u * g,  conv(y)

recompute_activations    the activation keeps z, as SiLU does, or u, as ReLU does: both follow from what the norm keeps
recompute_products       the product keeps u for the gate's gradient: it follows from the norm, or from z where that is kept
recompute_readers        the convolution, or a norm, keeps y for the gradient of its weight: it is the product of u and g
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from se_fx.rewrites.change import Change, place_of
from se_fx.rewrites.training.calls import activated, held, product, reading, scaled
from se_fx.rewrites.training.keeping import Keeping, Unit
from se_fx.rewrites.training.matrices import convolved
from se_fx.rewrites.training.weaving import callee, exchange, insert_wrapped, is_training_call, names_of, normalize, weave

__all__ = ["recompute_activations", "recompute_products", "recompute_readers"]


def recompute_activations(keeping: Keeping) -> Iterator[Change]:
    """What activations between a norm and a product with a gate keep is computed again from what the norm keeps."""
    for unit in keeping.units:
        way, place = unit.from_norm, place_of(unit.scale.value)
        if way.source is None:
            yield Change(place, False, way.reason)
        elif unit.scale.value in keeping.woven.recipes:
            continue  # of another gate's map, the same
        elif reason := _obstacle(keeping, unit):
            yield Change(place, False, reason)
        else:
            _rewrite(keeping, unit)
            yield Change(place, True, f"needs nothing but what {place_of(way.source)} keeps")


def _obstacle(keeping: Keeping, unit: Unit) -> str:
    """Why activations are to keep what they keep."""
    norm, steps = unit.from_norm.source, unit.from_norm.steps
    tail = keeping.tail_of(norm) if norm is not None else None
    if norm is not None and tail is not None and tail.how == "as ever":
        return f"{place_of(norm)} works in place"
    return next((f"{place_of(step)} works in place" for step in steps if keeping.how[step] is None), "")


def _rewrite(keeping: Keeping, unit: Unit) -> None:
    way = unit.from_norm
    weave(keeping, unit, way)
    assert way.source is not None
    recipe = keeping.woven.recipes[way.source]
    tail = keeping.tail_of(way.source)
    if tail is not None:
        pair = keeping.pair(way.source)
        pair.args = (*pair.args[:3], tail.how, *pair.args[4:])
    for step in way.steps:
        again = keeping.woven.recipes[step]
        with keeping.graph.inserting_before(step):
            value, *rest = step.args
            given = (callee(keeping, step), value, recipe, again, keeping.how[step], *rest)
            exchange(keeping, step, insert_wrapped(keeping, step, activated, *given, **step.kwargs))
        recipe = again


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
        _multiply(keeping, node, value, gate, recipe)
        source = f"what {place_of(way.source)} keeps" if way.is_norm else place_of(way.source)
        yield Change(place, True, f"is computed again from {source}" + (f", by {names_of(way.steps)}" if way.steps else ""))


def recompute_readers(keeping: Keeping) -> Iterator[Change]:
    """What convolutions, norms and activations keep of a product with a gate is multiplied again."""
    for unit in keeping.units:
        place = place_of(unit.scale.value)
        if not unit.readers:
            yield Change(place, False, unit.unread)
            continue
        node, value, gate = keeping.now(unit.scale)
        with keeping.graph.inserting_before(node):
            known = keeping.woven.recipes.get(unit.scale.value) if unit.scale.node in keeping.woven.values else None
            recipe = known or insert_wrapped(keeping, node, held, value)
        if unit.matrix is not None and (node is unit.scale.node or node.target is product):
            with keeping.graph.inserting_before(unit.matrix):
                given = (callee(keeping, unit.matrix), value, gate, recipe)
                exchange(keeping, unit.matrix, insert_wrapped(keeping, unit.matrix, convolved, *given))
            keeping.graph.erase_node(node)
        else:
            _multiply_again(keeping, unit, node, value, gate, recipe)
        yield Change(place, True, f"is scaled again for {names_of(unit.readers)}")


def _multiply_again(keeping: Keeping, unit: Unit, node: fx.Node, value: fx.Node, gate: fx.Node, recipe: fx.Node) -> None:
    """Have what keeps a product keep the recipe of it."""
    with keeping.graph.inserting_before(node):
        again = insert_wrapped(keeping, node, scaled, recipe, gate)
    _multiply(keeping, node, value, gate, recipe)
    for reader in unit.readers:
        if keeping.norm(reader):
            normalize(keeping, reader, again)
            continue
        with keeping.graph.inserting_before(reader):
            module, (map_, *rest) = callee(keeping, reader), reader.args
            exchange(keeping, reader, insert_wrapped(keeping, reader, reading, module, map_, again, *rest, **reader.kwargs))


def _multiply(keeping: Keeping, node: fx.Node, value: fx.Node, gate: fx.Node, recipe: fx.Node) -> None:
    """Have a product keep the recipe of its map."""
    if is_training_call(node):  # by moments, in compiled code
        node.args = (value, gate, recipe, *node.args[3:])
        return
    with keeping.graph.inserting_before(node):
        exchange(keeping, node, insert_wrapped(keeping, node, product, value, gate, recipe))
