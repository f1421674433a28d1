"""Generated code: modules that hold others are asked for once, under names that nothing else has, and all runs as before."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from two_convs import assert_same

import se_fx
from se_fx.regions.forwards import asking_once

X = torch.randn(2, 3, 6, 6)


def pair(one: str = "0", other: str = "1") -> nn.Module:
    held = nn.Module()
    held.add_module(one, nn.Conv2d(3, 3, 1))
    held.add_module(other, nn.Conv2d(3, 3, 1))
    return held


class Calls(nn.Module):
    """Calls modules by their names."""

    def __init__(self, *names: str, **held: nn.Module) -> None:
        super().__init__()
        self.names = names
        for name, child in held.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = self.get_submodule(name)(x)
        return x


class Deep(nn.Module):
    """Three levels, a parameter and a buffer, and a module with one use."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.once = nn.Module(), pair("c", "d")
        self.net.body, self.net.scale = pair("a", "b"), nn.Parameter(torch.rand(1))
        self.net.register_buffer("shift", torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.once.c(self.net.body.a(x)) * self.net.scale
        return self.net.body.b(torch.relu(x)) + self.net.shift


class Clashes(nn.Module):
    """An argument, values and children with the names that holders would get."""

    def __init__(self) -> None:
        super().__init__()
        self.a_b, self.a = pair("c", "d"), nn.Module()
        self.a.b, self.self_a_b = pair("c", "d"), pair("c", "d")

    def forward(self, self_a_b: Tensor) -> Tensor:
        self_a = self.a.b.c(self_a_b)
        x = self.a_b.d(self.a_b.c(self.a.b.d(self_a)))
        return self.self_a_b.d(self.self_a_b.c(x)) + self_a_b + self_a


def two_ways() -> dict[str, nn.Module]:
    one, other = nn.Module(), nn.Module()
    one.b_c, other.c = pair("x", "y"), pair("x", "y")
    return {"a": one, "a_b": other}


def in_a_row() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "numbers": lambda: nn.Sequential(in_a_row(), in_a_row()),
    "three levels": Deep,
    "names that are taken": Clashes,
    "two paths, one name": lambda: Calls("a.b_c.x", "a_b.c.x", "a_b.c.y", "a.b_c.y", **two_ways()),
    "letters of any alphabet": lambda: Calls("größe.ä", "größe.ö", größe=pair("ä", "ö")),
    "no identifiers": lambda: Calls("a-b.0", "a-b.1", "a-b.0", **{"a-b": pair()}),
}


def run(code: str, model: nn.Module, x: Tensor) -> Tensor:
    names: dict[str, Any] = {"torch": torch}
    exec(code, names)
    found: Tensor = names["forward"](model, x)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_holders_are_asked_for_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]()
    graph = fx.Tracer().trace(model)
    before = graph.python_code("self").src
    with asking_once(graph):
        after = graph.python_code("self").src
    assert graph.python_code("self").src == before
    expected = model(X)
    getattr_, asked = nn.Module.__getattr__, Counter[tuple[nn.Module, str]]()

    def noticed(module: nn.Module, name: str) -> Any:
        found = getattr_(module, name)
        asked[module, name] += isinstance(found, nn.Module) and any(True for _ in found.children())
        return found

    monkeypatch.setattr(nn.Module, "__getattr__", noticed)
    assert torch.equal(run(before, model, X), expected)
    assert max(asked.values()) > 1
    asked.clear()
    assert torch.equal(run(after, model, X), expected)
    assert max(asked.values()) == 1


def test_what_is_asked_for_once_stays_as_fx_writes_it() -> None:
    graph = fx.Tracer().trace(Calls("held.a", "b", "b", held=pair("a", "c"), b=nn.Conv2d(3, 3, 1)))
    with asking_once(graph):
        after = graph.python_code("self").src
    assert after == graph.python_code("self").src


def test_code_of_others_is_changed_first() -> None:
    graph = fx.Tracer().trace(Calls("held.a", "held.b", held=pair("a", "b")))
    with graph.on_generate_code(lambda before: lambda body: [*body[:-1], "self.held.a(self.held.b(x))\n", body[-1]]):
        with asking_once(graph):
            code = graph.python_code("self").src
        assert code.count("self.held") == 1 + code.count("= self.held")
    assert "self.held.a(self.held.b(x))" not in graph.python_code("self").src


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("in_place", [False, True])
def test_results_run_as_the_model_does(name: str, in_place: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    options: dict[str, Any] = {"min_channels": 1, "latent_channels": 2, "init": "identity"}
    result = copy.deepcopy(model)
    if in_place:
        se_fx.apply_squeeze_excite(result, **options)
    else:
        result = se_fx.transform(result, **options)
    for each in (result, copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert_same(model, each, X)
    assert_same(model, torch.compile(result, fullgraph=True, backend="eager"), X)


def test_an_edited_graph_is_written_anew() -> None:
    result = se_fx.transform(Deep(), min_channels=1, latent_channels=2, init="identity")
    assert result.code.count("self.net") == 1
    call = next(node for node in result.graph.nodes if node.target == "net.body.b")
    with result.graph.inserting_after(call):
        again = result.graph.call_module("net.body.a", (call,))
    call.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
    result.recompile()
    assert result.code.count("self.net") == 1
    assert result.code.count("self_net_body.a(") == 2
    assert result(X).shape == X.shape


def test_a_holder_that_is_exchanged_is_the_new_one_at_the_next_call() -> None:
    result = se_fx.optimize_for_training(Deep())
    result(X)
    result.net.body = pair("a", "b")
    seen: list[Tensor] = []
    result.net.body.a.register_forward_hook(lambda module, inputs, output: seen.append(output))
    result(X)
    assert len(seen) == 1


def test_results_can_be_scripted_where_the_model_can() -> None:
    model = nn.Sequential(in_a_row(), in_a_row())
    result = se_fx.transform(model, min_channels=1, latent_channels=2, init="identity")
    assert torch.equal(torch.jit.script(result)(X), model(X))
