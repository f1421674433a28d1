"""A backend of `torch.compile`: Inductor, behind the rewrites for inference, on whatever graphs Dynamo captures."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from se_fx.capture import collector_paused
from se_fx.optimize.inference import apply_rewrite, note_size, without_autocast
from se_fx.regions import copied
from se_fx.rewrites import REWRITES, Algebra, Optimization, Step

__all__ = ["inductor_behind_rewrites"]

_logger = logging.getLogger("se_fx")


def inductor_behind_rewrites(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """What ``torch.compile(model, backend="se_fx")`` calls with each graph that Dynamo captures.

    Where weights are frozen, which is Inductor's setting ``freezing`` with gradients off, the rewrites of
    `se_fx.optimize_for_inference` are applied, and the result goes to Inductor. All other graphs, those for training among
    them, go to Inductor as they are. Weights that are changed afterwards, other than through ``.data``, are seen: the graph
    then runs as it was captured, uncompiled, with a warning. What was done is logged by ``logging.getLogger("se_fx")``.

    Args:
        graph_module: the graph.
        example_inputs: what it is called with.
        mode: as of `torch.compile`.
        options: as of `torch.compile` with its own backend: Inductor's settings.
    """
    from torch._inductor import config, list_mode_options  # seconds, and not needed by who doesn't compile
    from torch._inductor.compile_fx import compile_fx

    compiler = cast("Callable[..., Callable[..., Any]]", compile_fx)
    patches = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    is_frozen = patches.get("freezing", config.freezing) and not torch.is_grad_enabled()
    if not is_frozen or _switches_modes(graph_module.graph):
        return compiler(graph_module, list(example_inputs), config_patches=patches)
    with torch.inference_mode(False), torch.no_grad(), collector_paused(), without_autocast():
        algebra, inputs = _frozen(graph_module, example_inputs)
        attributes = [algebra.evaluation.attribute(node) for node in algebra.graph.nodes if node.op == "get_attr"]
        constants = [t for t in attributes if isinstance(t, Tensor) and not algebra.evaluation.is_changed(t)]
        steps = tuple(Step(name, tuple(apply_rewrite(rewrite, algebra))) for name, rewrite in REWRITES.items())
        algebra.module.recompile()
    optimization, size = Optimization("a graph", steps), len(graph_module.graph.nodes)
    _logger.info("backend se_fx: a graph of %d nodes, rewritten in %d places", size, optimization.count())
    _logger.debug("%s", optimization)
    compiled = compiler(algebra.module, [example_inputs[place] for place in inputs], config_patches=patches)
    return _watched(compiled, graph_module, inputs, example_inputs, constants)


def _switches_modes(graph: fx.Graph) -> bool:
    """Whether a graph has statements, such as those that enter and leave autocast: calls that yield nothing."""
    return any(node.op.startswith("call_") and "example_value" not in node.meta for node in graph.nodes)


def _frozen(captured: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[Algebra, list[int]]:
    """A graph to be rewritten, in which parameters and buffers that nothing writes to are attributes; its inputs' places."""
    places = dict(enumerate(node for node in captured.graph.nodes if node.op == "placeholder"))
    state = {place: node.name for place, node in places.items() if _is_state(node, example_inputs[place])}
    while True:
        # A graph module of its own: Dynamo's has notes on where each attribute was found, which new ones weren't.
        rewritten = fx.GraphModule(captured, copied(captured.graph)[0])
        rewritten.meta = captured.meta
        inputs = [node for node in rewritten.graph.nodes if node.op == "placeholder"]
        for place, name in state.items():
            value = example_inputs[place]
            setattr(rewritten, name, value if isinstance(value, nn.Parameter) else nn.Buffer(value))
            with rewritten.graph.inserting_before(inputs[place]):
                attribute = rewritten.graph.get_attr(name)
            attribute.meta = {"example_value": inputs[place].meta["example_value"]}
            inputs[place].replace_all_uses_with(attribute)
            rewritten.graph.erase_node(inputs[place])
        for node in rewritten.graph.nodes:
            note_size(node, node.meta.get("example_value"))
        algebra = Algebra(rewritten)
        written = {place for place in state if algebra.evaluation.is_changed(example_inputs[place])}
        if not written:
            break
        state = {place: name for place, name in state.items() if place not in written}
    for place in state:
        _guard(places[place])
    return algebra, [place for place in places if place not in state]


def _is_state(node: fx.Node, value: Any) -> bool:
    """Whether an input is one of the model's parameters and buffers."""
    is_static = "_dynamo_static_input_type" in node.meta.get("tensor_dict", {}) and "example_value" in node.meta
    return is_static and isinstance(value, Tensor) and not isinstance(value, FakeTensor)


def _guard(node: fx.Node) -> None:
    """Have Dynamo compile anew for another tensor in this input's place, such as another model's of the same class."""
    from torch._dynamo.guards import GuardBuilder

    context, source = torch._guards.TracingContext.try_get(), getattr(node, "_dynamo_source", None)
    if context is not None and source is not None:
        context.guards_context.dynamo_guards.add(source.make_guard(GuardBuilder.ID_MATCH))


def _watched(
    compiled: Callable[..., Any],
    captured: fx.GraphModule,
    inputs: list[int],
    example_inputs: Sequence[Any],
    constants: list[Tensor],
) -> Callable[..., Any]:
    """What runs `compiled` while weights are as they were, and `captured` afterwards."""
    given = set(inputs)
    places = [place for place in range(len(example_inputs)) if place not in given]
    state = [example_inputs[place] for place in places]
    constants = [tensor for tensor in constants if not tensor.is_inference()]  # which have no versions
    versions = [tensor._version for tensor in constants]
    stale = False

    def run(*args: Any) -> Any:
        nonlocal stale
        is_same = all(map(operator.is_, (args[place] for place in places), state))
        if is_same and [tensor._version for tensor in constants] == versions:
            return compiled(*[args[place] for place in inputs])
        if not stale:
            stale = True
            _logger.warning(
                "weights were changed after they were frozen: what was compiled for them is not used any more, and the graph "
                "runs uncompiled. torch._dynamo.reset() has it compiled again"
            )
        return captured(*args)

    return run
