"""Channels: which values of a graph are feature maps, and of how many channels. Runs on meta tensors, so computes nothing.

No example input is at hand when blocks are placed, and none is needed: a feature map starts at every Conv2d, and what
becomes of it is seen by running each node on a map of a made-up size. Two sizes tell channels from heights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from se_fx.capture import random_state, set_random_state
from se_fx.regions import hooked

__all__ = ["channels", "maps_and_vectors"]


def channels(graph: fx.Graph, root: nn.Module) -> dict[fx.Node, int]:
    """C of every value that is certainly a feature map (N, C, H, W).

    Args:
        graph: a region's graph.
        root: the module its targets refer to, a scratch copy: modules without a Conv2d are run, on meta tensors.
    """
    return maps_and_vectors(graph, root)[0]


def maps_and_vectors(graph: fx.Graph, root: nn.Module) -> tuple[dict[fx.Node, int], dict[fx.Node, tuple[int, ...]]]:
    """The channels of every value that is certainly a feature map, and the shapes of those with one vector for each sample.

    The latter are given as what stands behind the batch: (C,), (C, 1, 1), (1, C), ... A map of one position, (N, C, 1, 1),
    is both.

    Args:
        graph: a region's graph.
        root: the module its targets refer to, a scratch copy: modules without a Conv2d are run, on meta tensors.
    """
    maps: dict[fx.Node, int] = {}
    vectors: dict[fx.Node, tuple[int, ...]] = {}
    runs = [_Shapes(root, graph, size) for size in _SIZES]
    randomness = random_state()
    try:
        with torch.no_grad():
            for node in graph.nodes:
                values = [run.value(node) for run in runs]
                shapes = [value.shape for value in values if isinstance(value, Tensor)]
                is_batch = [shape[0] for shape in shapes if shape] == [run.batch for run in runs]
                widths = {shape[1] for shape in shapes if len(shape) == 4}
                is_map = is_batch and len(widths) == 1 and all(len(shape) == 4 for shape in shapes)
                if is_map:
                    maps[node] = widths.pop()
                behind = {tuple(shape[1:]) for shape in shapes} if is_batch else set()
                if len(behind) == 1 and behind != {()} and all(len(shape) - shape.count(1) <= 1 for shape in behind):
                    vectors[node] = behind.pop()
                for run, value in zip(runs, values, strict=True):
                    run.env[node] = run.resized(value) if is_map else value
    finally:
        set_random_state(randomness)
    return maps, vectors


_SIZES = ((2, 64, 96), (3, 128, 160))  # made up: N, H, W


class _Unknown(Exception):
    """A value can't be told without an input."""


class _Shapes(fx.Interpreter):
    """Runs nodes for shapes only, starting from feature maps of one size."""

    def __init__(self, root: nn.Module, graph: fx.Graph, size: tuple[int, int, int]) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self.batch, *self.spatial = size
        self.unknown = object()

    def value(self, node: fx.Node) -> Any:
        """What a node yields; something unknown, where that can't be told."""
        try:
            return self.run_node(node)
        except Exception:  # whatever a model's code raises on sizes that it isn't made for
            return self.unknown

    def resized(self, value: Tensor) -> Tensor:
        """A feature map of this run's size in place of one of any size; 1x1 stays."""
        return value if value.shape[2:] == (1, 1) else self._map(value.shape[1], value)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        raise _Unknown

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = self.fetch_attr(target)
        return value.to("meta") if isinstance(value, Tensor) else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is F.conv2d and isinstance(args[1], Tensor):
            return self._convolved(args[0], args[1].shape[0], args[1].shape[2:])
        return super().call_function(target, *self._known(args, kwargs))

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_method(target, *self._known(args, kwargs))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, nn.Conv2d):
            return self._convolved(args[0] if args else None, module.out_channels, module.kernel_size)
        if isinstance(module, nn.BatchNorm2d):
            return self._map(module.num_features)
        args, kwargs = self._known(args, kwargs)
        if isinstance(module, _KEEP):
            return args[0]
        if any(map(hooked, module.modules())) or any(isinstance(part, nn.Conv2d) for part in module.modules()):
            raise _Unknown
        tensors = {name: t.to("meta") for name, t in (*module.named_parameters(), *module.named_buffers())}
        return functional_call(module, tensors, args, kwargs)

    def _known(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if any(leaf is self.unknown for leaf in tree_leaves((args, kwargs))):
            raise _Unknown
        return args, kwargs

    def _convolved(self, source: Any, width: int, kernel: tuple[int, ...]) -> Tensor:
        """A feature map, of one position where that is all there is to read."""
        whole = self._map(width)
        at_one = isinstance(source, Tensor) and source.shape[2:] == (1, 1) and tuple(kernel) == (1, 1)
        return whole[..., :1, :1] if at_one else whole

    def _map(self, width: int, like: Tensor | None = None) -> Tensor:
        dtype = torch.float32 if like is None else like.dtype
        return torch.empty(self.batch, width, *self.spatial, device="meta", dtype=dtype)


#: Modules that keep the number of channels, and are so common that running them would take time.
_KEEP = (nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.MaxPool2d, nn.AvgPool2d, nn.Dropout)
