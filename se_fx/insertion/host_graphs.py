"""Host graphs: a module's own code as graphs in which its children are called, aligned with its calls in a flat graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from se_fx.capture import Call, Region, Tracing, Untraceable

__all__ = ["HostGraphs", "host_graphs"]


@dataclass(frozen=True)
class HostGraphs:
    """The graphs of a module's own code.

    Attributes:
        graphs: by `training`.
        steps: likewise, the nodes for what the code did, in its order.
        constants: tensors that the code makes, by the attribute names that the graphs use.
    """

    graphs: dict[bool, fx.Graph]
    steps: dict[bool, list[fx.Node]]
    constants: dict[str, Tensor]

    def value(self, training: bool, which: int | str) -> fx.Node:
        """The node of a step, or of an input, by position or name."""
        if isinstance(which, int):
            return self.steps[training][which]
        inputs = [node for node in self.graphs[training].nodes if node.op == "placeholder"]
        named: fx.Node = inputs[int(which)] if which.isdecimal() else next(node for node in inputs if node.target == which)
        return named


def host_graphs(region: Region, path: str) -> HostGraphs | None:
    """The graphs of the code of one module in a region; None where it can't be traced alone, or does other things then."""
    module = region.module.get_submodule(path)
    try:
        tracing = Tracing(module, {module}, (True, False))
        graphs = tracing.graphs()
    except Untraceable:
        return None
    steps: dict[bool, list[fx.Node]] = {}
    for training, graph in graphs.items():
        steps[training] = [step for step in tracing.calls[graph].steps if isinstance(step, fx.Node)]
        flat = (region.graphs or {})[training]
        for call in _calls_of(path, region.calls[flat]):
            if [_seen(step, path) for step in call.steps] != [_seen(step, "") for step in steps[training]]:
                return None
    return HostGraphs(graphs, steps, tracing.constants)


def _calls_of(path: str, call: Call) -> list[Call]:
    own = [call] if call.path == path else []
    return own + [found for step in call.steps if isinstance(step, Call) for found in _calls_of(path, step)]


def _seen(step: fx.Node | Call, path: str) -> tuple[str, str]:
    """What a step does, as its host sees it."""
    if isinstance(step, fx.Node) and step.op != "call_module":
        return step.op, str(step.target)
    name = step.path if isinstance(step, Call) else str(step.target)
    return "call_module", name.removeprefix(f"{path}.") if path else name
