"""Tails: what norms of others do after normalising, such as an activation, as the modules that they call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

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


def tail_of(module: fx.GraphModule, norm: nn.Module, training: bool) -> Tail | None:
    """What a norm does after PyTorch's norm, of whose class it is; None where it does anything else, or that can't be told.

    Args:
        module: its graph in one mode.
        norm: the norm.
        training: the mode.
    """
    algebra = Algebra(module)
    found = [node for node in module.graph.nodes if node.target in (F.batch_norm, F.group_norm)]
    if len(found) != 1 or not _is_inherited(found[0], algebra, norm, training):
        return None
    names: list[str] = []
    calls = {node for node in module.graph.nodes if node.op == "call_module"}
    node, keeps_result, how = found[0], False, "recipes"
    while True:
        (reader, *others) = node.users
        if others:
            return None
        if reader.op == "output":
            return Tail(tuple(names), keeps_result, how) if reader.args == (node,) and not calls else None
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
        calls.discard(reader)
        node = reader


def _is_inherited(call: fx.Node, algebra: Algebra, norm: Any, training: bool) -> bool:
    """Whether a norm calls its function as the class does that it inherits from, and changes nothing that this doesn't."""
    given = {name: each.target if isinstance(each, fx.Node) else each for name, each in algebra.given(call).items()}
    names, expected, counted = ["weight", "bias"], {"eps": norm.eps}, []
    if isinstance(norm, _BatchNorm):
        tracks = norm.track_running_stats or not training
        expected |= {"training": training or (norm.running_mean is None and norm.running_var is None)}
        expected |= {"momentum": norm.momentum or 0.0} | dict.fromkeys(("running_mean", "running_var"))
        names += ["running_mean", "running_var"] if tracks else []
        counted = ["add_"] if training and norm.track_running_stats and norm.num_batches_tracked is not None else []
    else:
        expected |= {"num_groups": norm.num_groups}
    expected |= {name: None if getattr(norm, name) is None else name for name in names}
    placeholder, *nodes = call.graph.nodes
    writing = [node for node in nodes if node.op[:5] == "call_" and algebra.effects.of(node).writes and node is not call]
    own = [node for node in writing if node.op != "call_module" and node.target is not torch._assert]
    is_counted = all(node.args[1:] == (1,) and getattr(node.args[0], "target", "") == "num_batches_tracked" for node in own)
    return given == {"input": placeholder.target, **expected} and [node.target for node in own] == counted and is_counted


_SOME_MAP = torch.empty(2, 3, 8, 8, device="meta")
