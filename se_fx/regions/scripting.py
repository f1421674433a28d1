"""Scripting: what `torch.jit.script` compiles in place of a module whose class was made for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import fx, nn

from se_fx.errors import SqueezeExciteError
from se_fx.regions.forwards import EXCITE

__all__ = ["scripted_view"]


def scripted_view(module: nn.Module, name: str, graphs: Mapping[bool, fx.Graph]) -> fx.GraphModule:
    """A graph of `module`, that of the mode it can be run in if there is but one, over modules of their own classes.

    Args:
        module: the module.
        name: that of its class.
        graphs: its graphs, by `training`.

    Raises:
        SqueezeExciteError: the graphs of the modes differ, or there are none.
    """
    runnable = {graph for graph in graphs.values() if not _refuses(graph)}
    if len(runnable) != 1:
        raise SqueezeExciteError(
            f"{name} can't be scripted: "
            + ("its code differs between training and evaluation" if runnable else "it scales values in its own code")
            + "; script fx.GraphModule(gm, gm.graph), gm = se_fx.transform(model), or use torch.jit.trace or torch.export"
        )
    (graph,) = runnable
    plain = fx.Graph(tracer_cls=graph._tracer_cls)
    plain.output(plain.graph_copy(graph, {}))
    scaling = [node for node in plain.nodes if EXCITE in node.kwargs]
    for node in scaling:
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != EXCITE}
    made = fx.GraphModule(module, plain)
    for node in scaling:
        scaling_itself: Any = module.get_submodule(str(node.target))
        own = object.__new__(scaling_itself._own_class)
        own.__dict__.update(scaling_itself.__dict__)
        made.set_submodule(str(node.target), own)
    return made


def _refuses(graph: fx.Graph) -> bool:
    """Whether a graph calls what never returns."""
    return any(getattr(node.target, "__annotations__", {}).get("return") in (NoReturn, "NoReturn") for node in graph.nodes)
