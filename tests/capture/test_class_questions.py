"""Whatever way code asks for the class of a value: it is told the truth where that is certain, else it runs itself."""

from __future__ import annotations

import collections.abc
import functools
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from two_convs import X

import se_fx
from se_fx.capture import capture


@functools.singledispatch
def dispatched(value: Any) -> float:
    return 2.0


@dispatched.register
def _(value: Tensor) -> float:
    return 3.0


@dispatched.register
def _(value: list) -> float:
    return 4.0


@typing.runtime_checkable
class Sized(typing.Protocol):
    def size(self) -> Any: ...


def matched(value: Any) -> float:
    match value:
        case nn.Module():
            return 2.0
        case Tensor():
            return 3.0
    return 4.0


def matched_sequence(value: Any) -> float:
    match value:
        case [_, *_]:
            return 2.0
        case {"image": _}:
            return 3.0
    return 4.0


# Each maps a value to a number, which differs where the answer is another.
CERTAIN = {
    "isinstance": lambda v: isinstance(v, Tensor),
    "isinstance of several": lambda v: isinstance(v, (list, tuple)) + 2 * isinstance(v, (str, (int, Tensor))),
    "isinstance of a union": lambda v: isinstance(v, Tensor | None) + 2 * isinstance(v, list | tuple),
    "isinstance of typing.Optional": lambda v: isinstance(v, typing.Optional[Tensor]),  # noqa: UP045
    "isinstance of an abstract class": lambda v: (
        isinstance(v, collections.abc.Sequence) + 2 * isinstance(v, collections.abc.Sized)
    ),
    "isinstance of a protocol": lambda v: isinstance(v, Sized),
    "is_tensor": lambda v: torch.is_tensor(v),
    "is_tensor_like": lambda v: torch.overrides.is_tensor_like(v),
    "jit.isinstance": lambda v: torch.jit.isinstance(v, Tensor),
    "jit.isinstance of Optional": lambda v: torch.jit.isinstance(v, typing.Optional[Tensor]),  # noqa: UP045
    "__class__": lambda v: (v.__class__ is Tensor) + 2 * (v.__class__.__name__ == "Tensor"),
    "issubclass of __class__": lambda v: issubclass(v.__class__, Tensor),
    "callable": lambda v: callable(v),
    "hasattr": lambda v: hasattr(v, "shape") + 2 * hasattr(v, "keys") + 4 * hasattr(v, "node") + 8 * hasattr(v, "__call__"),  # noqa: B004
    "singledispatch": dispatched,
    "match": matched,
}
OPEN = {
    "getattr": lambda v: getattr(v, "keys", None) is None,
    "type is": lambda v: type(v) is Tensor,
    "type ==": lambda v: type(v) == Tensor,  # noqa: E721
    "type in": lambda v: type(v) in (list, Tensor),
    "type's name": lambda v: type(v).__name__ == "Tensor",
    "a table of types": lambda v: {Tensor: 3.0, list: 2.0}[type(v)],
    "mapped": lambda v: next(iter(map(type, [v]))) is Tensor,
    "issubclass of type": lambda v: issubclass(type(v), Tensor),
    "isinstance of a subclass": lambda v: isinstance(v, nn.Parameter),
    "isinstance of one with a dtype": lambda v: isinstance(v, torch.FloatTensor),
    "jit.isinstance of List": lambda v: torch.jit.isinstance(v, list[Tensor]),
    "match of sequences": matched_sequence,
}


class Asks(nn.Module):
    """Asks about what a conv returned."""

    def __init__(self, ask: Callable[[Any], Any], of: str = "output") -> None:
        super().__init__()
        self.conv, self.of, self.last = nn.Conv2d(3, 3, 1), of, nn.Conv2d(3, 3, 1)
        self.ask = ask

    def asked(self, x: Tensor, y: Tensor) -> Tensor:
        return y * (1.0 + float(self.ask({"output": y, "input": x, "weight": self.conv.bias}[self.of])))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.asked(x, self.conv(x)))


