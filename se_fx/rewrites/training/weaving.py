"""Weaving: recipes are put into a graph, beside the values that they are of."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from se_fx.analysis import called
from se_fx.rewrites.change import place_of
from se_fx.rewrites.training.calls import held, normalized, repeated
from se_fx.rewrites.training.keeping import Keeping, Unit, name_of

__all__ = ["callee", "exchange", "names_of", "insert_wrapped", "normalize", "recipe_of"]


def recipe_of(keeping: Keeping, unit: Unit) -> fx.Node | None:
    """The recipe of a unit's map; None where it is kept itself."""
    if unit.source is None or (not unit.steps and unit.reason):
        return None
    value = unit.scale.value
    if value not in keeping.woven.recipes:
        keeping.woven.recipes[value] = _made(keeping, unit, unit.source)
    return keeping.woven.recipes[value]


def _made(keeping: Keeping, unit: Unit, source: fx.Node) -> fx.Node:
    known = keeping.tails.get(str(source.target))
    is_norm = keeping.norm(source) and not (known and known.keeps_result)
    tail = [f"{source.target}.{name}" for name in known.names] if known and is_norm else []
    recipe = _recipe_of_norm(keeping, source) if is_norm else None
    with keeping.graph.inserting_before(unit.scale.node):
        if recipe is None:
            recipe = insert_wrapped(keeping, unit.scale.node, held, keeping.woven.values.get(source, source))
        for name in tail:
            recipe = insert_wrapped(keeping, unit.scale.node, repeated, keeping.graph.get_attr(name), recipe)
        for step in unit.steps:
            recipe = insert_wrapped(keeping, unit.scale.node, repeated, callee(keeping, step), recipe, *step.args[1:], **step.kwargs)
    return recipe


def _recipe_of_norm(keeping: Keeping, norm: fx.Node) -> fx.Node:
    if norm not in keeping.woven.recipes:
        normalize(keeping, norm, None)
    return keeping.woven.recipes[norm]


def normalize(keeping: Keeping, norm: fx.Node, recipe: fx.Node | None) -> None:
    """Have a norm tell the recipe of its result, and keep that of its input, if there is one."""
    if norm in keeping.woven.values:  # it tells already
        (pair,) = keeping.woven.values[norm].all_input_nodes
        module, value, _, *rest = pair.args
        pair.args = (module, value, recipe, *rest)
        return
    with keeping.graph.inserting_before(norm):
        module = callee(keeping, norm)
        value, *rest = norm.args
        pair = insert_wrapped(keeping, norm, normalized, module, value, recipe, *rest, **norm.kwargs)
        result, found = (keeping.graph.call_function(operator.getitem, (pair, place)) for place in (0, 1))
    keeping.woven.recipes[norm] = found
    exchange(keeping, norm, result)


def callee(keeping: Keeping, node: fx.Node) -> fx.Node | str:
    """What `node` calls, for `calls` to call: a node that yields the module, or a function's name."""
    if called(node, keeping.modules) is not None:
        return keeping.graph.get_attr(str(node.target))
    return name_of(node) or ""


def insert_wrapped(keeping: Keeping, near: fx.Node, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """A call of a function of se_fx's, which tracers, and so pickles, leave whole."""
    new = keeping.graph.call_function(function, args, kwargs)
    new.meta = {"nn_module_stack": dict(near.meta.get("nn_module_stack", {})), "is_wrapped": True}
    return new


def exchange(keeping: Keeping, old: fx.Node, new: fx.Node) -> None:
    """Have all readers of a value read another, which is the same, in its place."""
    for known in (keeping.maps, keeping.vectors):
        if old in known:
            known[new] = known[old]  # type: ignore[index,assignment]
    keeping.woven.values[old] = new
    old.replace_all_uses_with(new)
    keeping.graph.erase_node(old)


def names_of(nodes: tuple[fx.Node, ...]) -> str:
    """Places, for people."""
    return ", ".join(map(place_of, nodes))
