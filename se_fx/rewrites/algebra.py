"""Algebra: what the nodes of an eval graph compute, in the few terms that inference rewrites need.

Whoever wrote a network, and with modules, functions or methods: a *convolution*, an *affine* map of channels (a pointwise
convolution, a norm with fixed statistics), an *average* over space, a *product* of a vector and a matrix, a *scale* of a
feature map by a gate. Recognised by what is computed and by shapes, never by the names of classes that aren't PyTorch's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from se_fx.analysis import ADDS, PRODUCTS, called, changes_in_place, describes, maps_and_vectors, modules_of, pools_globally
from se_fx.regions import hooked
from se_fx.rewrites.products import VectorLinear
from se_fx.rewrites.terms import Affine, Scale, affine, exact, is_pointwise, pointwise, with_parameters

__all__ = ["Algebra"]


class Algebra:
    """What the nodes of one graph compute, in eval mode. Made anew after each rewrite.

    Attributes:
        module: whose graph it is.
        maps: channels of the feature maps.
        vectors: the shape behind the batch of what holds a vector for each sample.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.modules = dict(modules_of(module))
        found, self.vectors = maps_and_vectors(module.graph, module)
        self.maps = {node: width for node, width in found.items() if node not in self.vectors}
        self._constants: dict[fx.Node, Tensor | None] = {}

    def convolution(self, node: fx.Node) -> nn.Conv2d | None:
        """The convolution a node computes, as a plain `nn.Conv2d`."""
        module = called(node, self.modules)
        if isinstance(module, nn.Conv2d):
            plain = type(module).forward is nn.Conv2d.forward and type(module)._conv_forward is nn.Conv2d._conv_forward
            return module if plain and _is_plain(module) and _reads_one(node) else None
        if node.target is not F.conv2d or node.op != "call_function":
            return None
        given = _given(node, ("input", "weight", "bias", "stride", "padding", "dilation", "groups"))
        weight, bias = self.constant(given.pop("weight", None)), given.pop("bias", None)
        known_bias = None if bias is None else self.constant(bias)
        options = {name: value for name, value in given.items() if name != "input"}
        if weight is None or (known_bias is None) != (bias is None) or fx.map_arg(options, lambda n: None) != options:
            return None
        groups = int(options.get("groups", 1))
        size = (weight.shape[2], weight.shape[3])
        conv = nn.Conv2d(weight.shape[1] * groups, weight.shape[0], size, device="meta", **options)
        return with_parameters(conv, weight, known_bias)

    def normalization(self, node: fx.Node) -> Affine | None:
        """What maps each channel by itself, by constants: a norm with fixed statistics, a constant factor or summand."""
        module = called(node, self.modules)
        if isinstance(module, _BatchNorm):
            known = type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward) and not module.training
            if not known or not _is_plain(module) or not _reads_one(node) or module.running_mean is None:
                return None
            return self._normalized(node, module.running_mean, module.running_var, module.weight, module.bias, module.eps)
        if node.target is F.batch_norm:
            names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
            given = _given(node, names)
            tensors = {name: given[name] for name in names[1:5] if given.get(name) is not None}
            known_tensors = {name: self.constant(value) for name, value in tensors.items()}
            if given.get("training", False) is not False or None in known_tensors.values():
                return None
            mean, var, weight, bias = map(known_tensors.get, names[1:5])
            return self._normalized(node, mean, var, weight, bias, given.get("eps", 1e-5))
        if node.target in ADDS | PRODUCTS and len(node.args) == 2 and not node.kwargs:
            return self._with_constant(node)
        return None

    def _normalized(
        self, node: fx.Node, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: Any
    ) -> Affine | None:
        source = _given(node, ("input",)).get("input")
        if not isinstance(source, fx.Node) or mean is None or var is None or not isinstance(eps, float):
            return None
        scale = (exact(var) + eps).rsqrt()
        if weight is not None:
            scale = scale * exact(weight)
        shift = -exact(mean) * scale
        return Affine(source, scale, shift if bias is None else shift + exact(bias), (mean if weight is None else weight).dtype)

    def _with_constant(self, node: fx.Node) -> Affine | None:
        for value, other in (node.args, node.args[::-1]):
            if not isinstance(value, fx.Node) or node not in self.maps or value not in self.maps:
                continue
            width, constant = self.maps[value], self.constant(other)
            if constant is None or not constant.is_floating_point():
                continue
            if constant.ndim < 3 or constant.shape[-2:] != (1, 1) or constant.numel() not in (1, width):
                continue
            each = exact(constant).flatten().expand(width)
            weight, bias = (each, torch.zeros_like(each)) if node.target in PRODUCTS else (torch.ones_like(each), each)
            return Affine(value, weight, bias, constant.dtype)
        return None

    def affine(self, node: fx.Node) -> Affine | None:
        """The map of channels, the same at every position, that a node applies; what it reads need not be in `maps`."""
        conv = self.convolution(node)
        if conv is None:
            return self.normalization(node)
        return pointwise(node.all_input_nodes[0], conv) if is_pointwise(conv) else None

    def average(self, node: fx.Node) -> fx.Node | None:
        """The feature map, (N, C, H, W), that a node averages over all of H and W."""
        if node not in self.vectors or not node.all_input_nodes:
            return None
        if not pools_globally(node, self.modules) or not _averages(node, self.modules):
            return None
        source = node.all_input_nodes[0]
        if source.target in ("view", "reshape", "flatten", torch.flatten):
            source = source.all_input_nodes[0]
        length = max(self.vectors[node])
        return source if self.maps.get(source) == length and "dtype" not in node.kwargs else None

    def product(self, node: fx.Node) -> Affine | None:
        """The matrix, and bias, that a node multiplies a vector (N, C) or (N, C, 1, 1) by."""
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        if source not in self.vectors or node not in self.vectors:
            return None
        conv = self.convolution(node)
        if conv is not None:
            return pointwise(source, conv) if is_pointwise(conv) and self.vectors[source][1:] == (1, 1) else None
        weight: Tensor | None
        bias: Tensor | None
        module = called(node, self.modules)
        if isinstance(module, (nn.Linear, VectorLinear)):
            known = type(module) in (nn.Linear, VectorLinear) and _is_plain(module) and _reads_one(node)
            weight, bias = (module.weight, module.bias) if known else (None, None)
        elif node.target is F.linear:
            given = _given(node, ("input", "weight", "bias"))
            weight, bias = self.constant(given["weight"]), self.constant(given.get("bias"))
            if (bias is None) != (given.get("bias") is None):
                return None
        else:
            return None
        fits = len(self.vectors[source]) == 1 or isinstance(module, VectorLinear)
        return None if weight is None or not fits else affine(source, weight, bias)

    def scale(self, node: fx.Node) -> Scale | None:
        """The product of a feature map and a gate that a node computes."""
        if node.target not in PRODUCTS or len(node.args) != 2 or node.kwargs or node not in self.maps:
            return None
        for value, other in (node.args, node.args[::-1]):
            gate = self._gate(other)
            if gate is not None and isinstance(value, fx.Node) and self.maps.get(value) == self.maps[node]:
                return Scale(node, value, gate)
        return None

    def scales(self) -> Iterator[Scale]:
        """All products of a feature map and a gate, each as it is when its turn comes."""
        for node in list(self.graph.nodes):
            scale = self.scale(node)
            if scale is not None:
                yield scale

    def _gate(self, value: Any) -> fx.Node | None:
        if not isinstance(value, fx.Node):
            return None
        if value.op == "call_method" and value.target in ("expand", "expand_as"):
            return self._gate(value.args[0])
        return value if self.vectors.get(value, ())[1:] == (1, 1) else None

    def gate_nodes(self) -> set[fx.Node]:
        """All vectors that gates are computed from, gates included."""
        open_ends: list[Any] = [scale.gate for scale in self.scales()]
        open_ends += [self._gate(node.args[2]) for node in self.graph.nodes if node.target is torch.addcmul]
        found: set[fx.Node] = set()
        while open_ends:
            node = open_ends.pop()
            if node in self.vectors and node not in found:
                found.add(node)
                open_ends += node.all_input_nodes
        return found

    def constant(self, value: Any) -> Tensor | None:
        """The tensor that a node yields at every call: an attribute, or what is computed from attributes alone."""
        if not isinstance(value, fx.Node):
            return None
        if value not in self._constants:
            self._constants[value] = self._evaluated(value)
        return self._constants[value]

    def _evaluated(self, node: fx.Node) -> Tensor | None:
        if any(changes_in_place(user, self.modules) and user.args[:1] == (node,) for user in node.users):
            return None
        interpreter = fx.Interpreter(self.module, garbage_collect_values=False, graph=self.graph)
        if node.op == "get_attr":
            found = interpreter.fetch_attr(str(node.target))
            return found.detach() if isinstance(found, Tensor) else None
        name = str(getattr(node.target, "__name__", node.target))
        sources = node.all_input_nodes
        if node.op not in ("call_function", "call_method") or not sources or any(word in name for word in _RANDOM):
            return None
        for source in sources:
            known = self.constant(source)
            if known is None:
                return None
            interpreter.env[source] = known
        with torch.no_grad():
            found = interpreter.run_node(node)
        return found if isinstance(found, Tensor) else None

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Who reads a value, other than to ask for its shape."""
        return [user for user in node.users if not describes(user)]

    def is_written(self, value: fx.Node, before: fx.Node) -> bool:
        """Whether a value may be changed in place, under any of its names, before a later node reads it."""
        return any(changes_in_place(user, self.modules) and user < before for user in self._users_by_any_name(value))

    def is_read_after(self, value: fx.Node, last: fx.Node) -> bool:
        """Whether anyone reads a value, under any of its names, after a node that does."""
        return any(user > last and not describes(user) for user in self._users_by_any_name(value, last))

    def _users_by_any_name(self, value: fx.Node, *without: fx.Node) -> Iterator[fx.Node]:
        names, open_ends = {value, *without}, [value]
        while open_ends:
            for user in open_ends.pop().users:
                yield user
                if user not in names and (_is_view(user) or changes_in_place(user, self.modules)):
                    names.add(user)
                    open_ends.append(user)

    def is_reshape(self, node: fx.Node) -> bool:
        """Whether a node only gives a vector another shape."""
        vectors = [source for source in node.all_input_nodes if source in self.vectors]
        if len(vectors) != 1 or node not in self.vectors or max(self.vectors[node]) != max(self.vectors[vectors[0]]):
            return False
        return (_is_view(node) and node.target not in _CASTS) or type(called(node, self.modules)) is nn.Flatten

    def adds(self, node: fx.Node) -> bool:
        """Whether a node is the plain sum of two values."""
        return node.target in ADDS and len(node.args) == 2 and len(node.all_input_nodes) == 2 and not node.kwargs

    def is_own(self, node: fx.Node) -> bool:
        """Whether a value is in memory that its readers alone know."""
        while changes_in_place(node, self.modules) and len(self.readers(node.all_input_nodes[0])) == 1:
            node = node.all_input_nodes[0]
        if changes_in_place(node, self.modules):
            return False
        module = called(node, self.modules)
        if module is None:
            return node.target in _ALLOCATING
        return isinstance(module, (nn.Conv2d, nn.Linear, VectorLinear, _BatchNorm, *_ACTIVATIONS)) and not hooked(module)


# --------------------------------------------------------------------------------------------------------------- helpers
_RANDOM = ("rand", "dropout", "bernoulli", "normal", "uniform", "multinomial", "poisson", "exponential")
_VIEWS = frozenset(
    {"view", "reshape", "flatten", "squeeze", "unsqueeze", "transpose", "permute", "expand", "expand_as", "chunk", "split"}
    | {"narrow", "select", "unbind", "t", "contiguous", "to", "detach", "getitem", "type", "float", "view_as", "unflatten"}
)


_CASTS = ("to", "type", "float")
_ACTIVATIONS = (nn.ReLU, nn.SiLU, nn.Hardswish, nn.ReLU6, nn.GELU)
_ALLOCATING: frozenset[Any] = frozenset(
    {F.conv2d, F.linear, F.batch_norm, F.relu, F.silu, F.hardswish, F.relu6, F.gelu, torch.addcmul}
)


def _is_view(node: fx.Node) -> bool:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and name in _VIEWS


def _averages(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    module = called(node, modules)
    if module is not None:
        return type(module) is nn.AdaptiveAvgPool2d and not hooked(module)
    if node.target is F.avg_pool2d:
        return len(node.args) == 2 and not node.kwargs
    return node.target in (F.adaptive_avg_pool2d, torch.mean, "mean")


def _is_plain(module: nn.Module) -> bool:
    return not hooked(module) and not parametrize.is_parametrized(module)


def _reads_one(node: fx.Node) -> bool:
    return len(node.args) + len(node.kwargs) == 1 and len(node.all_input_nodes) == 1


def _given(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """A node's arguments by the names of the function's parameters."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
