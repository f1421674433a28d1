"""Recomputing activations: what those between a norm and a product with a gate keep is computed again from what the norm keeps.

z = norm(x),  u = act(z),  y = u * g         keeps z, as SiLU does, or u, as ReLU does: both follow from x
"""

from __future__ import annotations

from collections.abc import Iterator

from se_fx.rewrites.change import Change, place_of
from se_fx.rewrites.training.calls import activated
from se_fx.rewrites.training.keeping import Keeping, Unit
from se_fx.rewrites.training.weaving import callee, exchange, insert_wrapped, weave

__all__ = ["recompute_activations"]


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
