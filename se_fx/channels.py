"""Channels: which values of a graph are feature maps, and of how many channels. Runs on meta tensors, so computes nothing.

No example input is at hand when blocks are placed, and none is needed: a feature map starts at every Conv2d, and what
becomes of it is seen by running each node on a map of a made-up size. Two sizes tell channels from heights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from se_fx.regions import hooked
from se_fx.tracing import random_state, set_random_state

__all__ = ["channels"]


def channels(graph: fx.Graph, root: nn.Module) -> dict[fx.Node, int]:
    """C of every value that is certainly a feature map (N, C, H, W).

    Args:
        graph: a region's graph.
        root: the module its targets refer to, a scratch copy: modules without a Conv2d are run, on meta tensors.
    """
    runs = [_Shapes(root, graph, size) for size in ((2, 64, 96), (3, 128, 160))]
    found: dict[fx.Node, int] = {}
    randomness = random_state()
    try:
        with torch.no_grad():
            for node in graph.nodes:
                values = [run.value(node) for run in runs]
                widths = {value.shape[1] for value in values if isinstance(value, Tensor) and value.ndim == 4}
                is_map = all(run.is_batch(value) for run, value in zip(runs, values, strict=True)) and len(widths) == 1
                if is_map:
                    found[node] = widths.pop()
                for run, value in zip(runs, values, strict=True):
                    run.env[node] = run.resized(value) if is_map else value
    finally:
        set_random_state(randomness)
    return found


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

    def is_batch(self, value: Any) -> bool:
        """Whether a value is 4-dimensional and of this run's batch size."""
        return isinstance(value, Tensor) and value.ndim == 4 and value.shape[0] == self.batch

    def resized(self, value: Tensor) -> Tensor:
        """A feature map of this run's size in place of one of any size; 1x1 stays."""
        return value if value.shape[2:] == (1, 1) else self._map(value.shape[1], value)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        raise _Unknown

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = self.fetch_attr(target)
        return value.to("meta") if isinstance(value, Tensor) else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(target, *self._known(args, kwargs))

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_method(target, *self._known(args, kwargs))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, nn.Conv2d):
            return self._map(module.out_channels)
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

    def _map(self, width: int, like: Tensor | None = None) -> Tensor:
        dtype = torch.float32 if like is None else like.dtype
        return torch.empty(self.batch, width, *self.spatial, device="meta", dtype=dtype)


#: Modules that keep the number of channels, and are so common that running them would take time.
_KEEP = (nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.MaxPool2d, nn.AvgPool2d, nn.Dropout)
