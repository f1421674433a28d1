"""Timings are interleaved and paired, and tables and JSON have them all."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from benched import QUICK, Labelled, X, bench, bench_module
from torch import nn

from se_fx.measure import Row


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The label of each model timed and its number of calls, in order; each call takes a hundredth of a second."""
    timed: list[tuple[str, int]] = []

    def seconds(step: Any, number: int) -> float:
        timed.append((step.model.label, number))
        return 0.01

    monkeypatch.setattr(bench_module, "_seconds", seconds)
    return timed


def test_rounds_are_interleaved_and_every_place_is_taken_equally_often(spied: list[tuple[str, int]]) -> None:
    bench({label: Labelled(label) for label in "abc"}, X, rounds=6, min_seconds=0, progress=False)
    labels = "".join(label for label, _ in spied)
    rounds = [labels[3:][start : start + 3] for start in range(0, 18, 3)]
    assert labels[:3] == "abc"  # the warm-up
    assert rounds == ["abc", "cba", "bca", "acb", "cab", "bac"]


def test_two_models_go_first_by_turns(spied: list[tuple[str, int]]) -> None:
    bench({label: Labelled(label) for label in "ab"}, X, rounds=4, min_seconds=0, progress=False)
    assert "".join(label for label, _ in spied[2:]) == "abbabaab"


@pytest.mark.parametrize("number", [4, 5])
def test_each_model_follows_each_other_equally_often(number: int, spied: list[tuple[str, int]]) -> None:
    labels = "abcde"[:number]
    bench({label: Labelled(label) for label in labels}, X, rounds=2 * number, min_seconds=0, progress=False)
    timed = [label for label, _ in spied[number:]]
    rounds = [timed[start : start + number] for start in range(0, len(timed), number)]
    after = Counter(pair for round_ in rounds for pair in pairwise(round_))
    places = Counter(pair for round_ in rounds for pair in enumerate(round_))
    assert after == {(a, b): 2 for a in labels for b in labels if a != b}
    assert places == {(place, label): 2 for place in range(number) for label in labels}


def test_calls_are_repeated_to_fill_the_least_time(spied: list[tuple[str, int]]) -> None:
    bench({"a": Labelled("a")}, X, rounds=3, min_seconds=0.05, progress=False)
    numbers = [number for _, number in spied]
    assert numbers[0] == 1
    assert len(set(numbers[1:])) == 1
    assert 0.05 <= 0.01 * numbers[-1] < 0.1


def test_ratios_are_paired_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def clock() -> Iterator[float]:
        """The machine gets slower all the time; b takes three times as long as a."""
        yield from (1.0, 1.0)
        for slowness, order in ((1.0, "ab"), (10.0, "ba"), (100.0, "ba")):
            yield from (slowness * {"a": 2.0, "b": 6.0}[label] for label in order)

    times = clock()
    monkeypatch.setattr(bench_module, "_seconds", lambda step, number: next(times))
    a, b = bench({label: Labelled(label) for label in "ab"}, X, rounds=3, min_seconds=0, progress=False).rows
    assert a.seconds == (2.0, 20.0, 200.0)
    assert b.seconds == (6.0, 60.0, 600.0)
    assert b.ratios == (3.0, 3.0, 3.0)
    assert (b.median, b.ratio, b.ratio_iqr) == (60.0, 3.0, (3.0, 3.0))


def test_a_row_against_another() -> None:
    a, b = (Row(name, "eager", 1, seconds, ratios=(), peak_bytes=0) for name, seconds in (("a", (1.0, 2.0)), ("b", (3.0, 4.0))))
    assert b.against(a) == Row("b", "eager", 1, seconds=(3.0, 4.0), ratios=(3.0, 2.0), peak_bytes=0)


def test_medians_and_quartiles_by_hand() -> None:
    row = Row("a", "eager", 1, seconds=(5.0, 1.0, 2.0, 4.0, 3.0), ratios=(1.5,), peak_bytes=0)
    assert (row.median, row.iqr) == (3.0, (2.0, 4.0))
    assert (row.ratio, row.ratio_iqr) == (1.5, (1.5, 1.5))


# -------------------------------------------------------------------------------------------------------------- results
def test_the_table_has_every_row_and_the_machine(cnn: nn.Sequential, spied: list[tuple[str, int]]) -> None:
    result = bench(
        {"plain": Labelled("plain"), "other": Labelled("other")},
        torch.zeros(1, 2**18),
        batch_sizes=(1, 2),
        channels_last=True,
        autocast=torch.bfloat16,
        **QUICK,
    )
    header, _, *rows, facts = str(result).splitlines()
    assert [column in header for column in ("model", "mode", "batch", "median, ms", "ratio", "peak, MiB")] == [True] * 6
    assert [row.split()[:3] for row in rows] == [[name, "eager", n] for n in "12" for name in ("plain", "other")]
    assert rows[0].split()[3:] == ["10.000", "10.000", "to", "10.000", "1.000", "1.000", "to", "1.000", "1.00"]
    for fact in (torch.__version__, f"threads: {torch.get_num_threads()}", "float32, autocast to bfloat16", "channels_last"):
        assert fact in facts
    assert facts.endswith("inference, rounds: 2, ratios to plain")


def test_to_dict_is_json(cnn: nn.Sequential) -> None:
    result = bench({"a": cnn, "b": cnn[:3]}, X, batch_sizes=(1, 2), autocast=torch.bfloat16, **QUICK)
    data = result.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert (data["baseline"], data["dtype"], data["autocast"], data["device"]) == ("a", "float32", "bfloat16", "cpu")
    assert len(data["rows"]) == 4
    for row, values in zip(result.rows, data["rows"], strict=True):
        assert values["seconds"] == list(row.seconds)
        assert values["ratio_iqr"] == list(row.ratio_iqr)
        assert values["peak_bytes"] == row.peak_bytes


def test_progress_goes_to_stderr_if_tqdm_is_there(
    spied: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {"a": Labelled("a")}
    bench(models, X, rounds=1)
    out, err = capsys.readouterr()
    assert out == ""
    assert "bench" in err
    bench(models, X, rounds=1, progress=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    bench(models, X, rounds=1)
    assert capsys.readouterr() == ("", "")
