"""Optimisation for training: a model's training graphs, rewritten so that autograd keeps nothing for Squeeze-and-Excitation."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from se_fx.arguments import check_flag, chosen_names
from se_fx.capture import Capture, Region, capture, collector_paused
from se_fx.cost import activation_bytes, as_call, measure
from se_fx.errors import SqueezeExciteError
from se_fx.regions import (
    EXCITE,
    GraphRegion,
    add_constants,
    clone,
    copied,
    excitement,
    hooked,
    own_class,
    restore_code,
    run_graphs,
    view,
)
from se_fx.rewrites import (
    ROUNDED,
    TRAINING_REWRITES,
    Keeping,
    Optimization,
    Step,
    Tail,
    TrainingRewrite,
    give_optimization,
    is_training_call,
    optimization_of,
    relied_on,
    tail_of,
)

__all__ = ["optimize_for_training"]


def optimize_for_training(
    model: nn.Module, example_inputs: Any = None, *, exact: bool = True, rewrites: Iterable[str] | None = None
) -> nn.Module:
    """A copy of `model` that keeps no feature map for Squeeze-and-Excitation in training. The model itself is left as it is.

    What the products with gates, and the layers after them, keep for the backward pass is computed again in it, from what the
    norms and activations before keep anyway. Works on se_fx's blocks and on those of others, recognised by what they compute.
    Outputs and running statistics are the model's bit for bit; gradients are its up to rounding. With ``exact=False`` all is up
    to rounding: gates take less time, and what `torch.compile` makes of the copy reads feature maps less often.

    The copy has the same parameters and buffers, the very same objects, under the same keys: optimizers made for the model
    train it, and checkpoints of one load into the other. It runs in either mode, under autocast, in distributed training, with
    activation checkpointing around it; `torch.compile` decides by itself what to compute again, and compiles it as the model.

    The rewrites, in their order (`se_fx.rewrites.TRAINING_REWRITES`):

    - ``linear_gates``: convolutions within gates as matrix products, if not ``exact``;
    - ``moments``: norm, squeeze and scale in one pass over a map, in compiled code, if not ``exact``;
    - ``recompute_activations``: for what activations between a norm and a product with a gate keep;
    - ``recompute_products``: for what a product with a gate keeps of its map;
    - ``recompute_readers``: for what the convolution, norm or activation after it keeps.

    ``print(se_fx.report(optimized))`` tells what was done where, and why not elsewhere.

    Args:
        model: any module, not yet compiled, scripted or wrapped; in either mode.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. With them, the report counts the bytes
            that autograd keeps, before and after. Nothing is computed on them.
        exact: whether outputs are to stay bit for bit what they are. Otherwise training is faster: a little where convolutions
            make the gates, and more where `torch.compile` compiles it.
        rewrites: names of the rewrites to apply; None for all that are as `exact` as asked.

    Raises:
        SqueezeExciteError: an argument is not what is expected, or the model can't be called with `example_inputs`.

    >>> from se_fx import SqueezeExcite2d, report
    >>> net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.SiLU(), SqueezeExcite2d(32), nn.Conv2d(32, 8, 1))
    >>> for step in report(optimize_for_training(net)).steps:
    ...     for change in step.changes:
    ...         print(f"{change.place}: {change.detail}")
    2: needs nothing but what 1 keeps
    2: is computed again from what 1 keeps, by 2
    2: is scaled again for 4
    """
    check_flag("exact", exact)
    chosen = chosen_names("rewrites", rewrites, TRAINING_REWRITES)
    rounded = [name for name in chosen if name in ROUNDED]
    if exact and rewrites is not None and rounded:
        raise SqueezeExciteError(f"rewrites: {rounded[0]!r} rounds in another way; pass exact=False")
    chosen = [name for name in chosen if not exact or name not in ROUNDED]
    if example_inputs is not None:
        as_call(example_inputs)
    if isinstance(model, nn.Module) and optimization_of(model, "training") is not None:
        return clone(model)
    with torch.inference_mode(False), collector_paused():
        captured = capture(model, training=True)
        return _optimized(captured, {name: TRAINING_REWRITES[name] for name in chosen}, example_inputs)


def _optimized(captured: Capture, rewrites: dict[str, TrainingRewrite], example_inputs: Any) -> nn.Module:
    model = captured.model
    views = {region.path: _views(model, region) for region in captured.regions if region.graphs is not None}
    keepings = {path: Keeping(by_mode[True], functools.partial(_tail, by_mode[True])) for path, by_mode in views.items()}
    kept = before = None if example_inputs is None else activation_bytes(model, example_inputs)
    if kept is None and example_inputs is not None:
        measure(model, example_inputs)  # says why, if it can't be called in evaluation either
    steps, changed = [], set()
    for name, rewrite in rewrites.items():
        changes = []
        for path, keeping in keepings.items():
            found = [each.within(path) for each in rewrite(keeping)]
            keeping.graph.lint()
            changed |= {path} if any(each.applied for each in found) else set()
            changes += found
        less = None
        if kept is not None:
            after = activation_bytes(_assembled(captured, views, changed), example_inputs)
            less, kept = (None, None) if after is None else (kept - after, after)
        steps.append(Step(name, tuple(changes), kept_less=less))
    optimized = _assembled(captured, views, changed)
    opaque = tuple(captured.opaque.items())
    record = Optimization(own_class(model).__name__, tuple(steps), opaque=opaque, purpose="training", kept=before)
    give_optimization(optimized, record)
    return optimized


def _views(model: nn.Module, region: Region) -> dict[bool, fx.GraphModule]:
    """A region's graphs of both modes, over a module of its own, none of whose parts scales what it returns."""
    module = clone(model.get_submodule(region.path))
    restore_code(module)
    add_constants(module, region.constants)
    views = {training: view(module, copied(graph)[0]) for training, graph in (region.graphs or {}).items()}
    for node in (node for each in views.values() for node in each.graph.nodes):
        if node.op == "call_module" and EXCITE in node.kwargs:  # its blocks are nodes
            restore_code(module.get_submodule(str(node.target)))
            node.kwargs = {}
    return views


