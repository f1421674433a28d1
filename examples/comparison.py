"""Accuracies with and without blocks, compared seed by seed: what several examples have in common."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import scipy.stats
from tabulate import tabulate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNDECIDED = "no difference shown"
_MUTED, _WITHOUT, _WITH = "#6e6e6e", "#2a6fb0", "#b8560f"


@dataclass(frozen=True)
class Comparison:
    """Test accuracies, in [0, 1], of two networks that were trained alike with each seed. `print` or `plot` it."""

    without: tuple[float, ...]
    with_se: tuple[float, ...]

    @property
    def differences(self) -> tuple[float, ...]:
        return tuple(after - before for before, after in zip(self.without, self.with_se, strict=True))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean difference."""
        return _interval(self.differences)

    @property
    def found(self) -> str:
        """Whether the interval is on one side of zero: better, worse, or no difference shown."""
        low, high = self.interval
        return UNDECIDED if low <= 0 <= high else "better" if low > 0 else "worse"

    def __str__(self) -> str:
        columns = (self.without, self.with_se, self.differences)
        forms = ("{:.2f}", "{:.2f}", "{:+.2f}")
        rows = [
            [seed, *(form.format(100 * value) for form, value in zip(forms, row, strict=True))]
            for seed, row in enumerate(zip(*columns, strict=True))
        ]
        if len(rows) > 1:
            means = (
                f"{form.format(100 * statistics.mean(values))} ± {100 * statistics.stdev(values):.2f}"
                for form, values in zip(forms, columns, strict=True)
            )
            rows.append(["mean ± std", *means])
        headers = ["seed", "without, %", "with SE, %", "difference, points"]
        table = tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 3))
        return f"{table}\n\n{self.verdict()}"

    def verdict(self) -> str:
        count = len(self.without)
        if count < 2:
            return "One seed says nothing of the difference: take more."
        low, high = self.interval
        found = self.found if self.found == UNDECIDED else f"{self.found} with blocks"
        mean = statistics.mean(self.differences)
        return f"{count} seeds: {found}: {100 * mean:+.2f} points, 95 % interval {100 * low:+.2f} to {100 * high:+.2f}."

    def plot(self, title: str, labels: tuple[str, str], path: str) -> None:
        """Draw each seed's two accuracies, joined, and their difference; beside these the means with 95 % intervals."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        style = {"s": 30, "alpha": 0.6, "lw": 0, "zorder": 2}
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.4, 4.2), width_ratios=(3, 2), layout="constrained")
        for pair in zip(self.without, self.with_se, strict=True):
            left.plot((0, 1), [100 * value for value in pair], color=_MUTED, lw=0.8, alpha=0.45, zorder=1)
        for at, side, values, colour in ((0, -1, self.without, _WITHOUT), (1, 1, self.with_se, _WITH)):
            left.scatter([at] * len(values), [100 * value for value in values], color=colour, **style)
            _draw_mean(left, at + 0.2 * side, values, colour, "{:.2f} %", side)
        left.set(xlim=(-0.8, 1.8), xticks=(0, 1), xticklabels=labels, ylabel="test accuracy, %")
        right.axhline(0, color=_MUTED, lw=1, zorder=1)
        right.annotate("no difference", (1.08, 0), (0, 4), textcoords="offset points", ha="right", color=_MUTED, fontsize=9)
        right.scatter([0] * len(self.differences), [100 * value for value in self.differences], color="black", **style)
        _draw_mean(right, 0.2, self.differences, "black", "{:+.2f} points", 1)
        right.set(
            xlim=(-0.4, 1.1), xticks=(0,), xticklabels=["difference,\nseed by seed"], ylabel="with SE, less without: points"
        )
        right.yaxis.set_major_formatter("{x:+g}")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(axis="x", length=0)
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
        figure.supxlabel("points: seeds; diamonds: their mean and its 95 % interval", fontsize=9, color=_MUTED)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half its 95 % interval, by Student's t."""
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(half)


def draw_differences(title: str, compared: Sequence[tuple[str, str, str, Comparison]], path: str) -> None:
    """Draw differences, one row each, under their group's name: a group, the two that are compared, and their accuracies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys(group for group, *_ in compared))
    sizes = [sum(each[0] == group for each in compared) for group in groups]
    height = 1.0 + 0.36 * len(compared) + 0.6 * len(groups)
    figure, all_axes = pyplot.subplots(
        len(groups), 1, figsize=(8.4, height), sharex=True, squeeze=False, height_ratios=sizes, layout="constrained"
    )
    for axes, group in zip(all_axes[:, 0], groups, strict=True):
        rows = [each[1:] for each in compared if each[0] == group]
        axes.axvline(0, color=_MUTED, lw=1, zorder=1)
        for at, (_, _, comparison) in enumerate(rows):
            colour = _MUTED if comparison.found == UNDECIDED else _WITH if comparison.found == "better" else _WITHOUT
            points = [100 * value for value in comparison.differences]
            axes.scatter(points, [at] * len(points), color=colour, s=22, alpha=0.5, lw=0, zorder=2)
            mean, half = mean_and_half(points)
            axes.errorbar(mean, at, xerr=half, fmt="D", ms=6, color=colour, capsize=4, lw=1.6, zorder=3)
        axes.set_yticks(range(len(rows)), [f"{name}  less  {other}" for name, other, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(group, fontsize=10, loc="left", color=_MUTED)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter("{x:+g}")
    all_axes[-1, 0].set_xlabel("points of test accuracy; dots: seeds; diamonds: their mean and its 95 % interval")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _interval(values: Sequence[float]) -> tuple[float, float]:
    mean, half = mean_and_half(values)
    return mean - half, mean + half


def _draw_mean(axes: Axes, at: float, values: Sequence[float], colour: str, form: str, side: int) -> None:
    mean, (low, high) = 100 * statistics.mean(values), (100 * end for end in _interval(values))
    axes.errorbar(at, mean, [[mean - low], [high - mean]], fmt="D", ms=6, color=colour, capsize=5, lw=1.6, zorder=3)
    where = {"ha": "left" if side > 0 else "right", "va": "center"}
    axes.annotate(form.format(mean), (at, mean), (11 * side, 0), textcoords="offset points", color=colour, **where)
