"""Timings: what `se_fx.bench` measured, as rows, as a table, and as JSON."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

__all__ = ["Benchmark", "Row"]


@dataclass(frozen=True)
class Row:
    """One model in one mode at one batch size.

    Attributes:
        model: its name.
        mode: "eager" or "compiled".
        batch_size: samples in a call.
        seconds: of one call, round by round.
        ratios: `seconds` over the baseline's in the same mode, batch size and round.
        peak_bytes: the most bytes of memory that one call takes at a time, beside weights and inputs.
    """

    model: str
    mode: str
    batch_size: int
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]
    peak_bytes: int

    @property
    def median(self) -> float:
        """Median of the rounds' seconds."""
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> tuple[float, float]:
        """First and third quartile of the rounds' seconds."""
        return _quartiles(self.seconds)

    @property
    def ratio(self) -> float:
        """Median of the rounds' ratios to the baseline."""
        return statistics.median(self.ratios)

    @property
    def ratio_iqr(self) -> tuple[float, float]:
        """First and third quartile of the rounds' ratios."""
        return _quartiles(self.ratios)

    def against(self, other: Row) -> Row:
        """This row with its ratios to `other`, round by round: a row of the same benchmark.

        >>> Row("b", "eager", 1, (3.0, 8.0), (), 0).against(Row("a", "eager", 1, (1.0, 2.0), (), 0)).ratios
        (3.0, 4.0)
        """
        return dataclasses.replace(self, ratios=tuple(a / b for a, b in zip(self.seconds, other.seconds, strict=True)))


@dataclass(frozen=True)
class Benchmark:
    """What `se_fx.bench` measured. `print` it, or read its rows.

    Attributes:
        rows: batch size by batch size, mode by mode, model by model.
        baseline: name of the model that ratios are to.
        training: whether calls are training steps.
        freezing: whether compiled code has the weights as constants.
        channels_last: whether weights and inputs are in that memory format.
        dtype: of the baseline's parameters as measured, such as "float32".
        autocast: the dtype of autocast, such as "bfloat16"; None without.
        rounds: timings of each row.
        device: such as "cpu" or "cuda:0".
        machine: names of the CPU or GPU, number of threads on the CPU, version of PyTorch.
    """

    rows: tuple[Row, ...]
    baseline: str
    training: bool
    freezing: bool
    channels_last: bool
    dtype: str
    autocast: str | None
    rounds: int
    device: str
    machine: str

    def __str__(self) -> str:
        headers = ["model", "mode", "batch", "median, ms", "IQR, ms", "ratio", "IQR of ratios", "peak, MiB"]
        table = tabulate(map(_cells, self.rows), headers, disable_numparse=True, colalign=("left", "left", *["right"] * 6))
        dtype = f"{self.dtype}, autocast to {self.autocast}" if self.autocast else self.dtype
        layout = ", channels_last" if self.channels_last else ""
        calls = "training steps" if self.training else "inference, compiled with freezing" if self.freezing else "inference"
        return f"{table}\n{self.machine}; {dtype}{layout}, {calls}, rounds: {self.rounds}, ratios to {self.baseline}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; rows have their medians and quartiles too."""
        derived = ("median", "iqr", "ratio", "ratio_iqr")
        rows = [dataclasses.asdict(row) | {name: getattr(row, name) for name in derived} for row in self.rows]
        rows = [{key: list(value) if isinstance(value, tuple) else value for key, value in row.items()} for row in rows]
        return dataclasses.asdict(self) | {"rows": rows}


# ------------------------------------------------------------------------------------------------------------------ words
def _cells(row: Row) -> list[Any]:
    times = [f"{1e3 * row.median:,.3f}", _span(row.iqr, 1e3), f"{row.ratio:.3f}", _span(row.ratio_iqr)]
    return [row.model, row.mode, row.batch_size, *times, f"{row.peak_bytes / 2**20:,.2f}"]


def _quartiles(values: tuple[float, ...]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def _span(quartiles: tuple[float, float], unit: float = 1) -> str:
    return " to ".join(f"{unit * quartile:,.3f}" for quartile in quartiles)