def _tail(region: fx.GraphModule, name: str) -> Tail | None:
    """What a norm of others that a graph calls does after normalising, if that is the same in both modes."""
    module = region.get_submodule(name)
    if not isinstance(module, (_BatchNorm, nn.GroupNorm)) or hooked(module):
        return None
    regions = capture(module, finely=True, training=True).regions
    if len(regions) != 1 or regions[0].path or regions[0].graphs is None:
        return None
    train, evaluate = (tail_of(each, module, mode) for mode, each in _views(module, regions[0]).items())
    return train if train == evaluate else None


def _assembled(captured: Capture, views: dict[str, dict[bool, fx.GraphModule]], changed: set[str]) -> nn.Module:
    """A copy of the model whose changed regions run the graphs of `views` while they are fresh; all else is as it was."""
    model = clone(captured.model)
    for region in captured.regions:
        if region.path in changed:
            module = model.get_submodule(region.path)
            as_graph_module, replaceable = isinstance(module, GraphRegion), module.__dict__.get("_replaceable", True)
            restore_code(module, hosts=False)
            add_constants(module, region.constants)
            graphs = {training: copied(each.graph)[0] for training, each in views[region.path].items()}
            for graph in graphs.values():
                _leave_scaling_to_nodes(module, graph)
            kinds = {"as_graph_module": as_graph_module, "replaceable": replaceable}
            activations, norms = (set().union(*names) for names in zip(*map(relied_on, graphs.values()), strict=True))
            parts = {f"{norm}.{name}" for norm in norms for name, _ in module.get_submodule(norm).named_modules() if name}
            run_graphs(module, graphs, entered=region.entered(), fixed=activations | parts, read=norms, **kinds)
    return model


def _leave_scaling_to_nodes(module: nn.Module, graph: fx.Graph) -> None:
    """Have modules whose blocks a graph calls by itself not scale what they return."""
    for node in graph.nodes:
        is_call = is_training_call(node) and bool(node.args)
        callee, op = (node.args[0], "get_attr") if is_call else (node, "call_module")
        if isinstance(callee, fx.Node) and callee.op == op and excitement(_found(module, str(callee.target))):
            node.kwargs = {**node.kwargs, EXCITE: False}


def _found(module: nn.Module, name: str) -> Any:
    return operator.attrgetter(name)(module)
