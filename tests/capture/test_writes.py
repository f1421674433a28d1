"""Code that writes: to itself, to leaves, to its caller, to what it hides. The module whose code wrote runs its own code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from two_convs import X, rewritten

import se_fx
from se_fx.capture import capture
from se_fx.regions import code


class Norm(nn.Module):
    """A leaf with attributes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.domain, self.size, self.seen = None, 0, None, []
        self.register_buffer("shift", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.weight is None else x * self.weight
        x = x if self.size is None else F.interpolate(x, size=tuple(self.size))
        return x + self.domain + self.shift + len(self.seen)


class Inner(nn.Module):
    """Looked into: it has a conv."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.batch_norm, self.drop = nn.Conv2d(3, 3, 1), Norm(), nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.factor, self.hidden = 1.0, [Norm()]
        self.body: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x) if self.body else self.conv(x) * self.factor


class Outer(nn.Module):
    def __init__(self, body: Any = None, inner: Any = None) -> None:
        super().__init__()
        self.inner, self.last, self.norm = Inner(), nn.Conv2d(3, 3, 1), Norm()
        self.body, self.inner.body = body, inner

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x) if self.body else self.last(self.inner(x))


# ------------------------------------------------------------------------------------------------- code of the inner one
def sets_a_leaf_to_eval(self, x):
    self.batch_norm.eval()
    return self.batch_norm(self.conv(x))


def sets_a_leaf_to_its_mode(self, x):
    self.drop.train(self.training)
    return self.drop(self.conv(x))


def freezes_for_a_while(self, x):
    was = self.batch_norm.training
    self.batch_norm.eval()
    y = self.batch_norm(self.conv(x))
    self.batch_norm.train(was)
    return y


def gives_a_leaf_a_weight(self, x):
    self.norm.weight = x.mean((2, 3), keepdim=True)
    return self.norm(self.conv(x))


def gives_a_leaf_a_size(self, x):
    self.norm.size = x.shape[-2:]
    return self.norm(self.conv(x))


def counts_domains_of_a_leaf(self, x):
    self.norm.domain = self.norm.domain + 1
    return self.norm(self.conv(x))


def appends_to_a_leaf(self, x):
    self.norm.seen.append(1)
    return self.norm(self.conv(x))


def replaces_a_buffer(self, x):
    self.norm.shift = self.norm.shift + 1
    return self.norm(self.conv(x))


def replaces_a_buffer_by_its_dict(self, x):
    self.norm._buffers["shift"] = torch.ones(1) * 3
    return self.norm(self.conv(x))


def replaces_a_buffer_for_a_while(self, x):
    was, self.norm._buffers["shift"] = self.norm._buffers["shift"], torch.ones(1)
    y = self.norm(self.conv(x))
    self.norm._buffers["shift"] = was
    return y


def calls_a_leaf_with_other_buffers(self, x):
    return torch.func.functional_call(self.norm, {"shift": torch.ones(1)}, (self.conv(x),))


def replaces_a_parameter(self, x):
    self.batch_norm.weight = nn.Parameter(torch.full((3,), 2.0))
    return self.batch_norm(self.conv(x))


def deletes_an_attribute(self, x):
    y = self.norm(self.conv(x))
    self.norm.__dict__.pop("unused", None)
    self.norm.__dict__["unused"] = len(self.norm.seen)
    return y + self.norm.__dict__["unused"]


def registers_a_hook(self, x):
    if not self.norm._forward_hooks:
        self.norm.register_forward_hook(doubled)
    return self.norm(self.conv(x))


def doubled(module, args, output):
    return output * 2


def writes_to_what_it_hides(self, x):
    self.hidden[0].domain += 1
    return self.conv(x) * self.hidden[0].domain


def counts_on_its_class(self, x):
    Inner.calls = getattr(Inner, "calls", 0) + 1
    return self.conv(x)


def counts_in_place(self, x):
    self.norm.shift.add_(1)
    return self.norm(self.conv(x))


INNER = [
    sets_a_leaf_to_eval, sets_a_leaf_to_its_mode, freezes_for_a_while, gives_a_leaf_a_weight, gives_a_leaf_a_size,
    counts_domains_of_a_leaf, appends_to_a_leaf, replaces_a_buffer, replaces_a_buffer_by_its_dict,
    replaces_a_buffer_for_a_while, calls_a_leaf_with_other_buffers, replaces_a_parameter, deletes_an_attribute,
    registers_a_hook, writes_to_what_it_hides, counts_on_its_class,
]  # fmt: skip


# ------------------------------------------------------------------------------------------------- code of the outer one
def sets_a_leaf_of_its_child_to_eval(self, x):
    self.inner.batch_norm.eval()
    return self.last(self.inner(x))


def counts_for_its_child(self, x):
    self.inner.factor += 1
    return self.last(self.inner(x))


def counts_for_its_leaf(self, x):
    self.norm.domain += 1
    return self.norm(self.last(self.inner(x)))


def catches_what_it_is_told(self, x):
    try:
        self.norm.domain = 3
    except Exception:
        x = x + 1
    return self.norm(self.last(self.inner(x)))


OUTER = [sets_a_leaf_of_its_child_to_eval, counts_for_its_leaf, catches_what_it_is_told]


@pytest.fixture(autouse=True)
def forget_calls() -> Any:
    yield
    if hasattr(Inner, "calls"):
        del Inner.calls


def assert_goes_on_the_same(model: nn.Module, training: bool) -> None:
    """Call after call, in both modes, each on its own tensors; and the model is as it was."""
    model.train(training)
    before = state(model)
    result = se_fx.transform(model, min_channels=1, latent_channels=2, init="identity")
    assert state(model) == before
    model, result = copy.deepcopy(model), copy.deepcopy(result)
    for mode in (training, training, not training, not training, training):
        model.train(mode), result.train(mode)
        torch.manual_seed(0)
        expected = model(X)
        torch.manual_seed(0)
        assert torch.equal(result(X), expected), f"{mode=}"


def state(model: nn.Module) -> Any:
    hidden = [part for module in model.modules() for part in module.__dict__.get("hidden", ())]
    return [
        {name: (id(value), copy.copy(value) if isinstance(value, (list, dict)) else 0) for name, value in vars(module).items()}
        for module in (*model.modules(), *hidden)
    ], vars(Inner).keys()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("body", INNER)
def test_a_module_that_writes_runs_its_own_code_and_its_caller_a_graph(body: Callable[..., Any], training: bool) -> None:
    model = Outer(inner=body)
    assert capture(model.train(training)).opaque.keys() == {"inner"}
    assert_goes_on_the_same(model, training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("body", OUTER)
def test_not_the_module_that_is_written_to(body: Callable[..., Any], training: bool) -> None:
    model = Outer(body)
    assert capture(model.train(training)).opaque.keys() == {""}
    assert {region.path for region in capture(model).regions} >= {"inner", "last"}
    assert_goes_on_the_same(model, training)


@pytest.mark.parametrize("training", [True, False])
def test_what_is_written_to_by_code_in_no_graph_is_in_none_either(training: bool) -> None:
    model = Outer(counts_for_its_child)
    assert capture(model.train(training)).opaque.keys() == {"", "inner"}
    assert_goes_on_the_same(model, training)


class Siblings(nn.Module):
    """One writes to the other, and is called after it, or before it."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.reader, self.writer, self.first = Inner(), Inner(), first
        self.writer.hidden, self.writer.body = [self.reader], raises_the_factor

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.writer(x)) if self.first else self.writer(self.reader(x))


