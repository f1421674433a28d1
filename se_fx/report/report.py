"""Reports: what was inserted where, what it adds, what was skipped and why. Knows nothing of how costs are computed."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from se_fx.arguments import as_path
from se_fx.cost import Machine
from se_fx.errors import SqueezeExciteError
from se_fx.planning import Skip, site_table
from se_fx.report.facts import Facts, by_reason
from se_fx.report.html import fragment, render
from se_fx.report.text import text

__all__ = ["Estimate", "Report"]


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
class Report(Facts):
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
        activation_bytes_optimized: and with the blocks, optimised by `optimize_for_training`; None as above.
        excerpt: the first residual unit with a block, or what is around the first block, step by step; empty without example
            inputs, or where no graph has a block.
        operators: all operators that ran, for `estimate`.
    """

    def __str__(self) -> str:
        return text(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(dataclasses.replace(self, operators=()))

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page that needs nothing else: numbers, the network drawn with its blocks, a sortable table of sites.

        Needs matplotlib: ``pip install 'se_fx[html]'``.

        Raises:
            SqueezeExciteError: `path` is none, or matplotlib isn't installed.
        """
        as_path("path", path).write_text(render(self), encoding="utf-8")

    def _repr_html_(self) -> str | None:
        """What notebooks show; None, so that they show the text, without matplotlib."""
        try:
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
        return by_reason(self.skipped)

    def table(self) -> str:
        """One row for each site."""
        return site_table(self.sites, self.base if self.measured else None)
