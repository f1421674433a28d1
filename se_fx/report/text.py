"""Text: a report as `print` shows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from tabulate import tabulate

from se_fx.cost import NO_COST, Cost
from se_fx.names import stages
from se_fx.planning import Site, percent, site_table
from se_fx.report.facts import Facts, by_reason
from se_fx.report.stages import in_order, ranges

__all__ = ["text"]

_LONG = 20  # sites, from which a second table, by stage, helps
_MOST = 256  # sites, beyond which names are folded into ranges


def text(facts: Facts) -> str:
    """What was inserted, block by block; what that adds; what was skipped, and why."""
    parts = (_headline, _table, _by_stage, _totals, _unreached, _skips, _capture, _rules)
    return "\n\n".join(filter(None, (part(facts) for part in parts)))


def _headline(facts: Facts) -> str:
    if not facts.sites:
        return f"{facts.model}: no Squeeze-and-Excitation block was inserted."
    return f"{facts.model}: {len(facts.sites)} Squeeze-and-Excitation block{_s(facts.sites)} inserted."


def _table(facts: Facts) -> str:
    """One row for each block; those of very many in ranges, of like blocks."""
    sites = facts.sites if len(facts.sites) <= _MOST else _in_ranges(facts.sites)
    return site_table(sites, facts.base if facts.measured else None) if sites else ""


def _by_stage(facts: Facts) -> str:
    """One row for each stage, of models with many sites."""
    if len(facts.sites) <= _LONG:
        return ""
    by_name = {site.name: site for site in facts.sites}
    rows = []
    for stage, names in stages(in_order(by_name, [skip.name for skip in facts.skipped])).items():
        sites = [by_name[name] for name in names if name in by_name]
        cost = sum((site.cost for site in sites), NO_COST)
        channels = sorted({site.channels for site in sites})
        span = f"{channels[0]:,} to {channels[-1]:,}" if len(channels) > 1 else "".join(f"{each:,}" for each in channels)
        row = [stage, f"{len(sites)} of {len(names)}", span, cost.params]
        rows.append([*row, cost.macs, cost.bytes, percent(cost.bytes, facts.base.bytes)] if facts.measured else row)
    headers = ["stage", "blocks, of convs", "channels", "parameters"]
    headers += ["MACs", "bytes moved", "of model"] if facts.measured else []
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(rows, headers, intfmt=",", colalign=align)


def _totals(facts: Facts) -> str:
    rows = [_row("parameters", facts.base.params, facts.added.params)]
    if facts.measured:
        rows += [
            _row("MACs (conv and linear)", facts.base.macs, facts.added.macs),
            _row("FLOPs", facts.base.flops, facts.added.flops),
            _row("- of MACs, two each", 2 * facts.base.macs, 2 * facts.added.macs),
            _row("- of all else", facts.base.flops - 2 * facts.base.macs, facts.added.flops - 2 * facts.added.macs),
            _row("bytes moved", facts.base.bytes, facts.added.bytes),
            ("FLOPs per byte", _intensity(facts.base), _intensity(facts.added), ""),
        ]
    if facts.activation_bytes:
        before, after = facts.activation_bytes
        rows.append(_row("bytes kept for backward", before, after - before))
        if facts.activation_bytes_optimized is not None:
            rows.append(_row("- optimized", before, facts.activation_bytes_optimized - before))
    align = ("left", "right", "right", "right")
    table = tabulate(rows, ["", "model", "added", "overhead"], disable_numparse=True, colalign=align)
    hint = "" if facts.measured else "\nPass example_inputs to see MACs, FLOPs, bytes and spatial sizes too."
    return table + hint


def _unreached(facts: Facts) -> str:
    if not facts.measured:
        return ""
    names = [site.name for site in facts.sites if site.spatial is None]
    return f"Not reached by the example inputs in eval mode: {', '.join(names)}." if names else ""


def _skips(facts: Facts) -> str:
    if not facts.skipped:
        return ""
    rows = [(reason, len(skips), _some([skip.name for skip in skips])) for reason, skips in by_reason(facts.skipped).items()]
    return f"Skipped {len(facts.skipped)} Conv2d layer{_s(facts.skipped)}:\n" + tabulate(rows, ["reason", "layers", "which"])


def _capture(facts: Facts) -> str:
    if not facts.opaque:
        return ""
    graphs = _some([name or "the root" for name in facts.regions]) if facts.regions else "none"
    rows = [(name or "(the root)", reason) for name, reason in facts.opaque]
    alone = f"\nConvs that such code calls, captured alone: {_some(list(facts.alone))}." if facts.alone else ""
    return f"Graph regions: {graphs}.\nThese run their own code:\n{tabulate(rows, ['module', 'reason'])}{alone}"


def _rules(facts: Facts) -> str:
    if not facts.uncounted:
        return ""
    return "Operators without a cost rule, counted as 0 FLOPs: " + ", ".join(f"{n} ({c})" for n, c in facts.uncounted) + "."


def _in_ranges(sites: Iterable[Site]) -> list[Site]:
    """Blocks that differ in one number of their name alone as one, with the cost of all."""
    alike: dict[Site, list[Site]] = {}
    for site in sites:
        alike.setdefault(dataclasses.replace(site, name=""), []).append(site)
    rows: dict[str, Site] = {}
    for site, members in alike.items():
        for name, names in ranges(member.name for member in members).items():
            cost = sum((site.cost for _ in names), NO_COST)
            label = f"{name}, {len(names)} blocks" if len(names) > 1 else name
            rows |= {first: dataclasses.replace(site, name=label, cost=cost) for first in names[:1]}
    return [rows[site.name] for site in sites if site.name in rows]


def _row(name: str, base: int, added: int) -> tuple[str, str, str, str]:
    return name, f"{base:,}", f"{added:,}", percent(added, base)


def _intensity(cost: Cost) -> str:
    return f"{cost.flops / cost.bytes:.1f}" if cost.bytes else "-"


def _some(names: list[str]) -> str:
    shown = names[:3]
    return ", ".join(shown) + (f", and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _s(things: Any) -> str:
    return "" if len(things) == 1 else "s"