def raises_the_factor(self, x):
    self.hidden[0].factor += 1
    return self.conv(x)


@pytest.mark.parametrize("around", [lambda m: m, lambda m: nn.Sequential(Branches(), m)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_one_child_writes_to_another(first: bool, training: bool, around: Callable[..., Any]) -> None:
    model = around(Siblings(first))
    assert {name.rpartition(".")[2] for name in capture(model.train(training)).opaque} >= {"reader", "writer"}
    assert_goes_on_the_same(model, training)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("training", [True, False])
def test_a_child_that_is_switched_to_eval_keeps_its_own_mode(training: bool) -> None:
    def switches(self, x):
        self.inner.eval()
        return self.last(self.inner(x))

    model = Outer(switches, lambda self, x: F.dropout(self.batch_norm(self.conv(x)), 0.5, self.training))
    assert_goes_on_the_same(model, training)


def test_both_where_both_write() -> None:
    model = Outer(counts_for_its_leaf, counts_domains_of_a_leaf)
    assert capture(model).opaque.keys() == {"", "inner"}
    assert_goes_on_the_same(model, True)


def test_one_that_fails_after_it_has_written_is_not_blamed_on_its_caller() -> None:
    def fails(self, x):
        self.factor += 1
        self.norm.seen.append(1)
        return self.conv(x) if x.sum() > 0 else -self.conv(x)

    model = Outer(inner=fails)
    assert capture(model).opaque.keys() == {"inner"}
    assert_goes_on_the_same(model, True)


@pytest.mark.parametrize("training", [True, False])
def test_writing_in_place_to_a_leafs_tensor_is_traced(training: bool) -> None:
    model = Outer(inner=counts_in_place)
    model.train(training)
    result = se_fx.transform(model, min_channels=1, latent_channels=2, init="identity")
    assert float(model.inner.norm.shift) == 0.0
    model, result = copy.deepcopy(model), copy.deepcopy(result)
    for _ in range(3):
        assert torch.equal(result(X), model(X))
    assert float(result.inner.norm.shift) == 3.0


def reads_the_mode_of_a_leaf(self, x):
    return F.dropout(self.conv(x), 0.5, self.drop.training)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_a_leaf_is_that_of_the_graph(training: bool) -> None:
    model = Outer(inner=reads_the_mode_of_a_leaf)
    assert not capture(model.train(training)).opaque
    assert_goes_on_the_same(model, training)


def test_what_is_set_for_a_while_on_modules_that_are_looked_into_is_in_the_graph() -> None:
    def for_a_while(self, x):
        self.inner.factor = 3.0
        y = self.inner(x)
        self.inner.factor = 1.0
        return self.last(y)

    model = Outer(for_a_while)
    assert not capture(model).opaque
    result = se_fx.transform(model, min_channels=1, latent_channels=2, init="identity")
    assert torch.equal(result(X), model(X))


def test_modules_made_in_forward_may_be_written_to() -> None:
    def makes(self, x):
        activation = nn.ReLU()
        activation.inplace = False
        return F.relu(self.conv(x))

    assert not capture(Outer(inner=makes)).opaque


def test_adaptive_instance_norm() -> None:
    """As in MUNIT: a network makes the weights of another one's norms."""

    class Adaptive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = self.bias = None

        def forward(self, x: Tensor) -> Tensor:
            return F.instance_norm(x) * self.weight[..., None, None] + self.bias[..., None, None]

    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.style = nn.Sequential(nn.Conv2d(3, 6, 8), nn.Flatten())
            self.decoder = nn.Sequential(nn.Conv2d(3, 3, 1), Adaptive(), nn.ReLU(), nn.Conv2d(3, 3, 1))

        def forward(self, x: Tensor) -> Tensor:
            weight, bias = self.style(x).chunk(2, 1)
            for module in self.decoder.modules():
                if type(module) is Adaptive:
                    module.weight, module.bias = weight, bias
            return self.decoder(x)

    model = Generator()
    assert capture(model).opaque.keys() == {""}
    result = se_fx.transform(model, min_channels=1, latent_channels=2, init="identity")
    for x in (X, X * 2 + 1):
        assert torch.equal(result(x), model(x))


# --------------------------------------------------------------------------------------- attributes that are views of values
def data_is_added_to(self, x):
    y = self.conv(x)
    data = y.data
    data += 1
    return y * 2


def data_is_set(self, x):
    y = self.conv(x)
    y.data[:, 0] = 0.5
    return y * 2


def real_part_is_scaled(self, x):
    y = self.conv(x)
    part = y.real
    part *= 3
    return y + 1


def transposed_is_added_to(self, x):
    y = self.conv(x)
    turned = y.mT
    turned -= 2
    return y.relu()


def size_grows(self, x):
    size = x.shape[2:]
    size += (1,)
    return self.conv(x) * len(size)


@pytest.mark.parametrize(
    "body", [data_is_added_to, data_is_set, real_part_is_scaled, transposed_is_added_to, size_grows], ids=lambda f: f.__name__
)
def test_what_is_changed_by_an_attribute_is_changed(body: Callable[..., Any]) -> None:
    model = Outer(inner=body).eval()
    rewritten = se_fx.transform(model, min_channels=1, init="identity").eval()
    for x in (X, X[..., :3]):
        with torch.no_grad():
            assert torch.equal(rewritten(x), model(x))
            torch.testing.assert_close(se_fx.optimize_for_inference(model)(x), model(x))


class Missing:
    """A library that isn't installed, as some put it in its place: it raises whatever it is asked."""

    def __getattribute__(self, name: str) -> Any:
        raise ImportError(name)


class Holder(nn.Module):
    """Settings, which others read and set."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def double(holder: Holder) -> None:
    holder.factor *= 2


class Writer(nn.Module):
    """Its code is in no graph, since a value decides before it writes."""

    def __init__(self, holder: Holder, how: str) -> None:
        super().__init__()
        self.holder, self.how, self.calls = holder, how, 1
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.isfinite().all():
            if self.how == "by assignment":
                self.holder.factor = self.holder.factor + 1
            elif self.how == "by name":
                setattr(self.holder, "factor", self.holder.factor + 1)  # noqa: B010
            elif self.how == "by a function":
                double(self.holder)
            self.calls += 1
        return self.conv(x)


class Reader(nn.Module):
    """Reads what the writer has just set, of another module, which it may call, or of the writer."""

    def __init__(self, how: str, read: str) -> None:
        super().__init__()
        self.holder, self.read = Holder(), read
        self.writer, self.conv = Writer(self.holder, how), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.writer(self.conv(x))
        if self.read == "the writer":
            return y * self.writer.calls
        return (self.holder(y) if self.read == "called" else y) * self.holder.factor


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("read", ["called", "not called", "the writer"])
@pytest.mark.parametrize("how", ["by assignment", "by name", "by a function"])
def test_what_code_in_no_graph_sets_is_read_when_it_is_set(how: str, read: str, in_place: bool) -> None:
    model = Reader(how, read).eval()
    result = copy.deepcopy(model)
    if in_place:
        se_fx.apply_squeeze_excite(result, 2, 1, init="identity")
    else:
        result = rewritten(result, sites=3)
    assert len(se_fx.blocks_of(result)) > 1
    for _ in range(3):
        assert torch.equal(result(X), model(X))


def test_a_written_module_that_is_registered_twice_doesnt_keep_capture_from_ending() -> None:
    """It is in no graph under the one name, and not called by the other."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.calls = nn.Conv2d(3, 3, 1), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.conv(x) * self.calls

    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> nn.Module:
            return super().train(False)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Counts()
            self.frozen = Frozen(self.inner, nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(x)

    model = Both()
    result = rewritten(model, sites=1)
    expected = copy.deepcopy(model)
    assert len(se_fx.blocks_of(result)) == 1
    for _ in range(2):
        assert torch.equal(result(X), expected(X))


def test_files_that_hold_something_odd_are_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "missing", Missing())
    for cached in (code.words, code.asked_of_others, code.set_by):
        cached.cache_clear()
    model = Inner()
    result = se_fx.transform(model, min_channels=1, latent_channels=2, init="identity").eval()
    assert torch.equal(result(X), model.eval()(X))
