"""What nodes write, what shares memory with what, and whose code runs: asked of the operators; unknown is may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from se_fx.analysis import Effects, Values, arguments, is_plain, modules_of

CONV = nn.Conv2d(3, 4, 1)


class Called(nn.Module):
    """One call on a feature map of four channels."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.conv = CONV
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.conv(x))


class Leaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def effects(call: Any) -> tuple[Effects, fx.Node, fx.Node]:
    """Of one call; with the map and the last node."""
    root = Called(call).eval()
    graph = Leaves().trace(root)
    nodes = list(graph.nodes)
    return Effects(root, modules_of(root), Values(graph, root)), nodes[1], nodes[-2]


ALIASES: dict[str, Callable[[Tensor], Any]] = {
    "nn.Flatten": nn.Flatten(2),
    "dropout": nn.Dropout(0.5).eval(),
    "F.dropout": lambda x: F.dropout(x, 0.5, False),
    "swapaxes": lambda x: x.swapaxes(1, 2),
    "movedim": lambda x: x.movedim(1, 3),
    "tensor_split": lambda x: x.tensor_split(2, 1),
    "chunk": lambda x: torch.chunk(x, 2, 1)[1],
    "unfold": lambda x: x.unfold(2, 2, 2),
    "einsum": lambda x: torch.einsum("nchw->nhwc", x),
    "ravel": lambda x: x.ravel(),
    "diagonal": lambda x: torch.diagonal(x, dim1=2, dim2=3),
    "unary plus": lambda x: +x,
    "identity": nn.Identity(),
    "data": lambda x: x.data,
    "detach": lambda x: x.detach(),
    "type_as itself": lambda x: x.type_as(x),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "contiguous": lambda x: x.contiguous(),
    "contiguous, in another format": lambda x: x.contiguous(memory_format=torch.channels_last),
    "to": lambda x: x.to(torch.float64),
    "double": lambda x: x.double(),
    "half": lambda x: x.half(),
    "expand": lambda x: x.expand(2, -1, -1, -1, -1),
    "view": lambda x: x.view(x.size(0), -1),
    "real": lambda x: torch.real(x),
    "relu_": F.relu_,
    "nn.ReLU in place": nn.ReLU(True),
    "out": lambda x: torch.add(x, 1, out=x),
}
COPIES: dict[str, Callable[[Tensor], Any]] = {
    "relu": F.relu,
    "clone": lambda x: x.clone(),
    "sum": lambda x: x + 1,
    "flip": lambda x: x.flip(1),
    "indexed": lambda x: x[:, [1, 0]],
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "pad": lambda x: F.pad(x, (1, 1)),
    "norm": nn.BatchNorm2d(4).eval(),
    "cat": lambda x: torch.cat([x]),
    "shape": lambda x: x.shape,
    "zeros_like": lambda x: torch.zeros_like(x),
}


@pytest.mark.parametrize("name", [*ALIASES, *COPIES])
def test_a_shared_storage_is_an_alias(name: str) -> None:
    found, value, node = effects({**ALIASES, **COPIES}[name])
    assert (node in found.names(value)) == (name in ALIASES)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "relu_": F.relu_,
    "inplace by position": lambda x: F.hardswish(x, True),
    "inplace by keyword": lambda x: F.silu(x, inplace=True),
    "nn.ReLU in place": nn.ReLU(inplace=True),
    "method": lambda x: x.mul_(2),
    "view": lambda x: x.flatten(1).add_(1),
    "data": lambda x: x.data.mul_(2),
    "part": lambda x: x[:, 1:].zero_(),
    "out": lambda x: torch.add(x, 1, out=x),
    "copy": lambda x: x.copy_(x * 2),
    "unsqueeze_": lambda x: x.unsqueeze_(0),
}


@pytest.mark.parametrize("name", [*WRITES, *COPIES])
def test_what_is_written_is_seen_under_every_name(name: str) -> None:
    found, value, _ = effects({**WRITES, **COPIES}[name])
    assert bool(list(found.writers(value))) == (name in WRITES)


class Foreign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Renamed(nn.ReLU):
    pass


class Changed(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return input.mul_(2)


def hooked() -> nn.Module:
    module = nn.ReLU()
    module.register_forward_hook(lambda module, args, output: args[0].mul_(2))
    return module


def replaced() -> nn.Module:
    module = nn.ReLU()
    module.forward = lambda input: input.mul_(2)
    return module


OTHERS = {"module": Foreign(), "subclass": Changed(), "hook": hooked(), "forward": replaced()}


@pytest.mark.parametrize("name", OTHERS)
def test_code_of_others_may_do_anything(name: str) -> None:
    found, value, node = effects(OTHERS[name])
    assert list(found.writers(value)) == [node]
    assert node in found.names(value)
    assert not found.is_idle(node)


def test_a_subclass_that_changes_nothing_is_pytorchs() -> None:
    assert is_plain(Renamed())
    assert not is_plain(Changed())
    assert not is_plain(hooked())
    assert not is_plain(replaced())


RANDOM: dict[str, Callable[[Tensor], Any]] = {
    "dropout": lambda x: F.dropout(x),
    "rand_like": lambda x: torch.rand_like(x),
    "bernoulli": lambda x: x.bernoulli(),
}


@pytest.mark.parametrize("name", RANDOM)
def test_what_draws_random_numbers_is_never_left_out(name: str) -> None:
    found, _, node = effects(RANDOM[name])
    assert not found.is_idle(node)


def test_statistics_are_written_in_training() -> None:
    norm = nn.BatchNorm2d(4)
    found, _, node = effects(norm)
    norm.train()
    assert not found.is_idle(node)


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "mul": lambda x: torch.mul(x, x),
    "mul by keywords": lambda x: torch.mul(other=x, input=x),
    "method": lambda x: x.mul(other=x),
    "operator": lambda x: x * x,
    "in place": lambda x: x.mul_(x),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_have_one_name_however_they_are_passed(name: str) -> None:
    _, value, node = effects(CALLS[name])
    assert arguments(node, {}) == {"input": value, "other": value}


def test_arguments_of_functions_modules_and_what_is_left_out() -> None:
    _, value, node = effects(lambda x: torch.addcmul(x, tensor1=x, tensor2=x, value=2))
    assert arguments(node, {}) == {"input": value, "tensor1": value, "tensor2": value, "value": 2}
    _, value, node = effects(lambda x: F.adaptive_avg_pool2d(output_size=1, input=x))
    assert arguments(node, {}) == {"input": value, "output_size": 1}
    _, value, node = effects(lambda x: F.max_pool2d(x, stride=1, kernel_size=2))
    assert arguments(node, {}).items() >= {"input": value, "kernel_size": 2, "stride": 1}.items()
    _, value, node = effects(CONV)
    assert arguments(node, {"conv": CONV, "call": CONV}) == {"input": value}
    _, value, node = effects(lambda x: x.shape)
    assert arguments(node, {}) is None
