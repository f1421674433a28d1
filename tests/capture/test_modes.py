"""One graph for both modes, or one for each: which runs follows the module's mode, as the code did."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from two_convs import Model, X, assert_same, outputs, rewritten

from se_fx.capture import capture


def test_one_graph_where_the_modes_agree() -> None:
    (region,) = capture(Model()).regions
    assert region.graphs[True] is region.graphs[False]


class DropsOut(Model):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.second(F.dropout(self.first(x), 0.5, self.training)), 0.5, training=self.training)


def test_two_graphs_that_switch_with_the_mode() -> None:
    model = DropsOut()
    result = rewritten(model)
    assert isinstance(result, fx.GraphModule)
    assert_same(model, result, X, modes=(True, False, True, True, False, False))
    for copied in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert_same(model, copied, X, modes=(False, True, False))
    result.train()
    train_graph = result.graph
    assert result.eval().graph is not train_graph
    assert result.train().graph is train_graph


class BranchesOnMode(Model):
    def forward(self, x: Tensor):
        x = self.first(x)
        return (self.second(x), x) if self.training else self.second(x)


def test_structure_may_depend_on_the_mode() -> None:
    model = BranchesOnMode()
    result = rewritten(model)
    for training in (True, False, True, False):
        expected, actual = model.train(training)(X), result.train(training)(X)
        assert type(actual) is type(expected)
        assert all(map(torch.equal, actual, expected))


def test_setting_training_directly_switches_too() -> None:
    result = rewritten(BranchesOnMode())
    result.training = False
    assert isinstance(result(X), Tensor)
    result.training = True
    assert isinstance(result(X), tuple)


def test_a_submodule_in_another_mode_stays_so() -> None:
    model = nn.Sequential(OrderedDict(a=DropsOut(), b=nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))))
    model.train()
    model.a.eval()
    model.b[1].eval()
    result = rewritten(model, 3)
    assert torch.equal(outputs(result, X), outputs(model, X))
    assert not result.a.training
    assert not result.b[1].training
    assert result.training
    assert_same(model, result, X)


def test_a_train_method_of_a_childs_own() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def train(self, mode: bool = True):
            return super().train(False)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.conv(x), 0.5, self.training)

    model = nn.Sequential(Frozen(), nn.Conv2d(8, 8, 1))
    assert_same(model, rewritten(model), X)


def test_dynamo_neither_breaks_graphs_nor_recompiles_when_modes_do_not_change() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    result = rewritten(DropsOut())
    compiled = torch.compile(result, backend="eager", fullgraph=True)
    for training in (True, True, False, False, True, False):
        result.train(training)
        compiled(X)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
