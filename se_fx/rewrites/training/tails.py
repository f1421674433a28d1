"""Tails: what norms of others do after normalising, such as an activation, as the modules that they call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from se_fx.analysis import called
from se_fx.rewrites.algebra import Algebra
from se_fx.rewrites.training.kept import is_left, kept_by

__all__ = ["Tail", "tail_of"]


@dataclass(frozen=True)
class Tail:
    """What a norm calls on its input once normalised.

    Attributes:
        names: the modules, by their names in the norm, in order.
        keeps_result: whether autograd keeps what the last of them gives.
        how: how they can keep recipes alone, see `activated`.
    """

    names: tuple[str, ...]
    keeps_result: bool
    how: str


def tail_of(module: fx.GraphModule) -> Tail | None:
    """The tail of a norm, from its graph; None where it does anything else besides normalising its input."""
    algebra = Algebra(module)
    found = [node for node in module.graph.nodes if node.target in (F.batch_norm, F.group_norm)]
    if len(found) != 1 or not found[0].args or getattr(found[0].args[0], "op", "") != "placeholder":
        return None
    names: list[str] = []
    node, keeps_result, how = found[0], False, "recipes"
    while True:
        (reader, *others) = node.users
        if others:
            return None
        if reader.op == "output":
            return Tail(tuple(names), keeps_result, how) if reader.args == (node,) else None
        effect, part = algebra.effects.of(reader), called(reader, algebra.modules)
        if part is None or reader.args != (node,) or not effect.known or effect.remembers:
            return None
        is_idle = type(part).forward is nn.Identity.forward
        if not is_idle:
            kept = kept_by(reader, algebra.modules, {node: _SOME_MAP})
            if kept is None or not effect.pointwise or [*part.parameters(), *part.buffers()]:
                return None
            if effect.writes and not kept.result:
                how = "apart" if is_left(reader, algebra.modules, _SOME_MAP) else "as ever"
            names.append(str(reader.target))
            keeps_result = kept.result
        node = reader


_SOME_MAP = torch.empty(2, 3, 8, 8, device="meta")
