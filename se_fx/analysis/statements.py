"""Statements: calls whose result is dropped, since what they change in place holds it."""

from __future__ import annotations

import functools
import operator

from torch import fx, nn

from se_fx.analysis.calls import modules_of
from se_fx.analysis.channels import Values
from se_fx.analysis.effects import Effects

__all__ = ["name_results"]


def name_results(graph: fx.Graph, root: nn.Module) -> list[tuple[fx.Node, fx.Node]]:
    """Have whoever reads a value after a statement has changed it read the statement's result: the very same tensor.

    So ``y.add_(x)`` and ``y = y.add_(x)`` are one graph, and what is computed can be followed along the edges.

    Returns:
        Each value with its statement, in the order in which readers were given these.
    """
    statements = [node for node in graph.nodes if not node.users and node.op in ("call_function", "call_method", "call_module")]
    named: list[tuple[fx.Node, fx.Node]] = []
    if not statements:
        return named
    effects = Effects(root, modules_of(root), Values(graph, root))
    for node in statements:
        effect = effects.of(node)
        value = effect.returns
        if effect.known and value is not None and value in effect.writes:
            value.replace_all_uses_with(node, delete_user_cb=functools.partial(operator.lt, node))
            named.append((value, node))
    return named
