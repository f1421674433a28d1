"""Charts of reports as inline SVG, in the colours of the page around them. Knows nothing of that page.

matplotlib draws boxes, bars and scales. It gets stand-ins for colours and names; `_Drawing.svg` puts the page's CSS custom
properties and the names, escaped, in their place. So charts follow the reader's colour scheme, and modules may have any names.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from se_fx.errors import SqueezeExciteError
from se_fx.names import stages
from se_fx.planning import Part, Site
from se_fx.report.facts import Facts
from se_fx.report.stages import columns, in_order

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.text import Text

__all__ = ["costs", "network", "unit"]

_INK, _MUTED, _LINE, _PANEL, _PLAIN, _ACCENT, _SECOND = _COLOURS = [f"#01010{i}" for i in range(1, 8)]
_PROPERTIES = dict(zip(_COLOURS, ("ink", "muted", "line", "panel", "plain", "accent", "second"), strict=True))
_WIDTH = 1040  # px, as all lengths below
_SMALL, _NORMAL = 10.5, 11.5
_LETTER = 6.2  # about, in names


# ----------------------------------------------------------------------------------------------------------------- network
_CELLS = 24, 20, 16, 13  # the largest with which the network fits on one line, else the smallest
_PADDING, _GAP, _ABOVE, _BELOW = 10, 18, 20, 32


def network(report: Facts) -> str:
    """All Conv2d layers as cells, by stages from left to right; those with a block filled.

    Raises:
        SqueezeExciteError: matplotlib isn't installed.
    """
    sites = {site.name: site for site in report.sites}
    titles = {skip.name: f"{skip.name}: no block; {skip.reason}" for skip in report.skipped}
    titles |= {name: f"{name}: {_in_words(site, report.measured)}" for name, site in sites.items()}
    by_stage = stages(in_order([skip.name for skip in report.skipped], sites))
    for cell in _CELLS:
        lines = _wrapped([_Box(cell, stage, columns(stage, names), sites) for stage, names in by_stage.items()])
        if len(lines) == 1:
            break
    width = 2 + max(sum(box.width + _GAP for box in line) - _GAP for line in lines)
    heights = [_ABOVE + max(box.height for box in line) + _BELOW for line in lines]
    with _matplotlib():
        drawing = _Drawing(width, sum(heights))
        axes = drawing.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(sum(heights), 0))
        axes.set_axis_off()
        for i, line in enumerate(lines):
            left, top, bottom = 1, sum(heights[:i]) + _ABOVE, sum(heights[: i + 1]) - _BELOW
            for box in line:
                if box is not line[0]:
                    axes.plot((left - _GAP, left), [(top + bottom) / 2] * 2, color=_LINE, lw=1.5, zorder=0, clip_on=False)
                _draw(box, drawing, axes, (left, top, bottom), titles)
                left += box.width + _GAP
        return drawing.svg(f"{len(sites)} of the {len(titles)} Conv2d layers of {report.model} have a block")


@dataclass(frozen=True)
class _Box:
    """One stage, with its convs in columns of cells."""

    cell: int
    stage: str
    columns: list[list[str]]
    sites: Mapping[str, Site]

    @property
    def step(self) -> int:
        return self.cell + self.cell // 4

    @property
    def letters(self) -> int:
        return max(24, round(len(self.columns) * self.step / _LETTER))

    @property
    def count(self) -> str:
        names = [name for column in self.columns for name in column]
        return f"{sum(name in self.sites for name in names)} of {len(names)}"

    @property
    def width(self) -> int:
        letters = max(min(len(self.stage), self.letters), len(self.count))
        return max(2 * _PADDING + len(self.columns) * self.step - self.cell // 4, round(letters * _LETTER) + 2)

    @property
    def height(self) -> int:
        return 2 * _PADDING + max(map(len, self.columns)) * self.step - self.cell // 4


def _wrapped(boxes: list[_Box]) -> list[list[_Box]]:
    lines: list[list[_Box]] = [[]]
    for box in boxes:
        if lines[-1] and sum(other.width + _GAP for other in lines[-1]) + box.width > _WIDTH - 2:
            lines.append([])
        lines[-1].append(box)
    return lines


def _draw(box: _Box, drawing: _Drawing, axes: Axes, at: tuple[int, int, int], titles: Mapping[str, str]) -> None:
    from matplotlib.patches import FancyBboxPatch, Rectangle

    left, top, bottom = at
    rounded = "round,pad=0,rounding_size=5"
    axes.add_patch(FancyBboxPatch((left, top), box.width, bottom - top, rounded, fc=_PANEL, ec=_LINE, clip_on=False))
    drawing.name(axes.text(left + 1, top - 7, "", color=_INK, fontsize=_NORMAL), box.stage or "all layers", box.letters)
    axes.text(left + 1, bottom + 16, box.count, color=_MUTED, fontsize=_SMALL)
    for x, column in enumerate(box.columns):
        for y, name in enumerate(column):
            corner = left + _PADDING + x * box.step, top + _PADDING + y * box.step
            fill, edge = (_ACCENT, _ACCENT) if name in box.sites else (_PLAIN, _MUTED)
            cell = Rectangle(corner, box.cell, box.cell, fc=fill, ec=edge, lw=0.8, clip_on=False)
            drawing.title(axes.add_patch(cell), titles[name])


def _in_words(site: Site, measured: bool) -> str:
    kind = site.block or f"hidden width {site.latent_channels:,}"
    cost = f"{site.cost.params:,} parameters"
    if measured:
        cost += f", {site.cost.macs:,} MACs, {site.cost.flops:,} FLOPs, {site.cost.bytes:,} bytes"
    return f"block on {site.channels:,} channels, {kind}; adds {cost}"


# ------------------------------------------------------------------------------------------------------------------- costs
_HEAD, _FOOT = 26, 24


def costs(report: Facts) -> str:
    """What each block adds, as horizontal bars: MACs and bytes where they were measured, else parameters.

    Raises:
        SqueezeExciteError: matplotlib isn't installed.
    """
    measured = {"macs": ("MACs", "", _ACCENT), "bytes": ("bytes", "B", _SECOND)}
    measures = measured if report.measured else {"params": ("parameters", "", _ACCENT)}
    scored = all(site.score is not None for site in report.sites)
    panels: list[tuple[str, str, str, str, list[float]]] = [
        (f"Added {label}", label, unit, colour, [getattr(site.cost, measure) for site in report.sites])
        for measure, (label, unit, colour) in measures.items()
    ]
    if scored:
        panels.append(("Score", "score", "", _INK, [site.score or 0.0 for site in report.sites]))
    letters = min(38, max(len(site.name) for site in report.sites))
    names_end = round(letters * _LETTER) + 14
    bars_height = len(report.sites) * (20 if len(report.sites) <= 24 else 16)
    height, each = _HEAD + bars_height + _FOOT, (_WIDTH - names_end) // len(panels)
    with _matplotlib():
        drawing = _Drawing(_WIDTH, height)
        for panel, (title, label, unit, colour, values) in enumerate(panels):
            place = (names_end + panel * each) / _WIDTH, _FOOT / height, (each - 44) / _WIDTH, bars_height / height
            whole = all(isinstance(value, int) for value in values)
            widest = 1.18 * (max(*values, 1) if whole else max(values) or 1)
            axes = drawing.figure.add_axes(place, xlim=(0, widest), ylim=(len(values) - 0.5, -0.5))
            _scale(axes, title, unit, whole=whole)
            bars = axes.barh(range(len(values)), values, height=0.64, color=colour, zorder=2, clip_on=False)
            for row, (bar, site, value) in enumerate(zip(bars, report.sites, values, strict=True)):
                drawing.title(bar, f"{site.name}: {_told(value)} {label}")
                _beside(axes, value, row, 6, _MUTED, "left").set_text(_rounded(value, unit))
                if panel == 0:
                    drawing.name(_beside(axes, 0, row, -10, _INK, "right"), site.name, letters)
        added = " and ".join(label for label, _, _ in measures.values())
        return drawing.svg(f"Added {added}{', and score,' * scored} of each block")


def _scale(axes: Axes, title: str, unit: str, *, whole: bool) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_title(title, loc="left", fontsize=_NORMAL, color=_INK, pad=9)
    axes.set_frame_on(False)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole))
    axes.xaxis.set_major_formatter(EngFormatter(unit))
    axes.tick_params(length=0, labelsize=_SMALL, labelcolor=_MUTED)
    axes.grid(axis="x", color=_LINE, lw=0.8, clip_on=False)
    axes.axvline(0, color=_MUTED, lw=1, zorder=3, clip_on=False)


def _beside(axes: Axes, x: float, row: int, by: int, colour: str, align: str) -> Text:
    """An empty text, `by` pixels to the right of a place in a row of bars."""
    text = axes.annotate("", (x, row), (by, 0), textcoords="offset points", annotation_clip=False)
    text.set(color=colour, fontsize=_SMALL, horizontalalignment=align, verticalalignment="center")
    return text


def _rounded(value: float, unit: str) -> str:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(unit, places=1)(value) if value >= 10_000 else f"{_told(value)} {unit}".strip()


def _told(value: float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}"


# -------------------------------------------------------------------------------------------------------------------- unit
_STEP, _HIGH, _WIDE, _ASIDE, _LANE, _RADIUS = 38, 26, 316, 500, 34, 11
_SIGNS = {"add": "+", "mul": "\N{MULTIPLICATION SIGN}", "cat": "cat"}


def unit(report: Facts) -> str:
    """An excerpt of the graph: one step below the other, blocks filled, and what is not on the longest way beside it.

    Raises:
        SqueezeExciteError: matplotlib isn't installed.
    """
    parts = report.excerpt
    main = _longest_way(parts)
    columns = 1 + _WIDE / 2, 1 + _ASIDE
    centres = [(columns[place not in main], _STEP * (place + 0.5)) for place in range(len(parts))]
    ways = [(source, place) for place, part in enumerate(parts) for source in part.reads]
    lanes = sorted((way for way in ways if _passes(way, main)), key=lambda way: way[0] - way[1])  # the longest outside
    width, height = 1 + _ASIDE + _WIDE // 2 + 30, _STEP * len(parts)
    with _matplotlib():
        drawing = _Drawing(width, height)
        axes = drawing.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        for way in ways:
            (x, y), (to_x, to_y) = (centres[place] for place in way)
            aside = columns[1] - _LANE * lanes.index(way) if way in lanes else max(x, to_x)
            bends = [(x, y), (aside, y), (aside, to_y), (to_x, to_y)]
            axes.plot(*zip(*bends, strict=True), color=_MUTED, lw=1.4, zorder=0, clip_on=False)
        for part, centre in zip(parts, centres, strict=True):
            _step(part, drawing, axes, centre)
        return drawing.svg(f"A part of the graph of {report.model}, with {sum(part.block for part in parts)} of its blocks")


def _longest_way(parts: Sequence[Part]) -> set[int]:
    """The places on the longest way to the last part."""
    ways: list[list[int]] = []
    for place, part in enumerate(parts):
        ways.append([*max((ways[source] for source in part.reads), key=len, default=[]), place])
    return set(ways[-1])


def _passes(way: tuple[int, int], main: set[int]) -> bool:
    """Whether a way within the longest one leads past some of its steps."""
    return main.issuperset(way) and any(way[0] < place < way[1] for place in main)


def _step(part: Part, drawing: _Drawing, axes: Axes, centre: tuple[float, float]) -> None:
    from matplotlib.patches import Circle, FancyBboxPatch

    x, y = centre
    if not part.name:
        axes.add_patch(Circle(centre, 4, fc=_MUTED, ec=_MUTED, clip_on=False))
        return
    if not part.kind and part.name in _SIGNS:
        axes.add_patch(Circle(centre, _RADIUS, fc=_PLAIN, ec=_MUTED, clip_on=False))
        axes.text(x, y, _SIGNS[part.name], color=_INK, fontsize=_NORMAL, ha="center", va="center")
        return
    rounded, corner = "round,pad=0,rounding_size=5", (x - _WIDE / 2, y - _HIGH / 2)
    fill, edge, lw = (_PANEL, _ACCENT, 2.0) if part.block else (_PANEL, _LINE, 1.0)
    box = FancyBboxPatch(corner, _WIDE, _HIGH, rounded, fc=fill, ec=edge, lw=lw, clip_on=False)
    drawing.title(axes.add_patch(box), " ".join((part.name, part.kind)).strip())
    ink = _ACCENT if part.block else _INK
    drawing.name(axes.text(x - _WIDE / 2 + 10, y, "", color=ink, fontsize=_SMALL, va="center"), part.name, 30)
    kind = axes.text(x + _WIDE / 2 - 10, y, "", color=_MUTED, fontsize=_SMALL, ha="right", va="center")
    drawing.name(kind, part.kind, 18)


# ----------------------------------------------------------------------------------------------------------------- drawing
@contextmanager
def _matplotlib() -> Iterator[None]:
    """Take matplotlib as it comes, whatever the caller has set."""
    try:
        import matplotlib
    except ImportError as error:
        raise SqueezeExciteError("matplotlib: expected it for charts; pip install 'se_fx[html]'") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "se_fx"})
        yield


class _Drawing:
    """A figure of so many pixels, with the names and titles that its SVG is to have."""

    def __init__(self, width: int, height: int) -> None:
        from matplotlib.figure import Figure

        self.size = width, height
        self.figure = Figure(figsize=(width / 72, height / 72))
        self.names: dict[str, str] = {}
        self.titles: dict[str, str] = {}

    def name(self, text: Text, name: str, letters: int) -> None:
        """Have `text` say `name`, or what has room of its end."""
        text.set_text("name")
        text.set_gid(f"name-{len(self.names)}")
        self.names[f"name-{len(self.names)}"] = _end(name, letters)

    def title(self, artist: Artist, title: str) -> None:
        """Have `artist` show `title` where a pointer rests on it."""
        artist.set_gid(f"title-{len(self.titles)}")
        self.titles[f"title-{len(self.titles)}"] = title

    def svg(self, label: str) -> str:
        """The drawing as an `<svg>` element to be part of an HTML page: without ids, styles or addresses of its own."""
        file = io.BytesIO()
        self.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        root = ElementTree.fromstring(re.sub(rb' xmlns="[^"]*"', b"", file.getvalue(), count=1))
        for drop in [*root.findall("defs"), *(child for child in root if child.tag.endswith("metadata"))]:
            root.remove(drop)
        for group in root.iter("g"):
            key = group.attrib.pop("id", "")
            if key in self.titles:
                group.insert(0, ElementTree.Element("title"))
                group[0].text = self.titles[key]
            for text in group.findall("text"):
                text.text = self.names.get(key, text.text)
        for element in root.iter():
            element.tail = None
            if "style" in element.attrib:
                element.set("style", _themed(element.attrib["style"]))
        width, height = self.size
        root.attrib.clear()
        root.attrib.update(viewBox=f"0 0 {width} {height}", width=str(width), height=str(height), role="img")
        root.set("aria-label", label)
        return ElementTree.tostring(root, encoding="unicode")


def _end(name: str, letters: int) -> str:
    """As many of the last components as have room.

    >>> _end("features.denseblock1.denselayer1.conv1", 24), _end("classifier", 6)
    ('….denselayer1.conv1', '…ifier')
    """
    if len(name) <= letters:
        return name
    end = name[1 - letters :]
    return f"…{end[end.find('.') :]}" if "." in end else f"…{end}"


def _themed(style: str) -> str:
    """The page's colours for the stand-ins, and the page's font in the given size."""
    style = re.sub(r"#01010\d", lambda found: f"var(--{_PROPERTIES[found[0]]})", style)
    return re.sub(r"font(-family)?: ([\d.]+px)?[^;]*", lambda found: f"font-size: {found[2]}" if found[2] else "", style)
