"""Benchmarks: models come out as they went in, timings are interleaved and paired, memory is as counted by hand."""

from __future__ import annotations

import copy
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import se_fx
from se_fx import SqueezeExciteError
from se_fx.measure import Row
from se_fx.measure import benchmark as bench_module
from se_fx.measure.memory import peak_bytes

bench = bench_module.bench

X = torch.zeros(2, 3, 8, 8)
QUICK: dict[str, Any] = {"rounds": 2, "min_seconds": 0, "progress": False}


class Labelled(nn.Module):
    """Knows its name, as its copies do."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Sums(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a = x + 1
        b = a * 2
        return a + b


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(256))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The label of each model timed and its number of calls, in order; each call takes a hundredth of a second."""
    timed: list[tuple[str, int]] = []

    def seconds(step: Any, number: int) -> float:
        timed.append((step.model.label, number))
        return 0.01

    monkeypatch.setattr(bench_module, "_seconds", seconds)
    return timed


# --------------------------------------------------------------------------------------------------------- nothing changes
@pytest.mark.parametrize("training", [False, True])
def test_models_and_generators_come_out_as_they_went_in(cnn: nn.Sequential, training: bool) -> None:
    cnn.append(nn.Dropout())
    cnn[1].eval()
    cnn(X).sum().backward()
    rewritten = se_fx.transform(cnn, min_channels=1)
    kept = {key: value.clone() for key, value in rewritten.state_dict().items()}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in rewritten.named_parameters()}
    parameters = list(map(id, rewritten.parameters()))
    modes = [module.training for module in rewritten.modules()]
    generators = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()

    bench({"a": cnn, "b": rewritten, "c": cnn}, X, batch_sizes=(4,), training=training, channels_last=True, **QUICK)

    assert all(torch.equal(value, kept[key]) for key, value in rewritten.state_dict().items())
    assert list(map(id, rewritten.parameters())) == parameters
    for name, parameter in rewritten.named_parameters():
        before = grads[name]
        assert parameter.grad is None if before is None else torch.equal(parameter.grad, before)
    assert [module.training for module in rewritten.modules()] == modes
    assert cnn[0].weight.is_contiguous()
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert (numpy.random.get_state()[1] == generators[2]).all()


def test_generators_are_set_back_after_errors(cnn: nn.Sequential) -> None:
    models = {"drops": cnn.append(nn.Dropout()), "fails": nn.Linear(1, 1)}
    state = torch.get_rng_state()
    with pytest.raises(SqueezeExciteError, match="fails"):
        bench(models, X, training=True, **QUICK)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------------- all combinations
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_runs(cnn: nn.Sequential, training: bool, channels_last: bool, autocast: torch.dtype | None) -> None:
    seen = []

    def see(_module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        last = args[0].is_contiguous(memory_format=torch.channels_last) and not args[0].is_contiguous()
        seen.append((len(args[0]), last, output.dtype, output.requires_grad, torch.is_inference_mode_enabled()))

    cnn[0].register_forward_hook(see)
    result = bench(
        {"a": cnn},
        X,
        batch_sizes=[1, 3],
        training=training,
        channels_last=channels_last,
        autocast=autocast,
        **QUICK,
    )
    dtype = autocast or torch.float32
    assert set(seen) == {(n, channels_last, dtype, training, not training) for n in (1, 3)}
    assert [row.batch_size for row in result.rows] == [1, 3]
    assert all(len(row.seconds) == 2 and min(row.seconds) > 0 and row.peak_bytes > 0 for row in result.rows)
    assert all(row.ratios == (1.0, 1.0) for row in result.rows)


@pytest.mark.parametrize("training", [False, True])
def test_weights_and_floating_inputs_are_converted(cnn: nn.Sequential, training: bool) -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cnn = cnn

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            assert {t.dtype for t in (x, *self.parameters(), self.cnn[1].running_mean)} == {torch.bfloat16}
            assert index.dtype == self.cnn[1].num_batches_tracked.dtype == torch.int64
            return self.cnn(x)[:, index]

    result = bench({"a": Indexed()}, (X, torch.tensor([0, 1])), training=training, dtype=torch.bfloat16, **QUICK)
    assert result.dtype == "bfloat16"
    assert {parameter.dtype for parameter in cnn.parameters()} == {torch.float32}


def test_a_rewritten_model_is_compared_with_its_original(cnn: nn.Sequential) -> None:
    rewritten = se_fx.transform(cnn, min_channels=1)
    result = bench(rewritten, X, **QUICK)
    assert [row.model for row in result.rows] == ["original", "rewritten"]
    assert result.baseline == "original"


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_training_steps_have_gradients_whatever_is_around(cnn: nn.Sequential, around: Callable[[], Any]) -> None:
    with around():
        assert len(bench({"a": cnn}, X, training=True, **QUICK).rows) == 1


def test_each_training_step_begins_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    class Watched(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            found.append(self.weight.grad)
            return super().forward(x)

    bench({"a": Watched()}, torch.zeros(1, 256), training=True, **QUICK)
    assert len(found) > 2
    assert set(found) == {None}


def test_inputs_by_keyword_and_outputs_in_containers() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, *, scale: Tensor, times: int) -> dict[str, Any]:
            assert x.shape == (5, 4)
            assert scale.shape == ()
            return {"out": [self.linear(x) * scale * times], "index": x.argmax(1), "input": x}

    inputs = {"x": torch.zeros(2, 4), "scale": torch.tensor(2.0), "times": 3}
    assert len(bench({"a": Both()}, inputs, batch_sizes=(5,), training=True, **QUICK).rows) == 1


def test_samples_are_repeated() -> None:
    seen = []

    class Sees(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.flatten().tolist())
            return x + 1

    bench({"a": Sees()}, torch.tensor([[1.0], [2.0]]), batch_sizes=(1, 5), **QUICK)
    assert seen[0] == [1.0]
    assert seen[-1] == [1.0, 2.0, 1.0, 2.0, 1.0]


def test_meta_inputs_are_filled(cnn: nn.Sequential) -> None:
    assert len(bench({"a": cnn}, X.to("meta"), **QUICK).rows) == 1


def test_compiled_models_have_rows_and_ratios_of_their_own() -> None:
    models = {"a": nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "b": nn.Linear(4, 4)}
    result = bench(models, torch.zeros(1, 4), compiled="both", **QUICK)
    cells = [(row.model, row.mode) for row in result.rows]
    assert cells == [("a", "eager"), ("b", "eager"), ("a", "compiled"), ("b", "compiled")]
    assert [row.ratio == 1.0 for row in result.rows if row.model == "a"] == [True, True]
    compiled = result.rows[2]
    assert result.rows[3].ratios == tuple(b / a for a, b in zip(compiled.seconds, result.rows[3].seconds, strict=True))


def test_every_batch_size_is_compiled_beyond_the_limit_of_recompilations(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend=counter, **options))
    sizes = range(2, 2 + torch._dynamo.config.recompile_limit + 2)
    result = bench({"a": Labelled("a")}, torch.zeros(1, 4), compiled=True, batch_sizes=sizes, **QUICK)
    assert [row.mode for row in result.rows] == ["compiled"] * len(sizes)
    assert counter.frame_count == len(sizes)


