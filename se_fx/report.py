"""Reports: what was inserted where, what it adds, what was skipped and why. Knows nothing of how costs are computed."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate

from se_fx.arguments import as_path
from se_fx.cost import NO_COST, Cost, Operator
from se_fx.errors import SqueezeExciteError
from se_fx.plan import Site, Skip, percent, site_table
from se_fx.roofline import Machine
from se_fx.stages import in_order, stages

__all__ = ["Estimate", "Report"]

_LONG = 20  # sites, from which a table by stage says more


@dataclass(frozen=True)
class Estimate:
    """Latencies by a roofline: no measurement, see `se_fx.roofline`.

    Attributes:
        machine: the rates it is for.
        base: seconds for the original model.
        added: seconds that all blocks add.
    """

    machine: Machine
    base: float
    added: float

    def __str__(self) -> str:
        rates = f"{self.machine.flops_per_second / 1e9:,.0f} GFLOP/s, {self.machine.bytes_per_second / 1e9:,.1f} GB/s"
        return (
            f"Estimated, not measured, from {rates} ({self.machine.device}, {self.machine.dtype}), every operator on its own: "
            f"{1e3 * self.base:.3g} ms, and {1e3 * self.added:.3g} ms more with the blocks ({self.added / self.base:+.1%})."
        )


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
        activation_bytes: bytes that autograd keeps for backward in training, in the original model and with the blocks; None
            without example inputs, or where the model can't be called with these in training mode.
        operators: all operators that ran, for `estimate`.
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
    activation_bytes: tuple[int, int] | None = None
    operators: tuple[Operator, ...] = field(default=(), repr=False, compare=False)

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
        return dataclasses.asdict(dataclasses.replace(self, operators=()))

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page that needs nothing else: numbers, the network drawn with its blocks, a sortable table of sites.

        Needs matplotlib: ``pip install 'se_fx[html]'``.

        Raises:
            SqueezeExciteError: `path` is none, or matplotlib isn't installed.
        """
        from se_fx.html import render

        as_path("path", path).write_text(render(self), encoding="utf-8")

    def _repr_html_(self) -> str | None:
        """What notebooks show; None, so that they show the text, without matplotlib."""
        try:
            from se_fx.html import fragment

            return fragment(self)
        except SqueezeExciteError:
            return None

    def estimate(self, machine: Machine) -> Estimate:
        """Latency by a roofline, from two rates of a machine: see `se_fx.measure_machine`.

        Raises:
            SqueezeExciteError: `machine` is none, or this report was made without example inputs.
        """
        if not isinstance(machine, Machine):
            raise SqueezeExciteError(f"machine={type(machine).__name__}: expected what se_fx.measure_machine() returns")
        if not self.operators:
            raise SqueezeExciteError("estimate: this report has no costs; pass example_inputs to se_fx.report")
        return Estimate(
            machine,
            base=machine.seconds(each for each in self.operators if each.part is None),
            added=machine.seconds(each for each in self.operators if each.part is not None),
        )

    def skipped_by_reason(self) -> dict[str, list[Skip]]:
        """Convs without a block by the reason, in which their own number of channels is left out."""
        groups: dict[str, list[Skip]] = {}
        for skip in self.skipped:
            groups.setdefault(skip.reason.removeprefix(f"{skip.channels} "), []).append(skip)
        return groups

    def table(self) -> str:
        """One row for each site."""
        return site_table(self.sites, self.base if self.measured else None)

    def _headline(self) -> str:
        if not self.sites:
            return f"{self.model}: no Squeeze-and-Excitation block was inserted."
        return f"{self.model}: {len(self.sites)} Squeeze-and-Excitation block{_s(self.sites)} inserted."

    def _table(self) -> str:
        if not self.sites:
            return ""
        return self.table() if len(self.sites) <= _LONG else self._by_stage()

    def _by_stage(self) -> str:
        """One row for each stage, for models with many sites."""
        by_name = {site.name: site for site in self.sites}
        rows = []
        for stage, names in stages(in_order(by_name, [skip.name for skip in self.skipped])).items():
            sites = [by_name[name] for name in names if name in by_name]
            cost = sum((site.cost for site in sites), NO_COST)
            channels = sorted({site.channels for site in sites})
            span = f"{channels[0]:,} to {channels[-1]:,}" if len(channels) > 1 else "".join(map(str, channels))
            row = [stage, f"{len(sites)} of {len(names)}", span, cost.params]
            rows.append([*row, cost.macs, cost.bytes, percent(cost.bytes, self.base.bytes)] if self.measured else row)
        headers = ["stage", "blocks, of convs", "channels", "parameters"]
        headers += ["MACs", "bytes moved", "of model"] if self.measured else []
        align = ["left", *["right"] * (len(headers) - 1)]
        return tabulate(rows, headers, intfmt=",", colalign=align) + "\nSite by site: report.table()"

    def _totals(self) -> str:
        rows = [_row("parameters", self.base.params, self.added.params)]
        if self.measured:
            rows += [
                _row("MACs (conv and linear)", self.base.macs, self.added.macs),
                _row("FLOPs", self.base.flops, self.added.flops),
                _row("- of MACs, two each", 2 * self.base.macs, 2 * self.added.macs),
                _row("- of all else", self.base.flops - 2 * self.base.macs, self.added.flops - 2 * self.added.macs),
                _row("bytes moved", self.base.bytes, self.added.bytes),
                ("FLOPs per byte", _intensity(self.base), _intensity(self.added), ""),
            ]
        if self.activation_bytes:
            before, after = self.activation_bytes
            rows.append(_row("bytes kept for backward", before, after - before))
        align = ("left", "right", "right", "right")
        table = tabulate(rows, ["", "model", "added", "overhead"], disable_numparse=True, colalign=align)
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
        rows = [
            (reason, len(skips), _some([skip.name for skip in skips])) for reason, skips in self.skipped_by_reason().items()
        ]
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


def _row(name: str, base: int, added: int) -> tuple[str, str, str, str]:
    return name, f"{base:,}", f"{added:,}", percent(added, base)


def _intensity(cost: Cost) -> str:
    return f"{cost.flops / cost.bytes:.1f}" if cost.bytes else "-"


def _some(names: list[str]) -> str:
    shown = names[:3]
    return ", ".join(shown) + (f", and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _s(things: Any) -> str:
    return "" if len(things) == 1 else "s"