class Direct(Asks):
    """As code does that matches."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(x) * matched_sequence(x))


def outer(model: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 1), model)


def assert_same(model: nn.Module, *inputs: Any) -> None:
    model.eval()
    result = se_fx.transform(model, min_channels=1, latent_channels=2, init="identity")
    optimized = se_fx.optimize_for_inference(model)
    for x in inputs:
        assert torch.equal(result(x), model(x))
        torch.testing.assert_close(optimized(x), model(x))


@pytest.mark.parametrize("name", CERTAIN)
def test_the_truth_where_it_is_certain(name: str) -> None:
    model = Asks(CERTAIN[name])
    assert not capture(model).opaque
    assert_same(model, X)


@pytest.mark.parametrize("name", CERTAIN)
def test_nothing_is_certain_of_inputs(name: str) -> None:
    model = outer(Asks(CERTAIN[name], of="input"))
    assert_same(model, X)
    alone = Asks(CERTAIN[name], of="input")
    assert capture(alone).opaque.keys() == {""}
    assert_same(alone, X)


@pytest.mark.parametrize("name", [name for name in (*CERTAIN, *OPEN) if name != "a table of types"])
def test_parameters_are_what_they_are(name: str) -> None:
    assert_same(Asks({**CERTAIN, **OPEN}[name], of="weight"), X)


def test_a_parameter_is_one() -> None:
    model = Asks(OPEN["isinstance of a subclass"], of="weight")
    assert not capture(model).opaque
    assert_same(model, X)


@pytest.mark.parametrize("name", [name for name in OPEN if "match" not in name])
def test_the_module_is_left_alone_where_it_is_not(name: str) -> None:
    model = outer(Asks(OPEN[name]))
    assert capture(model).opaque.keys() == {"1"}
    assert_same(model, X)


def test_matching_sequences_is_looked_for_in_the_code() -> None:
    model = outer(Direct(len))
    assert capture(model).opaque.keys() == {"1"}
    assert_same(model, X)
    alone = Direct(len)
    assert capture(alone).opaque.keys() == {""}
    assert_same(alone, X)


class Partial(nn.Conv2d):
    """A conv that returns a mask, too."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Takes(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.last = conv, nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.last(y[0] if isinstance(y, tuple) else y)


def test_a_subclass_may_return_something_else() -> None:
    assert_same(Takes(Partial(3, 3, 1)), X)


class Harmless(nn.Module):
    """Asks for classes, but of no value's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        kind = type("Made", (), {"number": 2})
        assert type(self).__name__ == "Harmless"
        assert type(self) is Harmless
        assert isinstance(type(self), type)
        assert isinstance(kind, type)
        assert issubclass(type(kind), type)
        assert int is int
        assert callable(self.conv)
        assert hasattr(self.conv, "weight")
        assert type[int] == type[int]

        class Meta(type):
            pass

        class Metaclassed(metaclass=Meta):
            pass

        assert type(Metaclassed) is Meta
        assert isinstance(Metaclassed, type)
        return self.conv(x) * kind().number


def test_questions_about_other_things_are_as_they_were() -> None:
    assert not capture(Harmless()).opaque
    assert_same(Harmless(), X)
    assert type is __builtins__["type"]
    assert "type" not in globals()


def test_nothing_is_left_behind_where_tracing_fails() -> None:
    kept = isinstance, issubclass, callable, hasattr, torch.overrides.is_tensor_like, nn.Module.__setattr__
    capture(outer(Asks(OPEN["type is"])))
    assert kept == (isinstance, issubclass, callable, hasattr, torch.overrides.is_tensor_like, nn.Module.__setattr__)
    assert "type" not in globals()


def test_a_decoder_that_asks_for_an_optional_feature() -> None:
    """As MONAI's UNets do."""

    class Merge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.mix = (nn.Conv2d(n, 4, 1) for n in (3, 3, 4))

        def forward(self, x: Tensor) -> Tensor:
            y, skip = self.a(x), self.b(x)
            if torch.jit.isinstance(skip, Tensor):
                y = y + skip
            return self.mix(y)

    assert not capture(Merge()).opaque
    assert_same(Merge(), X)
