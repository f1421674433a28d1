"""Algebra: what the nodes of an eval graph compute, in the few terms that inference rewrites need.

Whoever wrote a network, and with modules, functions or methods: a *convolution*, an *affine* map of channels (a pointwise
convolution, a norm with fixed statistics), an *average* over space, a *product* of a vector and a matrix, a *scale* of a
feature map by a gate. Recognised by what is computed and by shapes, never by the names of classes that aren't PyTorch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from se_fx.analysis import ADDS, PRODUCTS, Effects, Values, arguments, called, is_plain, modules_of, name_results
from se_fx.rewrites.evaluation import Evaluation
from se_fx.rewrites.products import VectorLinear
from se_fx.rewrites.terms import Affine, Scale, affine, exact, is_pointwise, pointwise, with_parameters

__all__ = ["Algebra"]


class Algebra:
    """What the nodes of one graph compute, in eval mode. Stays right while rewrites edit the graph.

    Attributes:
        module: the graph module.
        exported: whether the result is for engines that have their own products and sums, and want PyTorch's plain layers.
        maps: channels of the feature maps that have more than one position.
        vectors: the shape behind the batch of what holds a vector for each sample.
        effects: what running the nodes does, besides.
        evaluation: what the nodes make of given tensors.
        batched: maps that are (N, C, H, W) and never (C, H, W), since norms yield them that take no other, or did.
    """

    def __init__(self, module: fx.GraphModule, *, exported: bool = False) -> None:
        self.module, self.graph, self.exported = module, module.graph, exported
        name_results(module.graph, module)
        self.modules = dict(modules_of(module))
        self.values = Values(module.graph, module)
        self.effects = Effects(module, self.modules, self.values)
        self.evaluation = Evaluation(module, self.effects)
        self.vectors = self.values.vectors
        self.maps = {node: width for node, width in self.values.maps.items() if node not in self.vectors}
        self.batched = {node for node in self.maps if _takes_batches_only(called(node, self.modules))}

    def given(self, node: fx.Node) -> dict[str, Any]:
        """The arguments of a call by name; nothing where they can't be told."""
        return arguments(node, self.modules) or {}

    def dtype(self, node: fx.Node) -> torch.dtype | None:
        """The type of what a node yields, where that is known and real."""
        found = self.values.dtype(node)
        return found if found is not None and found.is_floating_point else None

    def convolution(self, node: fx.Node) -> nn.Conv2d | None:
        """The convolution a node computes of its `input`, as a plain `nn.Conv2d`."""
        module, given = called(node, self.modules), self.given(node)
        if isinstance(module, nn.Conv2d):
            is_conv = type(module).forward is nn.Conv2d.forward and self._is_fixed(module)
            return module if is_conv and isinstance(given.get("input"), fx.Node) and len(given) == 1 else None
        if node.target is not F.conv2d or node.op != "call_function" or not isinstance(given.get("input"), fx.Node):
            return None
        weight, bias = self.constant(given.pop("weight", None)), given.pop("bias", None)
        known_bias = None if bias is None else self.constant(bias)
        options = {name: value for name, value in given.items() if name != "input"}
        if weight is None or (known_bias is None) != (bias is None) or fx.map_arg(options, lambda n: None) != options:
            return None
        groups = int(options.get("groups", 1))
        size = (weight.shape[2], weight.shape[3])
        conv = nn.Conv2d(weight.shape[1] * groups, weight.shape[0], size, device="meta", **options)
        return with_parameters(conv, weight, known_bias) if weight.is_floating_point() else None

    def _is_fixed(self, module: nn.Module) -> bool:
        """Whether a module runs PyTorch's code on tensors that are real, and that the graph doesn't change."""
        tensors = [*module._parameters.values(), *module._buffers.values()]
        real = all(tensor is None or not tensor.is_complex() for tensor in tensors)
        return is_plain(module) and real and not any(t is not None and self.evaluation.is_changed(t) for t in tensors)

    def normalization(self, node: fx.Node) -> Affine | None:
        """What maps each channel by itself, by constants: a norm with fixed statistics, a constant factor or summand."""
        module, given = called(node, self.modules), self.given(node)
        if isinstance(module, _BatchNorm):
            known = type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward) and not module.training
            if not known or not self._is_fixed(module) or len(given) != 1:
                return None
            tensors = module.running_mean, module.running_var, module.weight, module.bias
            return self._normalized(node, given.get("input"), tensors, module.eps)
        if node.target is F.batch_norm and given.get("training", False) is False:
            named = [given.get(name) for name in ("running_mean", "running_var", "weight", "bias")]
            constants = [None if each is None else self.constant(each) for each in named]
            if [each is None for each in named] == [each is None for each in constants]:
                return self._normalized(node, given.get("input"), tuple(constants), given.get("eps", 1e-5))
        if self._operands(node):
            return self._with_constant(node)
        return None

    def _normalized(self, node: fx.Node, source: Any, tensors: tuple[Tensor | None, ...], eps: Any) -> Affine | None:
        mean, var, weight, bias = tensors
        dtype = self.dtype(node)
        if not isinstance(source, fx.Node) or mean is None or var is None or not isinstance(eps, float) or dtype is None:
            return None
        if any(each is not None and not each.is_floating_point() for each in tensors):
            return None
        scale = (exact(var) + eps).rsqrt()
        if weight is not None:
            scale = scale * exact(weight)
        shift = -exact(mean) * scale
        return Affine(source, scale, shift if bias is None else shift + exact(bias), dtype)

    def _with_constant(self, node: fx.Node) -> Affine | None:
        operands = self._operands(node)
        for value, other in (operands, operands[::-1]):
            if not isinstance(value, fx.Node) or node not in self.maps or value not in self.maps:
                continue
            # A constant made to be of the map's type leaves the map's type as it is, under autocast, too.
            is_adapted = isinstance(other, fx.Node) and other.target == "type_as" and other.args[1:] == (value,)
            width, dtype, constant = self.maps[value], self.dtype(node), self.constant(other.args[0] if is_adapted else other)
            if constant is None or not constant.is_floating_point() or dtype is None or dtype != self.dtype(value):
                continue
            shape = tuple(constant.shape)
            of_channels = shape in ((width, 1, 1), (1, 1, 1))
            if not of_channels and not (shape in ((1, width, 1, 1), (1, 1, 1, 1)) and self._is_batched(value)):
                continue
            each = exact(constant).flatten().expand(width)
            weight, bias = (each, torch.zeros_like(each)) if node.target in PRODUCTS else (torch.ones_like(each), each)
            return Affine(value, weight, bias, dtype, None if is_adapted else other)
        return None

    def _is_batched(self, value: fx.Node) -> bool:
        """Whether a map is certainly (N, C, H, W), never (C, H, W): it comes from one that is."""
        seen, open_ends = {value}, [value]
        while open_ends:
            node = open_ends.pop()
            if node in self.batched:
                return True
            new = [source for source in node.all_input_nodes if source in self.maps and source not in seen]
            seen.update(new)
            open_ends += new
        return False

    def affine(self, node: fx.Node) -> Affine | None:
        """The map of channels, the same at every position, that a node applies; what it reads need not be in `maps`."""
        conv = self.convolution(node)
        if conv is None:
            found = self.normalization(node)
            return found if found is None or found.dtype == self.dtype(found.source) else None
        return pointwise(self.given(node)["input"], conv) if is_pointwise(conv) else None

    def average(self, node: fx.Node) -> fx.Node | None:
        """The feature map, (N, C, H, W), that a node averages over all of H and W."""
        if node not in self.vectors or any(source in self.vectors for source in self.effects.of(node).reads):
            return None
        way = self.evaluation.way(node, self.maps)
        sources = {source for each in way or () for source in each.all_input_nodes if source in self.maps}
        if way is None or len(sources) != 1:
            return None
        (source,) = sources
        length = max(self.vectors[node])
        is_alike = self.maps[source] == length and self.dtype(node) == self.dtype(source) is not None
        return source if is_alike and self.evaluation.averages(way, source, length) else None

    def product(self, node: fx.Node) -> Affine | None:
        """The matrix, and bias, that a node multiplies a vector (N, C) or (N, C, 1, 1) by."""
        module, given = called(node, self.modules), self.given(node)
        source = given.get("input")
        if not isinstance(source, fx.Node) or source not in self.vectors or node not in self.vectors:
            return None
        conv = self.convolution(node)
        if conv is not None:
            return pointwise(source, conv) if is_pointwise(conv) and self.vectors[source][1:] == (1, 1) else None
        weight: Tensor | None
        bias: Tensor | None
        if isinstance(module, (nn.Linear, VectorLinear)):
            known = type(module).forward in (nn.Linear.forward, VectorLinear.forward) and self._is_fixed(module)
            weight, bias = (module.weight, module.bias) if known and len(given) == 1 else (None, None)
        elif node.target is F.linear and "out" not in given:
            weight, bias = self.constant(given["weight"]), self.constant(given.get("bias"))
            if (bias is None) != (given.get("bias") is None):
                return None
        else:
            return None
        fits = len(self.vectors[source]) == 1 or isinstance(module, VectorLinear)
        return affine(source, weight, bias) if weight is not None and fits and weight.is_floating_point() else None

    def scale(self, node: fx.Node) -> Scale | None:
        """The product of a feature map and a gate that a node computes."""
        operands = self._operands(node)
        if not operands or node.target not in PRODUCTS or node not in self.maps:
            return None
        for value, other in (operands, operands[::-1]):
            gate = self.gate(other)
            if gate is None or not isinstance(value, fx.Node) or self.maps.get(value) != self.maps[node]:
                continue
            if self.dtype(value) is not None and self.dtype(value) == self.dtype(gate) == self.dtype(node):
                return Scale(node, value, gate)
        return None

    def scales(self) -> Iterator[Scale]:
        """All products of a feature map and a gate, each as it is when its turn comes."""
        for node in list(self.graph.nodes):
            scale = self.scale(node) if not node._erased else None
            if scale is not None:
                yield scale

    def can_be_left_out(self, scale: Scale, reader: fx.Node) -> bool:
        """Whether a product needs not be computed once its only reader does without: in place, nobody else may see that."""
        if not self.effects.of(scale.node).writes:
            return True
        return list(scale.node.users) == [reader] and self.effects.is_forgotten(scale.value, scale.node)

    def _operands(self, node: fx.Node) -> tuple[Any, ...]:
        """Both operands of a plain product or sum."""
        given = self.given(node) if node.target in ADDS | PRODUCTS else {}
        is_plain_one = given.keys() - {"alpha"} == {"input", "other"} and given.get("alpha", 1) == 1
        return (given["input"], given["other"]) if is_plain_one else ()

    def gate(self, value: Any) -> fx.Node | None:
        """The gate that a value is: a vector at one position, (N, C, 1, 1), or an expanded one."""
        if not isinstance(value, fx.Node):
            return None
        if value.op == "call_method" and value.target in ("expand", "expand_as"):
            return self.gate(value.args[0])
        return value if self.vectors.get(value, ())[1:] == (1, 1) else None

    def gate_nodes(self) -> set[fx.Node]:
        """All vectors that gates are computed from, gates included: those that maps are scaled by, and those added to maps."""
        open_ends: list[Any] = [scale.gate for scale in self.scales()]
        for node in self.graph.nodes:
            operands = self._operands(node) if node.target in ADDS and node in self.maps else ()
            if any(isinstance(each, fx.Node) and each in self.maps and each not in self.vectors for each in operands):
                open_ends += map(self.gate, operands)
        open_ends += [self.gate(self.given(node).get("tensor2")) for node in self.graph.nodes if node.target is torch.addcmul]
        found: set[fx.Node] = set()
        while open_ends:
            node = open_ends.pop()
            if node in self.vectors and node not in found:
                found.add(node)
                open_ends += node.all_input_nodes
        return found

    def constant(self, value: Any) -> Tensor | None:
        """The tensor that a node yields at every call: an attribute, or what is computed from attributes alone."""
        return self.evaluation.constant(value) if isinstance(value, fx.Node) else None

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Who reads a value, other than to ask for its shape."""
        return self.effects.readers(node)

    def is_reshape(self, node: fx.Node) -> bool:
        """Whether a node only gives a vector another shape."""
        sources = [source for source in self.effects.of(node).reads if source in self.vectors]
        if len(sources) != 1 or node not in self.vectors or max(self.vectors[node]) != max(self.vectors[sources[0]]):
            return False
        return self.evaluation.keeps_order(node, sources[0], self.vectors[sources[0]], self.maps)

    def summands(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Both values of which a node is the plain sum, if there are two of one type."""
        operands = self._operands(node) if node.target in ADDS else ()
        nodes = tuple(operand for operand in dict.fromkeys(operands) if isinstance(operand, fx.Node))
        types = {self.dtype(each) for each in (node, *nodes)}
        return nodes if len(nodes) == 2 and len(types) == 1 and None not in types else ()


def _takes_batches_only(module: nn.Module | None) -> bool:
    return type(module) is nn.BatchNorm2d and is_plain(module)