# ---------------------------------------------------------------------------------------------------------------- freezing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("freezing", [False, True])
def test_only_frozen_code_has_weights_as_constants(
    cnn: nn.Sequential, freezing: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.rand(2, 3, 8, 8)
    models = {"a": cnn, "b": copy.deepcopy(cnn).requires_grad_(False)}
    kept = {key: value.clone() for key, value in cnn.state_dict().items()}
    with torch.inference_mode():
        expected = cnn.eval()(x)
        torch.compile(copy.deepcopy(cnn).to(dtype), dynamic=False)(x.to(dtype))  # not to be used again
    constant: dict[str, set[bool]] = {"eager": set(), "compiled": set()}

    def seconds(step: Any, number: int) -> float:
        mode = "compiled" if isinstance(step.model, torch._dynamo.OptimizedModule) else "eager"
        tensors = [*step.model.parameters(), *step.model.buffers()]
        values = [tensor.clone() for tensor in tensors]
        with torch.inference_mode():
            before = step.model(*step.inputs[0])
            torch._foreach_zero_(tensors)
            constant[mode].add(torch.equal(step.model(*step.inputs[0]), before))
            torch._foreach_copy_(tensors, values)
        torch.testing.assert_close(before, expected.to(dtype), atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=0)
        return 0.01

    monkeypatch.setattr(bench_module, "_seconds", seconds)
    result = bench(models, x, batch_sizes=(2,), compiled="both", freezing=freezing, dtype=dtype, **QUICK)
    assert constant == {"eager": {False}, "compiled": {freezing}}
    assert ("compiled with freezing" in str(result)) == result.freezing == freezing
    assert not torch._inductor.config.freezing
    assert all(torch.equal(value, kept[key]) for key, value in cnn.state_dict().items())


# ----------------------------------------------------------------------------------------------------------------- timings
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


# ------------------------------------------------------------------------------------------------------------------ memory
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


# ----------------------------------------------------------------------------------------------------------------- results
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


# ------------------------------------------------------------------------------------------------------------------ errors
class Uncopied(nn.Identity):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("holds a file")


NET = nn.Conv2d(3, 4, 1)
FROZEN = copy.deepcopy(NET).requires_grad_(False)
META = copy.deepcopy(NET).to("meta")
