"""The placements at every Conv2d: directly after it, after the norm that follows it, or after the activation behind that."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import fx, nn

from se_fx.analysis import Modules, activation_after, called, is_nonlinear, modules_of
from se_fx.placement.spot import Spot

__all__ = ["activation", "conv", "norm"]


def conv(graph: fx.Graph, root: nn.Module) -> Iterator[Spot]:
    """Directly after each Conv2d (MosaicML Composer's placement): one block for a module, applied at each of its calls."""
    for module, nodes in _conv_calls(graph, modules_of(root)).items():
        yield Spot(str(nodes[0].target), module.out_channels, tuple(nodes))


def norm(graph: fx.Graph, root: nn.Module) -> Iterator[Spot]:
    """After the normalisation that follows each Conv2d, so that the two still fuse for inference."""
    yield from _behind(graph, root, _norm_after)


def activation(graph: fx.Graph, root: nn.Module) -> Iterator[Spot]:
    """After the activation that follows each Conv2d, or its norm: EfficientNet's place, outside of what is fused or folded."""
    yield from _behind(graph, root, _activation_after)


def _behind(graph: fx.Graph, root: nn.Module, after: Callable[[fx.Node, Modules], fx.Node | None]) -> Iterator[Spot]:
    """After what follows each call of a Conv2d, where each has such."""
    modules = modules_of(root)
    for module, nodes in _conv_calls(graph, modules).items():
        found = [value for node in nodes if (value := after(node, modules)) is not None]
        if len(found) == len(nodes):
            yield Spot(str(nodes[0].target), module.out_channels, tuple(found))


def _conv_calls(graph: fx.Graph, modules: Modules) -> dict[nn.Conv2d, list[fx.Node]]:
    calls: dict[nn.Conv2d, list[fx.Node]] = {}
    for node in graph.nodes:
        module = called(node, modules)
        if isinstance(module, nn.Conv2d):
            calls.setdefault(module, []).append(node)
    return calls


def _norm_after(node: fx.Node, modules: Modules) -> fx.Node | None:
    for user in node.users:
        module = called(user, modules)
        name = type(module).__name__ if module is not None else getattr(user.target, "__name__", "")
        if "norm" in name.lower() and user.args[:1] == (node,):
            return user
    return None


def _activation_after(node: fx.Node, modules: Modules) -> fx.Node | None:
    norm = _norm_after(node, modules)
    if norm is not None and is_nonlinear(norm, modules):  # norm and activation in one
        return norm
    value = node if norm is None else norm
    while len(value.users) == 1 and isinstance(called(user := next(iter(value.users)), modules), nn.Identity):
        value = user
    return activation_after(value, modules)
