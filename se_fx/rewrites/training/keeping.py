"""Keeping: what autograd keeps of a training graph's values, and from what they could be computed again.

Operators are asked themselves: each is run on meta tensors, and hooks note which of its inputs it keeps, and whether its result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import _get_qualified_name
from torch.nn.modules.batchnorm import _BatchNorm

from se_fx.analysis import called, runs_pytorch
from se_fx.rewrites.algebra import Algebra
from se_fx.rewrites.change import place_of
from se_fx.rewrites.terms import Scale
from se_fx.rewrites.training.kept import Kept, kept_by
from se_fx.rewrites.training.tails import Tail

__all__ = ["Keeping", "Unit", "name_of"]


@dataclass(frozen=True)
class Unit:
    """A product of a feature map and a gate, with what is kept around it.

    Attributes:
        scale: the product.
        source: a norm, which keeps what its result is computed again from, or a value that is kept itself; None where the map
            can't be computed again.
        steps: what is computed from the source to give the map, in order.
        reason: why the product goes on keeping the map; empty where it needs not.
        readers: what keeps the product, and could compute it again.
        unread: why there are none of these.
    """

    scale: Scale
    source: fx.Node | None = None
    steps: tuple[fx.Node, ...] = ()
    reason: str = ""
    readers: tuple[fx.Node, ...] = ()
    unread: str = ""


@dataclass(frozen=True)
class _Way:
    source: fx.Node | None = None
    steps: tuple[fx.Node, ...] = ()
    reason: str = ""


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
        tails: what norms of others do after normalising, by their names.

    Attributes:
        units: the products of feature maps and gates, as they are before any rewrite.
        woven: what rewrites have put in.
    """

    def __init__(self, module: fx.GraphModule, tails: Mapping[str, Tail]) -> None:
        super().__init__(module)
        self.tails, self.woven = tails, Woven()
        self._kept: dict[fx.Node, Kept | None] = {}
        self._norms: dict[fx.Node, bool] = {}
        self.units = tuple(self._unit(scale) for scale in self.scales())

    def _unit(self, scale: Scale) -> Unit:
        if scale.value in self.effects.of(scale.node).writes or scale.gate in self.effects.of(scale.node).writes:
            return Unit(scale, reason="is scaled in place", unread="is scaled in place")
        way = self._way(scale)
        readers = self._readers(scale)
        unread = readers if isinstance(readers, str) else ""
        found = () if isinstance(readers, str) else readers
        return Unit(scale, way.source, way.steps, way.reason, found, unread)

    def now(self, scale: Scale) -> tuple[fx.Node, fx.Node, fx.Node]:
        """A product, its map and the gate that it is multiplied by, as they are in the graph by now."""
        node, value = (self.woven.values.get(each, each) for each in (scale.node, scale.value))
        first, second = self._operands(scale.node) if node is scale.node else node.args[:2]
        return node, value, second if first is value else first

    # ------------------------------------------------------------------------------------------------ what is kept
    def kept(self, node: fx.Node) -> Kept | None:
        """What autograd keeps for a node; None where that can't be told."""
        if node not in self._kept:
            inputs = {source: self.values.of(source)[0] for source in node.all_input_nodes}
            self._kept[node] = kept_by(node, self.modules, inputs)
        return self._kept[node]

    def norm(self, node: fx.Node) -> bool:
        """Whether a node is a batch normalisation of its first argument, whose own result can be computed again."""
        if node not in self._norms:
            self._norms[node] = self._is_norm(node)
        return self._norms[node]

    def _is_norm(self, node: fx.Node) -> bool:
        module = called(node, self.modules)
        if not node.args or not isinstance(node.args[0], fx.Node):
            return False
        if isinstance(module, _BatchNorm):
            is_plain = type(module).forward is _BatchNorm.forward and runs_pytorch(node, self.modules)
            return is_plain or str(node.target) in self.tails
        return node.op == "call_function" and node.target is F.batch_norm and name_of(node) is not None

    # ------------------------------------------------------------------------------------- from what maps could be made
    def _way(self, scale: Scale) -> _Way:
        """From what is kept anyway to a product's map."""
        others = [reader for reader in scale.value.users if reader is not scale.node]
        for other in others:
            kept = self.kept(other)
            if kept is not None and scale.value in kept.inputs and not self._is_scale(other):
                return _Way(scale.value, reason=f"{place_of(other)} keeps it anyway")
        node, last, steps = scale.value, scale.node, []
        while True:
            if self.effects.may_change(node, node, last):
                return _Way(reason=f"what {place_of(node)} gives is changed in place")
            if self.norm(node):
                tail = self.tails.get(str(node.target))
                if tail is not None and tail.keeps_result:
                    return _Way(node if steps else None, tuple(steps[::-1]), "" if steps else f"{place_of(node)} keeps it anyway")
                return _Way(node, tuple(steps[::-1]))
            kept, source = self.kept(node), self._source(node)
            if kept is not None and kept.result:
                return _Way(node, tuple(steps[::-1]), "" if steps else f"{place_of(node)} keeps it anyway")
            if source is None:
                return _Way(reason=self._unknown(node))
            if not self._passes(node):
                steps.append(node)
                if kept is not None and source in kept.inputs and not self.effects.of(node).writes:
                    if self.effects.may_change(source, node, scale.node):
                        return _Way(reason=f"what {place_of(source)} gives is changed in place")
                    return _Way(source, tuple(steps[::-1]))
            node, last = source, node

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
