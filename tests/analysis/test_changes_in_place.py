"""Which nodes write their result where their input was."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from se_fx.analysis import Effects, Values, modules_of


def changes_in_place(node: fx.Node, root: nn.Module) -> bool:
    return node.args[0] in Effects(root, modules_of(root), Values(node.graph, root)).of(node).writes


IN_PLACE = [operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.ifloordiv, F.relu_, "mul_"]
PLAIN = [operator.add, operator.floordiv, torch.relu, F.relu, F.gelu, "mul", "__mul__"]
CALLS = {**dict.fromkeys(IN_PLACE, True), **dict.fromkeys(PLAIN, False)}


@pytest.mark.parametrize("call", CALLS)
def test_what_writes_its_result_where_its_input_was(call: Callable[..., Tensor] | str) -> None:
    graph = fx.Graph()
    create = graph.call_method if isinstance(call, str) else graph.call_function
    others = () if call in (F.relu_, torch.relu, F.relu, F.gelu) else (2,)
    assert changes_in_place(create(call, (graph.placeholder("x"), *others)), nn.Module()) == CALLS[call]


@pytest.mark.parametrize("asked", [False, True])
def test_what_is_asked_to_work_in_place_does(asked: bool) -> None:
    functions = (
        lambda x: F.hardswish(x, asked),
        lambda x: F.elu(x, 1.0, asked),
        lambda x: F.relu(x, inplace=asked),
        nn.ReLU(asked),
    )
    for function in functions:
        traced = fx.symbolic_trace(nn.Sequential(function) if isinstance(function, nn.Module) else function)
        (node,) = (node for node in traced.graph.nodes if node.op.startswith("call"))
        assert changes_in_place(node, traced) == asked
