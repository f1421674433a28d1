"""Benchmarks: models come out as they went in, whatever is asked for."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from benched import QUICK, Labelled, Scaled, X, bench, bench_module
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import se_fx
from se_fx import SqueezeExciteError


# ------------------------------------------------------------------------------------------------------ nothing changes
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


# ----------------------------------------------------------------------------------------------------- all combinations
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


def test_backends_are_those_asked_for(cnn: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_, used = torch.compile, []

    def noted(model: nn.Module, *, backend: str, **options: Any) -> Any:
        used.append(backend)
        return compile_(model, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", noted)
    for backend in ("aot_eager", {"b": "se_fx"}, {}):
        bench({"a": cnn, "b": cnn}, X, compiled=True, backend=backend, **QUICK)
    assert used == ["aot_eager", "aot_eager", "inductor", "se_fx", "inductor", "inductor"]


def test_every_batch_size_is_compiled_beyond_the_limit_of_recompilations(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, **(options | {"backend": counter})))
    limit = 8  # PyTorch's default, which others change: importing timm.optim sets a million
    sizes = range(2, 2 + limit + 2)
    with torch._dynamo.config.patch(recompile_limit=limit):
        result = bench({"a": Labelled("a")}, torch.zeros(1, 4), compiled=True, batch_sizes=sizes, **QUICK)
    assert [row.mode for row in result.rows] == ["compiled"] * len(sizes)
    assert counter.frame_count == len(sizes)


# ------------------------------------------------------------------------------------------------------------- freezing
@pytest.mark.parametrize(("freezing", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])
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
