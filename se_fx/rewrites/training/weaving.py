"""Weaving: recipes are put into a graph, beside the values that they are of."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from se_fx.analysis import called
from se_fx.rewrites.change import place_of
from se_fx.rewrites.training.calls import activated, held, name_of_class, normalized, repeated
from se_fx.rewrites.training.keeping import Keeping, Unit, Way, name_of

__all__ = ["callee", "exchange", "insert_wrapped", "is_training_call", "names_of", "normalize", "relied_on", "weave"]


def weave(keeping: Keeping, unit: Unit, way: Way) -> fx.Node | None:
    """The recipe of a unit's map, by a way; None where there is no way."""
    value, recipes = unit.scale.value, keeping.woven.recipes
    if way.source is None or value in recipes:
        return recipes.get(value)
    if way.is_norm and way.source not in recipes:
        normalize(keeping, way.source, None)
    source = keeping.woven.values.get(way.source, way.source)
    after = recipes[way.source] if way.is_norm else source
    with keeping.graph.inserting_after(after):
        recipe = recipes[way.source] if way.is_norm else insert_wrapped(keeping, unit.scale.node, held, source)
    for step in way.steps:
        with keeping.graph.inserting_after(recipe):
            name = callee(keeping, step)
        with keeping.graph.inserting_after(name if isinstance(name, fx.Node) else recipe):
            recipe = insert_wrapped(keeping, step, repeated, name, recipe, *step.args[1:], **step.kwargs)
        recipes[step] = recipe
    recipes[value] = recipe
    return recipe


def normalize(keeping: Keeping, norm: fx.Node, recipe: fx.Node | None) -> None:
    """Have a norm tell the recipe of its result, and keep that of its input, if there is one."""
    if norm in keeping.woven.values:  # it tells already
        pair = keeping.pair(norm)
        module, value, _, *rest = pair.args
        pair.args = (module, value, recipe, *rest)
        return
    with keeping.graph.inserting_before(norm):
        module = callee(keeping, norm)
        value, *rest = norm.args
        its_own, tail = called(norm, keeping.modules), keeping.tail_of(norm)
        known = () if its_own is None else (name_of_class(its_own), *(tail.names if tail else ()))
        pair = insert_wrapped(keeping, norm, normalized, module, value, recipe, "as ever", known, *rest, **norm.kwargs)
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
    keeping.woven.values[old] = new
    old.replace_all_uses_with(new)
    keeping.graph.erase_node(old)


def names_of(nodes: tuple[fx.Node, ...]) -> str:
    """Places, for people."""
    return ", ".join(map(place_of, nodes))


def relied_on(graph: fx.Graph) -> tuple[set[str], set[str]]:
    """What a graph with recipes takes for what it was: activations, by name; and norms of others, of whose code it knows."""
    activations, norms = set(), set()
    for node in graph.nodes:
        callee = node.args[0] if is_training_call(node) and node.args else None
        if isinstance(callee, fx.Node) and callee.op == "get_attr":
            if node.target in (activated, repeated):
                activations.add(str(callee.target))
            elif len(node.args) > 4 and isinstance(node.args[4], tuple) and not str(node.args[4][0]).startswith("torch."):
                norms.add(str(callee.target))  # of a class of others
    return activations, norms


def is_training_call(node: fx.Node) -> bool:
    """Whether a node is a call that rewrites for training have put in."""
    home = str(getattr(node.target, "__module__", ""))
    return node.op == "call_function" and home.rpartition(".")[0] == normalized.__module__.rpartition(".")[0]
