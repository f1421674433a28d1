"""What optimising did to a model, for inference or for training, as text and JSON. Knows nothing of graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate
from torch import fx, nn

from se_fx.cost import NO_COST, Cost
from se_fx.regions import graphs_of
from se_fx.rewrites.change import Change
from se_fx.rewrites.training import is_training_call

__all__ = ["Optimization", "Step", "give_optimization", "optimization_of"]

_ATTRIBUTES = {"inference": "_optimization", "training": "_training_optimization"}  # of an optimised model
_SHOWN = 4  # places of one kind, before the rest is counted


@dataclass(frozen=True)
class Step:
    """What one rewrite did.

    Attributes:
        rewrite: its name.
        changes: what was done, or why nothing was, place by place.
        saved: what that saves in a call, negative where it adds; None without example inputs, and in training.
        kept_less: bytes that autograd keeps less for backward; None without example inputs, and in inference.
    """

    rewrite: str
    changes: tuple[Change, ...]
    saved: Cost | None = None
    kept_less: int | None = None


@dataclass(frozen=True)
class Optimization:
    """What was done to a model. `print` it, or read its parts.

    Attributes:
        model: class of the model.
        steps: the rewrites, in the order they were applied in.
        before: cost of the model as it was, in eager mode; None without example inputs.
        opaque: the parts that run their own code and were not looked into, each with the reason.
        purpose: "inference" or "training".
        kept: bytes that autograd kept for backward before; None without example inputs, and in inference.
    """

    model: str
    steps: tuple[Step, ...]
    before: Cost | None = None
    opaque: tuple[tuple[str, str], ...] = ()
    purpose: str = "inference"
    kept: int | None = None

    def __str__(self) -> str:
        headline = f"{self.model}, optimised for {self.purpose}: rewritten in {self.count()} places."
        parts = [headline, self._table(), self._places("Done", True), self._places("Not done", False)]
        return "\n\n".join(filter(None, (*parts, self._opaque())))

    def count(self) -> int:
        """In how many places anything was done."""
        return sum(change.applied for step in self.steps for change in step.changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)

    def _table(self) -> str:
        rows: list[list[Any]] = []
        for step in self.steps:
            applied = sum(change.applied for change in step.changes)
            saved = [f"{each:,}" for each in step.saved.astuple()] if step.saved is not None else []
            rows.append([step.rewrite, applied, len(step.changes) - applied, *saved])
        headers = ["rewrite", "done", "not done"]
        if self.before is not None:
            headers += ["parameters saved", "MACs saved", "FLOPs saved", "bytes saved"]
            total = sum((step.saved for step in self.steps if step.saved is not None), NO_COST)
            shares = zip(total.astuple(), self.before.astuple(), strict=True)
            rows.append(["all, of the model's", "", "", *(f"{saved / of:.2%}" if of else "" for saved, of in shares)])
        if self.kept is not None:
            headers += ["bytes kept less"]
            rows = [[*row, f"{step.kept_less or 0:,}"] for row, step in zip(rows, self.steps, strict=True)]
            less = sum(step.kept_less or 0 for step in self.steps)
            rows.append([f"all, of {self.kept:,} bytes", "", "", f"{less / self.kept:.2%}" if self.kept else ""])
        return tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1)))

    def _places(self, title: str, applied: bool) -> str:
        lines = []
        for step in self.steps:
            changes = [change for change in step.changes if change.applied is applied]
            lines += [f"  {step.rewrite}: {change.place}: {change.detail}" for change in changes[:_SHOWN]]
            if len(changes) > _SHOWN:
                lines.append(f"  {step.rewrite}: and {len(changes) - _SHOWN} more")
        return "\n".join([f"{title} (all of it is in `steps`):", *lines]) if lines else ""

    def _opaque(self) -> str:
        lines = [f"  {name or 'the model itself'}: {reason}" for name, reason in self.opaque[:_SHOWN]]
        lines += [f"  and {len(self.opaque) - _SHOWN} more"] if len(self.opaque) > _SHOWN else []
        return "\n".join(["Run their own code, and were not looked into:", *lines]) if lines else ""


def optimization_of(model: nn.Module, purpose: str = "inference") -> Optimization | None:
    """What was done to `model` for this purpose; None where it isn't such an optimised one, or no more."""
    found = model.__dict__.get(_ATTRIBUTES[purpose])
    if not isinstance(found, Optimization):
        return None
    is_so = purpose == "inference" or not found.count() or any(map(is_training_call, _nodes(model)))
    return found if is_so else None


def _nodes(model: nn.Module) -> Iterator[fx.Node]:
    for module in model.modules():
        for graph in (graphs_of(module) or {}).values():
            yield from graph.nodes


def give_optimization(model: nn.Module, optimization: Optimization) -> None:
    """Have `model` carry the record of what was done to it."""
    model.__dict__[_ATTRIBUTES[optimization.purpose]] = optimization
