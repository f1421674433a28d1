"""Choosing hands on what it found: a policy is called once for each graph, whoever asks, and models are looked through once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn

import se_fx
from se_fx.analysis import Values
from se_fx.placement import PLACEMENTS, Spot


class Counting:
    """The placement "conv", and how often it was called for each graph."""

    def __init__(self) -> None:
        self.calls: Counter[fx.Graph] = Counter()

    def __call__(self, graph: fx.Graph, root: nn.Module) -> Iterable[Spot]:
        self.calls[graph] += 1
        return PLACEMENTS["conv"](graph, root)


class TwoModes(nn.Module):
    """One graph in training, another in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if self.training else self.b(self.a(x).relu())


class TwoRegions(nn.Module):
    """Code that can't be traced around two that can."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = TwoModes(), TwoModes()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


@pytest.mark.parametrize(
    ("model", "graphs"), [(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), 1), (TwoModes(), 2), (TwoRegions(), 4)]
)
@pytest.mark.parametrize("call", [se_fx.transform, se_fx.plan])
def test_a_policy_is_called_once_for_each_graph(call: Any, model: nn.Module, graphs: int) -> None:
    policy = Counting()
    call(model, placement=policy, min_channels=1, latent_channels=2, example_inputs=torch.zeros(1, 3, 8, 8))
    assert list(policy.calls.values()) == [1] * graphs


def test_so_it_is_where_a_plan_is_replayed() -> None:
    policy = Counting()
    plan = se_fx.plan(TwoModes(), placement=policy, min_channels=1, latent_channels=2)
    policy.calls.clear()
    assert len(se_fx.report(se_fx.transform(TwoModes(), plan)).sites) == 2
    assert list(policy.calls.values()) == [1, 1]


@pytest.mark.parametrize("placement", ["conv", "residual", "pre", "identity"])
def test_a_graph_is_run_once_for_all_that_is_asked_of_it(placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: Counter[fx.Graph] = Counter()
    original = Values.__init__

    def counted(self: Values, graph: fx.Graph, root: nn.Module) -> None:
        graphs[graph] += 1
        original(self, graph, root)

    monkeypatch.setattr(Values, "__init__", counted)
    se_fx.plan(torchvision.models.resnet18(), placement=placement, min_channels=1)
    assert list(graphs.values()) == ([] if placement == "conv" else [1])
