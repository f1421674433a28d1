"""New parameters for optimizers that are in use already."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from se_fx.errors import SqueezeExciteError

__all__ = ["Joining", "as_optimizers"]


def as_optimizers(optimizers: Any) -> tuple[Optimizer, ...]:
    """One optimizer, several, or None as a tuple.

    Raises:
        SqueezeExciteError: something else.
    """
    given = () if optimizers is None else (optimizers,) if isinstance(optimizers, Optimizer) else optimizers
    given = tuple(given) if isinstance(given, Iterable) else (given,)
    for optimizer in given:
        if not isinstance(optimizer, Optimizer):
            raise SqueezeExciteError(
                f"optimizers: expected a torch.optim.Optimizer, or several, and got {type(optimizer).__name__}"
            )
    return given


class Joining:
    """Decides which parameter group each new module's parameters join, and does it when all else has succeeded.

    They join the group that holds a parameter of the module they belong to; where none does, the first group of the
    first optimizer.

    Args:
        optimizers: the optimizers.
        pairs: the new module's qualified name, the module that it belongs to, and the new module.
    """

    def __init__(self, optimizers: Sequence[Optimizer], pairs: Iterable[tuple[str, nn.Module, nn.Module]]) -> None:
        self.joins: list[tuple[Optimizer, dict[str, Any], list[str], list[nn.Parameter]]] = []
        groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
        self.before = [
            (group[key], len(group[key])) for _, group in groups for key in ("params", "param_names") if key in group
        ]
        homes = {id(parameter): home for home in reversed(groups) for parameter in home[1]["params"]}
        for prefix, old, new in pairs if groups else ():
            home = next((homes[id(p)] for p in old.parameters() if id(p) in homes), groups[0])
            named = dict(new.named_parameters(prefix))
            self.joins.append((*home, list(named), list(named.values())))

    def apply(self) -> None:
        """Let them join."""
        for optimizer, group, names, parameters in self.joins:
            group["params"].extend(parameters)
            if "param_names" in group:  # of an optimizer made from named_parameters()
                group["param_names"].extend(names)
            if type(optimizer).__module__.startswith("torch.optim") and optimizer.state:
                # Some (Adagrad) make a parameter's state when they are constructed, not in the first step.
                accepted = inspect.signature(type(optimizer)).parameters
                settings = {name: value for name, value in group.items() if name in accepted and name != "params"}
                optimizer.state.update(type(optimizer)(parameters, **settings).state)

    def undo(self) -> None:
        """Let them leave, whether or not they have joined."""
        for members, number in self.before:
            del members[number:]
        for optimizer, _, _, parameters in self.joins:
            for parameter in parameters:
                optimizer.state.pop(parameter, None)
