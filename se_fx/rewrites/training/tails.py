"""Tails: what norms of others do after normalising, such as an activation, as the modules that they call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from se_fx.analysis import called
from se_fx.rewrites.algebra import Algebra
from se_fx.rewrites.training.kept import kept_by

__all__ = ["Tail", "tail_of"]


@dataclass(frozen=True)
class Tail:
    """What a norm calls on what its batch normalisation gives.

    Attributes:
        names: the modules, by their names in the norm, in order.
        keeps_result: whether autograd keeps what the last of them gives.
    """

    names: tuple[str, ...]
    keeps_result: bool


def tail_of(module: fx.GraphModule) -> Tail | None:
    """The tail of a norm, from its graph; None where it does anything else besides normalising its input."""
    algebra = Algebra(module)
    found = [node for node in module.graph.nodes if node.target is F.batch_norm]
    if len(found) != 1 or not found[0].args or getattr(found[0].args[0], "op", "") != "placeholder":
        return None
    node, names, keeps_result = found[0], [], False
    while True:
        (reader, *others) = node.users
        if others:
            return None
        if reader.op == "output":
            return Tail(tuple(names), keeps_result) if reader.args == (node,) else None
        effect, part = algebra.effects.of(reader), called(reader, algebra.modules)
        if part is None or reader.args != (node,) or not effect.known or effect.remembers:
            return None
        is_idle = type(part).forward is nn.Identity.forward
        if not is_idle:
            kept = kept_by(reader, algebra.modules, {node: torch.empty(2, 3, 8, 8, device="meta")})
            if kept is None or not effect.pointwise or [*part.parameters(), *part.buffers()]:
                return None
            names.append(str(reader.target))
            keeps_result = kept.result
        node = reader
