"""Tables of sites, for plans and reports."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tabulate import tabulate

from se_fx.cost import Cost
from se_fx.planning.site import Site

__all__ = ["percent", "site_table"]


def site_table(sites: Iterable[Site], base: Cost | None) -> str:
    """One row for each site; with the model's own cost given, MACs too and their share of the model's; scores, if any."""
    sites = tuple(sites)
    columns: dict[str, list[Any]] = {"conv": [site.name for site in sites]}
    for name, usual in (("placement", "conv"), ("block", None)):
        if any(getattr(site, name) != usual for site in sites):
            columns[name] = [getattr(site, name) or "SqueezeExcite2d" for site in sites]
    words = len(columns)
    columns["channels"] = [site.channels for site in sites]
    columns["hidden"] = [site.latent_channels or "-" for site in sites]
    if base is not None:
        columns["spatial"] = ["x".join(map(str, site.spatial)) if site.spatial else "-" for site in sites]
    columns["parameters"] = [site.cost.params for site in sites]
    if base is not None:
        columns["MACs"] = [site.cost.macs for site in sites]
        columns["of model"] = [percent(site.cost.macs, base.macs) for site in sites]
    if any(site.score is not None for site in sites):
        columns["score"] = ["-" if site.score is None else f"{site.score:.3g}" for site in sites]
    align = [*["left"] * words, *["right"] * (len(columns) - words)]
    return tabulate(columns, headers="keys", intfmt=",", colalign=align)


def percent(part: int, whole: int) -> str:
    """`part` of `whole`, for people."""
    return f"{100 * part / whole:.3f} %" if whole else "-"
