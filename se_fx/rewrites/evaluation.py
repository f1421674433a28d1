"""Evaluation: what nodes make of given tensors, where everything that decides this is known.

Questions to which no list has the answer are put to the code itself: whether it averages, whether it only changes shapes,
what it makes of constants. It is run on values at a few sizes that aren't alike, among them images that aren't square.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from se_fx.analysis import Effects

__all__ = ["Evaluation"]

_LONGEST = 24  # nodes that are looked at


class Evaluation:
    """Runs the nodes of one graph.

    Args:
        module: whose graph it is.
        effects: what its nodes do.
    """

    def __init__(self, module: fx.GraphModule, effects: Effects) -> None:
        self.module, self.effects = module, effects
        self._constants: dict[fx.Node, Tensor | None] = {}
        self._places: set[int] | None = None

    def constant(self, node: fx.Node) -> Tensor | None:
        """The tensor that a node yields at every call: an attribute, or what is computed from attributes alone."""
        if node not in self._constants:
            self._constants[node] = self._fixed(node)
        return self._constants[node]

    def _fixed(self, node: fx.Node) -> Tensor | None:
        if not _is_made_of_attributes(node):
            return None
        way = self.way(node, ())
        attributes = [each for each in way or () if each.op == "get_attr"]
        if way is None or self._is_written(way):
            return None
        if any(isinstance(t, Tensor) and self.is_changed(t) for t in map(self.attribute, attributes)):
            return None
        found = self.run(way, {})
        return found.detach() if isinstance(found, Tensor) else None

    def attribute(self, node: fx.Node) -> Any:
        """What a node that reads an attribute of the module yields."""
        return operator.attrgetter(str(node.target))(self.module)

    def is_changed(self, tensor: Tensor) -> bool:
        """Whether the graph may write to a tensor of its module."""
        return _place(tensor) in self._written()

    def _written(self) -> set[int]:
        """The memory of the module's tensors that the graph may write to."""
        if self._places is None:
            self._places = set()
            modules = dict(self.module.named_modules(remove_duplicate=False))
            for node in self.module.graph.nodes:
                if node.op == "get_attr" and self._is_written([node]):
                    found = self.attribute(node)
                    self._places |= {_place(found)} if isinstance(found, Tensor) else set()
                elif node.op == "call_module" and self.effects.of(node).remembers:
                    module = modules[str(node.target)]
                    self._places |= {_place(tensor) for tensor in (*module.parameters(), *module.buffers())}
        return self._places

    def _is_written(self, way: list[fx.Node]) -> bool:
        return any(True for node in way for _ in self.effects.writers(node))

    def way(self, end: fx.Node, starts: Container[fx.Node]) -> list[fx.Node] | None:
        """All nodes that `end` is computed by from `starts` and constants, in order; None where other things decide, too."""
        found: set[fx.Node] = set()
        read: set[fx.Node] = set()
        open_ends = [end]
        while open_ends:
            node = open_ends.pop()
            if node in starts:
                read.add(node)
            elif node not in found:
                effect = self.effects.of(node)
                if not effect.known or effect.remembers or len(found) == _LONGEST:
                    return None
                found.add(node)
                open_ends += node.all_input_nodes
        for value in found | read:
            for writer in self.effects.writers(value):
                if (writer not in found or value in read) and value < writer and (writer < end or writer is end):
                    return None
        return sorted(found)

    def run(self, way: list[fx.Node], known: Mapping[fx.Node, Tensor]) -> Any:
        """What the last node of a `way` yields, from these values of its starts; None where it can't be run on them."""
        interpreter = self._interpreter
        interpreter.graph, interpreter.env = way[-1].graph, dict(known)
        try:
            with torch.inference_mode(False), torch.no_grad():
                for node in way:
                    found = interpreter.env[node] = interpreter.run_node(node)
        except Exception:  # whatever code raises on sizes and types that it isn't made for
            return None
        finally:
            interpreter.env = {}
        return found

    @functools.cached_property
    def _interpreter(self) -> fx.Interpreter:
        """One for all ways, since making one goes through all modules."""
        return fx.Interpreter(self.module, garbage_collect_values=False)

    @unset_fake_temporarily()
    def averages(self, way: list[fx.Node], source: fx.Node, channels: int) -> bool:
        """Whether the last node of a way yields the average over space of the feature map `source`, in whatever shape.

        Sums and products that agree with it on random numbers, at three sizes, are it.
        """
        if not all(self.effects.of(node).computes <= _POLYNOMIAL for node in way):
            return False
        for batch, *size in ((2, 3, 5), (3, 5, 2), (2, 4, 4)):
            x = torch.randn(
                batch, channels, *size, dtype=torch.float64, device="cpu", generator=torch.Generator("cpu").manual_seed(batch)
            )
            found, expected = self.run(way, {source: x.clone()}), x.mean((2, 3))
            is_alike = isinstance(found, Tensor) and found.dtype == x.dtype and found.shape[:1] == (batch,)
            if not is_alike or found.numel() != expected.numel():
                return False
            if not torch.allclose(found.flatten(), expected.flatten(), 1e-9, 1e-12):
                return False
        return True

    @unset_fake_temporarily()
    def keeps_order(self, node: fx.Node, source: fx.Node, shape: tuple[int, ...], maps: Mapping[fx.Node, int]) -> bool:
        """Whether a node gives a vector for each sample, of `shape`, another shape and nothing else, whatever its type.

        Args:
            node: the node.
            source: the vector.
            shape: what is behind the batch.
            maps: the channels of feature maps whose sizes may be asked for.
        """
        way = self.way(node, {source, *maps})
        if way is None or not all(self._only_moves(each, source, way) for each in way):
            return False
        for batch, dtype in ((2, torch.float64), (3, torch.bfloat16), (1, torch.float32)):
            x = torch.arange(batch * torch.Size(shape).numel(), device="cpu").to(dtype).reshape(batch, *shape)
            found = self.run(way, {source: x, **self.some(maps, way, batch, dtype)})
            if not isinstance(found, Tensor) or found.dtype != dtype or found.shape[:1] != (batch,):
                return False
            if found.numel() != x.numel() or not torch.equal(found.flatten(), x.flatten()):
                return False
        return True

    def _only_moves(self, node: fx.Node, source: fx.Node, way: list[fx.Node]) -> bool:
        effect = self.effects.of(node)
        return not effect.computes and node.op != "get_attr" and effect.reads <= {source, *way}

    def some(self, maps: Mapping[fx.Node, int], way: list[fx.Node], batch: int, dtype: torch.dtype) -> dict[fx.Node, Tensor]:
        """Feature maps of so many samples, of which a way asks for the sizes and types."""
        asked = {source for node in way for source in node.all_input_nodes if source in maps}
        return {source: torch.zeros(batch, maps[source], 2, 3, dtype=dtype, device="cpu") for source in asked}


_aten = torch.ops.aten
_POLYNOMIAL = {_aten.mean, _aten.sum, _aten.add, _aten.sub, _aten.mul, _aten.div, _aten.bmm, _aten.mm, _aten.mv, _aten._to_copy}
_POLYNOMIAL |= {_aten.avg_pool2d, _aten._adaptive_avg_pool2d, _aten.avg_pool3d, _aten._adaptive_avg_pool3d}
_POLYNOMIAL |= {_aten.as_strided_}  # where the average of a map in another memory format is put


def _is_made_of_attributes(node: fx.Node) -> bool:
    """Whether a value is an attribute, or computed by functions from attributes alone."""
    if node.op == "get_attr":
        return True
    sources = node.all_input_nodes if node.op in ("call_function", "call_method") else []
    return bool(sources) and all(map(_is_made_of_attributes, sources))


def _place(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
