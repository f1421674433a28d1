"""Reports as HTML: one page that needs nothing else, or a part of one for notebooks. What it looks like is in `templates/`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from se_fx.planning import Site, percent
from se_fx.report import charts
from se_fx.report.facts import Facts, by_reason

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["fragment", "render"]

_NONE = "\N{EN DASH}"
_MEASURES = {"macs": "MACs", "flops": "FLOPs", "bytes": "Bytes moved"}


def render(report: Facts) -> str:
    """`report` as a page of its own, complete without network access and without JavaScript.

    Names in the report may be anything, and are escaped.

    Raises:
        SqueezeExciteError: matplotlib isn't installed.
    """
    return _environment().get_template("page.html").render(_content(report))


def fragment(report: Facts) -> str:
    """The same as part of another page, such as a notebook: a `<div class="se-fx">` that styles nothing but itself.

    Raises:
        SqueezeExciteError: matplotlib isn't installed.
    """
    return _environment().get_template("fragment.html").render(_content(report))


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("se_fx.report")
    return Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)


def _content(report: Facts) -> dict[str, Any]:
    """What the templates show. Charts alone are markup."""
    from markupsafe import Markup

    return {
        "report": report,
        "headline": f"{len(report.sites) or 'no'} Squeeze-and-Excitation block{'s' * (len(report.sites) != 1)} inserted",
        "cards": _cards(report),
        "network": Markup(charts.network(report)),
        "unit": Markup(charts.unit(report)) if report.excerpt else None,
        "costs": Markup(charts.costs(report)) if report.sites else None,
        "columns": _columns(report),
        "unreached": [site.name for site in report.sites if report.measured and site.spatial is None],
        "skipped": by_reason(report.skipped),
    }


# ------------------------------------------------------------------------------------------------------------------- cards
@dataclass(frozen=True)
class _Card:
    label: str
    value: str
    rows: dict[str, int]


def _cards(report: Facts) -> list[_Card]:
    blocks, without = len(report.sites), len(report.skipped)
    cards = [_Card("Blocks", f"{blocks:,}", {"Conv2d layers": blocks + without, "without a block": without})]
    for measure, label in {"params": "Parameters", **(_MEASURES if report.measured else {})}.items():
        cards.append(_overhead(label, getattr(report.base, measure), getattr(report.added, measure)))
    if report.activation_bytes is not None:
        before, after = report.activation_bytes
        cards.append(_overhead("Activation bytes", before, after - before))
        if report.activation_bytes_optimized is not None:
            cards.append(_overhead("Activation bytes, optimized", before, report.activation_bytes_optimized - before))
    return cards


def _overhead(label: str, base: int, added: int) -> _Card:
    share = f"{'+' * (added >= 0)}{percent(added, base)}" if base else _NONE
    return _Card(label, share, {"model": base, "added": added})


# ------------------------------------------------------------------------------------------------------------------- table
@dataclass(frozen=True)
class _Column:
    """A column of the table of sites: the text of each cell, and for numbers what to sort by."""

    header: str
    cells: list[str]
    keys: list[float] | None = None


def _columns(report: Facts) -> list[_Column]:
    sites = report.sites
    columns = [
        _Column("Conv", [site.name for site in sites]),
        _Column("Placement", [site.placement for site in sites]),
    ]
    if any(site.block for site in sites):
        columns.append(_Column("Block", [site.block or "SqueezeExcite2d" for site in sites]))
    columns.append(_numbers("Channels", (site.channels for site in sites)))
    columns.append(_numbers("Hidden", (site.latent_channels for site in sites)))
    if report.measured:
        columns.append(_spatial(sites))
    columns.append(_numbers("Parameters", (site.cost.params for site in sites)))
    if report.measured:
        columns += [_numbers(name, (getattr(site.cost, key) for site in sites)) for key, name in _MEASURES.items()]
        macs, whole = [site.cost.macs for site in sites], report.base.macs
        columns.append(_Column("MACs of model", [percent(part, whole) for part in macs], [float(part) for part in macs]))
    if any(site.score is not None for site in sites):
        scores = [site.score for site in sites]
        texts = [_NONE if each is None else f"{each:.3g}" for each in scores]
        columns.append(_Column("Score", texts, [-1.0 if each is None else each for each in scores]))
    return columns


def _numbers(header: str, values: Iterable[int | None]) -> _Column:
    values = list(values)
    return _Column(
        header, [_NONE if v is None else f"{v:,}" for v in values], [-1.0 if v is None else float(v) for v in values]
    )


def _spatial(sites: Iterable[Site]) -> _Column:
    sizes = [site.spatial for site in sites]
    texts = [f"{size[0]}\N{MULTIPLICATION SIGN}{size[1]}" if size else _NONE for size in sizes]
    return _Column("Spatial", texts, [float(size[0] * size[1]) if size else -1.0 for size in sizes])
