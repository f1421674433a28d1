"""Channels: which values of a graph are feature maps, and of how many channels. Runs on meta tensors, so computes nothing.

No example input is at hand when blocks are placed, and none is needed: a feature map starts at every Conv2d, and what
becomes of it is seen by running each node on a map of a made-up size. Two sizes tell channels from heights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from se_fx.analysis.calls import holds_hooks_or_convs, on_meta
from se_fx.analysis.memo import remembered
from se_fx.capture import random_state, set_random_state

__all__ = ["UNKNOWN", "Values", "WithoutValues", "channels", "values_of"]


def channels(graph: fx.Graph, root: nn.Module) -> dict[fx.Node, int]:
    """C of every value that is certainly a feature map (N, C, H, W).

    Args:
        graph: a region's graph.
        root: the module its targets refer to, a scratch copy: modules without a Conv2d are run, on meta tensors.
    """
    return values_of(graph, root).maps


@remembered
def values_of(graph: fx.Graph, root: nn.Module) -> Values:
    """What the nodes of a graph yield, for whoever asks."""
    return Values(graph, root)


#: A value that can't be told without an input.
UNKNOWN = object()


class Values:
    """What the nodes of a graph yield, as meta tensors, for feature maps of two made-up sizes.

    Args:
        graph: a region's graph.
        root: the module its targets refer to, a scratch copy: modules without a Conv2d are run, on meta tensors.

    Attributes:
        maps: the channels of every value that is certainly a feature map, (N, C, H, W).
        vectors: the shapes of those with one vector for each sample, as what stands behind the batch: (C,), (C, 1, 1), (1, C),
            ... A map of one position, (N, C, 1, 1), is in both.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.maps: dict[fx.Node, int] = {}
        self.vectors: dict[fx.Node, tuple[int, ...]] = {}
        self._runs = [_Shapes(root, graph, size) for size in _SIZES]
        randomness = random_state()
        try:
            for node in graph.nodes:
                self._run(node)
        finally:
            set_random_state(randomness)

    def of(self, node: fx.Node) -> tuple[Any, ...]:
        """What a node yields, at each size; `UNKNOWN` where that can't be told. New nodes are run."""
        if any(node not in run.env for run in self._runs):
            for source in node.all_input_nodes:
                self.of(source)
            self._run(node)
        return tuple(run.env[node] for run in self._runs)

    def dtype(self, node: fx.Node) -> torch.dtype | None:
        """Of the tensor that a node yields; None where that can't be told, or is none."""
        found = {value.dtype if isinstance(value, Tensor) else None for value in self.of(node)}
        return found.pop() if len(found) == 1 else None

    def _run(self, node: fx.Node) -> None:
        with torch.inference_mode(False), torch.no_grad():
            values = [run.value(node) for run in self._runs]
            shapes = [value.shape for value in values if isinstance(value, Tensor)]
            is_batch = [shape[0] for shape in shapes if shape] == [run.batch for run in self._runs]
            widths = {shape[1] for shape in shapes if len(shape) == 4}
            is_map = is_batch and len(widths) == 1 and all(len(shape) == 4 for shape in shapes)
            if is_map:
                self.maps[node] = widths.pop()
            behind = {tuple(shape[1:]) for shape in shapes} if is_batch else set()
            if len(behind) == 1 and behind != {()} and all(len(shape) - shape.count(1) <= 1 for shape in behind):
                self.vectors[node] = behind.pop()
            for run, value in zip(self._runs, values, strict=True):
                run.env[node] = run.resized(value) if is_map else value


_SIZES = ((2, 64, 96), (3, 128, 160))  # made up: N, H, W


class _Unknown(Exception):
    """A value can't be told without an input."""


class WithoutValues(fx.Interpreter):
    """Runs a graph on tensors that have no values."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call it, but for a batch norm: its result is known, and its decomposition takes a hundred times as long."""
        if target is F.batch_norm:
            return torch.empty_like(args[0] if args else kwargs["input"])
        return super().call_function(target, args, kwargs)


class _Shapes(WithoutValues):
    """Runs nodes for shapes only, starting from feature maps of one size."""

    def __init__(self, root: nn.Module, graph: fx.Graph, size: tuple[int, int, int]) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self.batch, *self.spatial = size

    def value(self, node: fx.Node) -> Any:
        """What a node yields; something unknown, where that can't be told."""
        try:
            return self.run_node(node)
        except Exception:  # whatever a model's code raises on sizes that it isn't made for
            return UNKNOWN

    def resized(self, value: Tensor) -> Tensor:
        """A feature map of this run's size in place of one of any size; 1x1 stays."""
        return value if value.shape[2:] == (1, 1) else self._map(value.shape[1], value)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        raise _Unknown

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = self.fetch_attr(target)
        return value.to("meta") if isinstance(value, Tensor) else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is F.conv2d:
            given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            source, weight = given["input"], given["weight"]
            if isinstance(weight, Tensor) and not _is_at_one(source):
                return self._map(weight.shape[0], weight)
        return super().call_function(target, *self._known(args, kwargs))

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_method(target, *self._known(args, kwargs))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        source = next(iter((*args, *kwargs.values())), None)
        if isinstance(module, nn.Conv2d):
            any_of_it = next(module.parameters())  # a weight that is computed is changed where that is asked for
            if not _is_at_one(source):
                return self._map(module.out_channels, any_of_it)
            shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
            return module._conv_forward(source, any_of_it.new_empty(shape, device="meta"), None)  # type: ignore[arg-type]
        if isinstance(module, nn.BatchNorm2d):
            like = next((t for t in (source, module.running_mean, module.weight) if isinstance(t, Tensor)), None)
            return self._map(module.num_features, like)
        args, kwargs = self._known(args, kwargs)
        if type(module) in _KEEP and "forward" not in module.__dict__:
            return source
        if holds_hooks_or_convs(module):
            raise _Unknown
        call, _ = on_meta(module)
        return call(*args, **kwargs)

    def _known(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if any(leaf is UNKNOWN for leaf in tree_leaves((args, kwargs))):
            raise _Unknown
        return args, kwargs

    def _map(self, width: int, like: Tensor | None = None) -> Tensor:
        dtype = torch.float32 if like is None else like.dtype
        return torch.empty(self.batch, width, *self.spatial, device="meta", dtype=dtype)


def _is_at_one(source: Any) -> bool:
    """Whether a value is a map of one position, at which a convolution has to be run to know what it yields."""
    return isinstance(source, Tensor) and source.shape[2:] == (1, 1)


#: Modules that keep the number of channels, and are so common that running them would take time.
_KEEP = (nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.MaxPool2d, nn.AvgPool2d, nn.Dropout)
