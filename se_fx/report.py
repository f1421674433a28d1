"""Reports: what was inserted where, what it adds, what was skipped and why. Knows nothing of how costs are computed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from se_fx.cost import Cost
from se_fx.plan import Site, Skip, percent, site_table

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """What `transform` did to a model. `print` it, or read its parts.

    Attributes:
        model: class of the original model.
        sites: the inserted blocks, in the order of the model's modules.
        skipped: the other Conv2d layers, each with the reason.
        base: cost of the original model; its parameters alone without example inputs.
        added: cost of all inserted blocks; their parameters alone without example inputs.
        measured: whether MACs, FLOPs and bytes were counted on example inputs.
        opaque: the parts that run their own code, with the reason; empty where the whole model is one graph.
        alone: the convs that code calls which is no graph, each captured alone.
        regions: qualified names of the modules that run graphs; the root's is the empty name.
        uncounted: operators that no cost rule covers, with the number of their calls; their FLOPs count as 0.
    """

    model: str
    sites: tuple[Site, ...]
    skipped: tuple[Skip, ...]
    base: Cost
    added: Cost
    measured: bool = False
    opaque: tuple[tuple[str, str], ...] = ()
    alone: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    uncounted: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        paragraphs = [
            self._headline(),
            self._table(),
            self._totals(),
            self._unreached(),
            self._skips(),
            self._capture(),
            self._rules(),
        ]
        return "\n\n".join(filter(None, paragraphs))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)

    def _headline(self) -> str:
        if not self.sites:
            return f"{self.model}: no Squeeze-and-Excitation block was inserted."
        return f"{self.model}: {len(self.sites)} Squeeze-and-Excitation block{_s(self.sites)} inserted."

    def _table(self) -> str:
        return site_table(self.sites, self.base if self.measured else None) if self.sites else ""

    def _totals(self) -> str:
        rows = [("parameters", self.base.params, self.added.params, percent(self.added.params, self.base.params))]
        if self.measured:
            for name in ("macs", "flops", "bytes"):
                base, added = getattr(self.base, name), getattr(self.added, name)
                label = {"macs": "MACs (conv and linear)", "flops": "FLOPs (all operators)", "bytes": "bytes moved"}[name]
                rows.append((label, base, added, percent(added, base)))
        table = tabulate(rows, ["", "model", "added", "overhead"], intfmt=",", colalign=("left", "right", "right", "right"))
        hint = "" if self.measured else "\nPass example_inputs to see MACs, FLOPs, bytes and spatial sizes too."
        return table + hint

    def _unreached(self) -> str:
        if not self.measured:
            return ""
        names = [site.name for site in self.sites if site.spatial is None]
        return f"Not reached by the example inputs in eval mode: {', '.join(names)}." if names else ""

    def _skips(self) -> str:
        if not self.skipped:
            return ""
        by_reason: dict[str, list[str]] = {}
        for skip in self.skipped:
            reason = skip.reason.split("output channels ")[-1]
            by_reason.setdefault(f"output channels {reason}" if reason != skip.reason else reason, []).append(skip.name)
        rows = [(reason, len(names), _some(names)) for reason, names in by_reason.items()]
        return f"Skipped {len(self.skipped)} Conv2d layer{_s(self.skipped)}:\n" + tabulate(rows, ["reason", "layers", "which"])

    def _capture(self) -> str:
        if not self.opaque:
            return ""
        graphs = _some([name or "the root" for name in self.regions]) if self.regions else "none"
        rows = [(name or "(the root)", reason) for name, reason in self.opaque]
        alone = f"\nConvs that such code calls, captured alone: {_some(list(self.alone))}." if self.alone else ""
        return f"Graph regions: {graphs}.\nThese run their own code:\n{tabulate(rows, ['module', 'reason'])}{alone}"

    def _rules(self) -> str:
        if not self.uncounted:
            return ""
        return "Operators without a cost rule, counted as 0 FLOPs: " + ", ".join(f"{n} ({c})" for n, c in self.uncounted) + "."


def _some(names: list[str]) -> str:
    shown = names[:3]
    return ", ".join(shown) + (f", and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _s(things: Any) -> str:
    return "" if len(things) == 1 else "s"
