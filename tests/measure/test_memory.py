"""Peak memory is as counted by hand."""

from __future__ import annotations

import pytest
import torch
from benched import QUICK, Labelled, Scaled, X, bench
from torch import Tensor, nn

from se_fx.measure.memory import peak_bytes


class Sums(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a = x + 1
        b = a * 2
        return a + b


@pytest.mark.parametrize("batch_size", [1, 4])
def test_peak_memory_is_what_lives_at_a_time(batch_size: int) -> None:
    models = {"three": Sums(), "two": nn.Sequential(*[Labelled("")] * 5), "none": nn.Identity()}
    result = bench(models, torch.zeros(1, 256), batch_sizes=(batch_size,), **QUICK)
    kilobytes = {row.model: row.peak_bytes / 1024 for row in result.rows}
    assert kilobytes["three"] == 3 * batch_size
    assert 2 * batch_size <= kilobytes["two"] < 2 * batch_size + 0.1  # and some scalars
    assert kilobytes["none"] == 0


@pytest.mark.parametrize("batch_size", [1, 4])
def test_peak_memory_of_a_training_step(batch_size: int) -> None:
    (row,) = bench({"a": Scaled()}, torch.zeros(1, 256), batch_sizes=(batch_size,), training=True, **QUICK).rows
    # of each sample the output, its gradient and the weight's gradient, then the latter's sum; and some scalars
    assert 3 * batch_size + 1 <= row.peak_bytes / 1024 < 3 * batch_size + 1 + 0.1


def test_memory_that_was_there_before_counts_neither_way() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept: Tensor | None = None

        def forward(self, x: Tensor) -> None:
            self.kept = None
            self.kept = torch.empty(256)

    (row,) = bench({"a": Keeps()}, X, **QUICK).rows
    assert row.peak_bytes == 1024


def test_peak_memory_on_cuda_is_above_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    answers = {"synchronize": 0, "reset_peak_memory_stats": 0, "memory_allocated": 100, "max_memory_allocated": 350}
    for name, value in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name, value=value: (calls.append(name), value)[1])
    peak = peak_bytes(lambda: calls.append("step"), torch.device("cuda"))
    assert peak == 250
    assert calls == [*list(answers)[:3], "step", "max_memory_allocated"]
