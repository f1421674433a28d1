"""Keeping: what autograd keeps of a training graph's values, and from what they could be computed again.

All of it is found before the first rewrite, so that these need only edit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import _get_qualified_name
from torch.nn.modules.batchnorm import _BatchNorm

from se_fx.analysis import called, is_plain, runs_pytorch
from se_fx.rewrites.algebra import Algebra
from se_fx.rewrites.change import place_of
from se_fx.rewrites.terms import Scale, is_pointwise
from se_fx.rewrites.training.kept import Kept, is_left, kept_by
from se_fx.rewrites.training.tails import Tail

__all__ = ["Keeping", "Unit", "Way", "name_of"]


@dataclass(frozen=True)
class Way:
    """From what a value can be computed again.

    Attributes:
        source: a norm, or a value that is kept anyway; None where there is no way.
        steps: what is computed from the source to give the value, in order.
        is_norm: whether the source is the result of a norm, which keeps what that is computed again from.
        reason: why there is none.
    """

    source: fx.Node | None = None
    steps: tuple[fx.Node, ...] = ()
    is_norm: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Unit:
    """A product of a feature map and a gate, with what is kept around it.

    Attributes:
        scale: the product.
        way: to its map, from the nearest of what is kept anyway.
        from_norm: to its map, from a norm, through activations that need keep nothing then.
        readers: what keeps the product, and could compute it again.
        unread: why there are none of these.
        matrix: what alone reads the product, where that is a 1x1 convolution that could as well take the map and the gate.
    """

    scale: Scale
    way: Way
    from_norm: Way
    readers: tuple[fx.Node, ...] = ()
    unread: str = ""
    matrix: fx.Node | None = None


@dataclass
class Woven:
    """What rewrites have put into a graph so far, by what was there before.

    Attributes:
        values: nodes that others stand in for now.
        recipes: the recipes of values.
    """

    values: dict[fx.Node, fx.Node] = field(default_factory=dict)
    recipes: dict[fx.Node, fx.Node] = field(default_factory=dict)


class Keeping(Algebra):
    """What the nodes of one graph compute in training, and what autograd keeps of that.

    Args:
        module: the graph module.
        tail: what a norm of others does after normalising, by its name; None where that can't be told.

    Attributes:
        units: the products of feature maps and gates, as they are before any rewrite.
        how: how activations behind norms can keep recipes alone, see `activated`; None where they can't.
        woven: what rewrites have put in.
    """

    def __init__(self, module: fx.GraphModule, tail: Callable[[str], Tail | None]) -> None:
        super().__init__(module)
        self.tail, self.woven = functools.cache(tail), Woven()
        self._kept: dict[fx.Node, Kept | None] = {}
        self._norms: dict[fx.Node, bool] = {}
        self.units = tuple(self._unit(scale) for scale in self.scales())
        self.how = {step: self._how(step) for unit in self.units for step in unit.from_norm.steps}

    def _unit(self, scale: Scale) -> Unit:
        if {scale.value, scale.gate} & self.effects.of(scale.node).writes:
            reason = "is scaled in place"
            return Unit(scale, Way(reason=reason), Way(reason=reason), unread=reason)
        readers = self._readers(scale)
        found, unread = ((), readers) if isinstance(readers, str) else (readers, "")
        matrix = found[0] if len(scale.node.users) == len(found) == 1 and self._is_matrix(scale, found[0]) else None
        return Unit(scale, *self._ways(scale), found, unread, matrix)

    def now(self, scale: Scale) -> tuple[fx.Node, fx.Node, fx.Node]:
        """A product, its map and the gate that it is multiplied by, as they are in the graph by now."""
        node, value = (self.woven.values.get(each, each) for each in (scale.node, scale.value))
        operands: tuple[Any, ...] = self._operands(scale.node) if node is scale.node else node.args
        return node, value, operands[1] if operands[0] is value else operands[0]

    def pair(self, norm: fx.Node) -> fx.Node:
        """The call that gives a norm's result with its recipe, where a rewrite has put one."""
        (found,) = self.woven.values[norm].all_input_nodes
        return found

    # ------------------------------------------------------------------------------------------------ what is kept
    def kept(self, node: fx.Node) -> Kept | None:
        """What autograd keeps for a node; None where that can't be told."""
        if node not in self._kept:
            inputs = {source: self.values.of(source)[0] for source in node.all_input_nodes}
            self._kept[node] = kept_by(node, self.modules, inputs)
        return self._kept[node]

    def norm(self, node: fx.Node) -> bool:
        """Whether a node normalises its first argument, and keeps all that its result can be computed again from."""
        if node not in self._norms:
            self._norms[node] = self._is_norm(node)
        return self._norms[node]

    def _is_norm(self, node: fx.Node) -> bool:
        module = called(node, self.modules)
        if not node.args or not isinstance(node.args[0], fx.Node):
            return False
        if isinstance(module, (_BatchNorm, nn.GroupNorm)):
            known = type(module).forward in (_BatchNorm.forward, nn.GroupNorm.forward) and runs_pytorch(node, self.modules)
            return known or self.tail(str(node.target)) is not None
        return node.op == "call_function" and node.target in (F.batch_norm, F.group_norm) and name_of(node) is not None

    def is_all_of(self, norm: fx.Node) -> bool:
        """Whether a norm's node does nothing to what it has normalised."""
        tail = self.tail_of(norm)
        return tail is None or not tail.names

    def passed(self, node: fx.Node) -> fx.Node:
        """What is behind the modules that return what they are given."""
        while self._passes(node) and len(node.all_input_nodes) == 1:
            (node,) = node.all_input_nodes
        return node

    # ------------------------------------------------------------------------------------- from what maps could be made
    def _ways(self, scale: Scale) -> tuple[Way, Way]:
        """From what is kept anyway to a product's map, and from a norm."""
        near: Way | None = None
        steps: list[fx.Node] = []
        node, last = scale.value, scale.node
        while True:
            way = tuple(steps[::-1])
            keeper = self._keeper(node, last)
            if keeper is not None:
                reason = f"{place_of(keeper)} keeps it anyway"
                return near or (Way(node, way) if steps else Way(reason=reason)), Way(reason=reason)
            if self.effects.may_change(node, node, last):
                reason = f"what {place_of(node)} gives is changed in place"
                return near or Way(reason=reason), Way(reason=reason)
            if self.norm(node):
                return self._from_norm(node, way, near)
            kept, source = self.kept(node), self._source(node)
            if kept is not None and kept.result and near is None:
                near = Way(node, way) if steps else Way(reason=f"{place_of(node)} keeps it anyway")
            if source is None:
                reason = self._unknown(node)
                return near or Way(reason=reason), Way(reason=reason)
            if not self._passes(node):
                steps.append(node)
                if kept is not None and source in kept.inputs and not self.effects.of(node).writes and near is None:
                    near = Way(source, tuple(steps[::-1]))
            node, last = source, node

    def _from_norm(self, norm: fx.Node, steps: tuple[fx.Node, ...], near: Way | None) -> tuple[Way, Way]:
        tail = self.tail_of(norm)
        if near is None and tail is not None and tail.keeps_result:
            near = Way(norm, steps) if steps else Way(reason=f"{place_of(norm)} keeps it anyway")
        way = Way(norm, steps, is_norm=True)
        is_active = steps or (tail is not None and tail.names)
        return near or way, way if is_active else Way(reason="has no activation behind its norm")

    def tail_of(self, norm: fx.Node) -> Tail | None:
        """What a norm does after normalising, if it is of a class of others."""
        module = called(norm, self.modules)
        return self.tail(str(norm.target)) if module is not None and not is_plain(module) else None

    def _keeper(self, value: fx.Node, reader: fx.Node) -> fx.Node | None:
        """What else keeps a value than one of its readers, and units' products."""
        for other in value.users:
            kept = self.kept(other) if other is not reader else None
            if kept is not None and value in kept.inputs and not self._is_scale(other):
                return other
        return None

    def _how(self, step: fx.Node) -> str | None:
        kept, (source,) = self.kept(step), step.all_input_nodes
        if kept is None or kept.result or not self.effects.of(step).writes:
            return None if kept is None else "recipes"
        left = self.effects.is_forgotten(source, step) and is_left(step, self.modules, self.values.of(source)[0])
        return "apart" if left else None

    def _unknown(self, node: fx.Node) -> str:
        module = called(node, self.modules)
        if isinstance(module, nn.SyncBatchNorm):
            return f"{place_of(node)} has its statistics from other processes, too"
        if isinstance(module, _BatchNorm):
            return f"{place_of(node)} does more than is known, or has hooks"
        return f"comes from {place_of(node)}, which keeps nothing that it could be computed from for less"

    def _is_scale(self, node: fx.Node) -> bool:
        return self.scale(node) is not None

    def _passes(self, node: fx.Node) -> bool:
        """Whether a node is a module that returns what it is given."""
        effect = self.effects.of(node)
        return node.op == "call_module" and effect.known and effect.returns is not None and not effect.writes

    def _source(self, node: fx.Node) -> fx.Node | None:
        """The one value that a node computes its result from, element by element, with nothing else that could change."""
        effect = self.effects.of(node)
        if not effect.known or effect.remembers or len(node.all_input_nodes) != 1 or node.op in ("placeholder", "get_attr"):
            return None
        (source,) = node.all_input_nodes
        if source not in self.maps or node not in self.maps or not node.args or node.args[0] is not source:
            return None
        if name_of(node) is None:
            return None
        module = called(node, self.modules)
        if module is not None and [*module.parameters(), *module.buffers()]:
            return None
        return source if effect.pointwise or self._passes(node) else None

    # ------------------------------------------------------------------------------------------ what reads the product
    def _readers(self, scale: Scale) -> tuple[fx.Node, ...] | str:
        """What keeps a product, if all of it could compute it again; else why not."""
        found = []
        for reader in scale.node.users:
            if reader.op == "output" or scale.node not in self.effects.of(reader).reads:
                continue
            is_norm = self.norm(reader)
            kept = Kept(frozenset({scale.node}), False) if is_norm else self.kept(reader)
            if kept is None:
                return f"{place_of(reader)} may keep it: it runs code that isn't PyTorch's, or has hooks"
            if scale.node not in kept.inputs or scale.node in self.effects.of(reader).writes:
                continue
            if self._is_scale(reader):
                continue  # a unit of its own
            if not reader.args or reader.args[0] is not scale.node or name_of(reader) is None:
                return f"{place_of(reader)} keeps it"
            if self.effects.may_change(scale.node, scale.node, reader):
                return "is changed in place before it is read"
            found.append(reader)
        return tuple(found) or "nothing keeps it"

    def _is_matrix(self, scale: Scale, reader: fx.Node) -> bool:
        conv = self.convolution(reader) if reader.op == "call_module" else None
        if conv is None or not is_pointwise(conv) or conv.groups > 1:
            return False
        return not any(self.effects.may_change(each, scale.node, reader) for each in (scale.value, scale.gate))


def name_of(node: fx.Node) -> str | None:
    """The name by which what a node calls can be called in its place: a module's, or a function's of PyTorch's."""
    if node.op == "call_module":
        return str(node.target)
    if node.op == "call_method":
        name, found = f"torch.Tensor.{node.target}", getattr(torch.Tensor, str(node.target), None)
    elif node.op == "call_function" and callable(node.target):
        name, found = _get_qualified_name(node.target), node.target
    else:
        return None
    home: Any = torch
    for part in name.removeprefix("torch.").split("."):
        home = getattr(home, part, None)
    return name if name.startswith("torch.") and home == found else None
