"""Rewrites for training: less is kept, outputs stay bit for bit, and gradients are right."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recomputed import CHANNELS, UNITS, Gate, Mobile, Residual, assert_alike, conv, kept_maps, names_of_nodes, step
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import se_fx
from se_fx.rewrites import ROUNDED, TRAINING_REWRITES
from se_fx.rewrites.training import calls, matrices, recipes, saving

X = torch.randn(3, CHANNELS, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True, params=["at once", "by part", "by matrix"])
def sums(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates' gradients are summed in any of these ways."""
    monkeypatch.setattr(calls, "LARGE", 2**60 if request.param == "at once" else 0)
    monkeypatch.setattr(matrices, "LARGE", 0 if request.param == "by matrix" else 2**60)


def optimized(model: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A network in training mode, and an optimised copy with tensors of its own."""
    torch.manual_seed(0)
    model.double().train()
    return model, copy.deepcopy(se_fx.optimize_for_training(model, **options))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", UNITS)
def test_units(name: str, layout: torch.memory_format) -> None:
    make, before, after = UNITS[name]
    x = X.contiguous(memory_format=layout)
    model, lean = optimized(make().to(memory_format=layout))
    assert (kept_maps(copy.deepcopy(model), x), kept_maps(copy.deepcopy(lean), x)) == (before, after)
    assert_alike(step(lean, x), step(model, x))


@pytest.mark.parametrize("rewrite", TRAINING_REWRITES)
@pytest.mark.parametrize("name", UNITS)
def test_gradients_of_each_rewrite_alone(name: str, rewrite: str) -> None:
    model, lean = optimized(UNITS[name][0](), rewrites=[rewrite], exact=rewrite not in ROUNDED)
    assert kept_maps(copy.deepcopy(lean), X) <= kept_maps(copy.deepcopy(model), X)
    x = X[:2, :, :4, :4].clone().requires_grad_()
    tried = copy.deepcopy(lean)
    parameters = [p for p in tried.parameters() if p.numel() <= 64]
    assert gradcheck(lambda x, *_: tried(x), (x, *parameters), atol=1e-6, fast_mode=True)
    assert_alike(step(lean, X), step(model, X))


@pytest.mark.parametrize("name", UNITS)
def test_second_derivatives(name: str) -> None:
    _, lean = optimized(UNITS[name][0]())
    assert gradgradcheck(lambda x: lean(x).square(), (X[:2, :, :4, :4].clone().requires_grad_(),), atol=1e-6, fast_mode=True)


ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "relu": (nn.ReLU, 2),
    "relu in place": (lambda: nn.ReLU(inplace=True), 2),
    "relu6 in place": (lambda: nn.ReLU6(inplace=True), 2),
    "silu": (nn.SiLU, 2),
    "hardswish in place": (lambda: nn.Hardswish(inplace=True), 2),
    "leaky relu in place": (lambda: nn.LeakyReLU(0.1, inplace=True), 2),
    "elu in place": (lambda: nn.ELU(inplace=True), 2),
    "gelu": (nn.GELU, 2),
    "sigmoid": (nn.Sigmoid, 2),
    "two in place": (lambda: nn.Sequential(nn.SiLU(inplace=True), nn.Hardswish(inplace=True)), 3),
    "prelu, which has a weight": (nn.PReLU, 4),
    "dropout, which is random": (lambda: nn.Dropout(0.5), 4),
    "rrelu, which is random": (nn.RReLU, 5),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    make, after = ACTIVATIONS[name]
    model, lean = optimized(Mobile(make()))
    assert kept_maps(copy.deepcopy(lean), X) == after
    assert_alike(step(lean, X), step(model, X))


class InARow(Mobile):
    """Activations in a row, the second of which works in place or not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.norm(self.conv(x)))
        return self.last(self.se(nn.functional.softplus(nn.functional.hardswish(x, self.inplace), 2.0)))


PYTORCHS = [
    kind
    for kind in vars(nn.modules.activation).values()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and "inplace" in inspect.signature(kind).parameters
]


@pytest.mark.parametrize("kind", PYTORCHS)
def test_activations_of_pytorchs_are_told_not_to_work_in_place(kind: Any) -> None:
    needed = {"threshold": 0.1, "value": 0.2} if kind is nn.Threshold else {}
    module = kind(inplace=True, **needed).eval()  # one of them is random in training
    x = X.clone()
    found = recipes.out_of_place(module, (), {}, x)
    assert torch.equal(x, X)
    assert torch.equal(found, kind(**needed).eval()(X))
    assert module.inplace
    assert torch.equal(module(x), x)


@pytest.mark.parametrize("rewrites", [None, ["recompute_products"], ["recompute_activations"], ["recompute_readers"]])
@pytest.mark.parametrize("inplace", [False, True])
def test_activations_in_a_row_are_computed_again_in_their_order(inplace: bool, rewrites: list[str] | None) -> None:
    model, lean = optimized(InARow(inplace), rewrites=rewrites)
    kept = [kept_maps(copy.deepcopy(each), X) for each in (model, lean)]
    assert kept[1] == 2 if rewrites is None else kept[1] < kept[0]
    assert_alike(step(lean, X), step(model, X))


def frozen(model: Any) -> None:
    model.norm.eval()


def frozen_with_parameters(model: Any) -> None:
    model.norm.eval().requires_grad_(False)


def all_but_the_gate(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("se." in name)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("freeze", [frozen, frozen_with_parameters, all_but_the_gate])
@pytest.mark.parametrize("make", [Residual, Mobile])
def test_frozen_before_and_after_optimising(
    make: Callable[[], nn.Module], freeze: Callable[[nn.Module], None], later: bool
) -> None:
    model = make()
    if not later:
        freeze(model)
    _, lean = optimized(model)
    if not later:  # `train()` thawed the norm
        lean = copy.deepcopy(se_fx.optimize_for_training(model))
    for each in (model, lean):
        freeze(each)
    assert kept_maps(copy.deepcopy(lean), X) < kept_maps(copy.deepcopy(model), X)
    assert_alike(step(lean, X), step(model, X))


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False),
        lambda: nn.BatchNorm2d(CHANNELS, momentum=None),
        lambda: nn.BatchNorm2d(CHANNELS, affine=False),
        lambda: nn.GroupNorm(4, CHANNELS, affine=False),
    ],
)
@pytest.mark.parametrize("make", [Residual, lambda norm: Mobile(norm=norm)])
def test_norms(make: Callable[..., nn.Module], norm: Callable[[], nn.Module]) -> None:
    model, lean = optimized(make(norm))
    assert kept_maps(copy.deepcopy(lean), X) <= kept_maps(copy.deepcopy(model), X) - 1
    for x in (X, X[:1]):
        assert_alike(step(lean, x), step(model, x))


class Scaled(nn.Module):
    """What the product reads, or gives, is changed in place."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.conv, self.norm, self.act, self.gate = where, conv(), nn.BatchNorm2d(CHANNELS), nn.SiLU(), Gate()
        self.last = conv()

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        if self.where == "before the activation":
            z.add_(1)
        u = self.act(z)
        if self.where == "before the product":
            u.mul_(2)
        gate = u.mean((2, 3), keepdim=True).sigmoid()
        y = u.mul_(gate) if self.where == "by the product" else u * gate
        if self.where == "after the product":
            y.add_(1)
        return self.last(y)


@pytest.mark.parametrize("where", ["before the activation", "before the product", "by the product", "after the product"])
def test_what_is_changed_in_place(where: str) -> None:
    model, lean = optimized(Scaled(where))
    if where != "by the product":  # where the gate's gradient needs what is gone
        assert_alike(step(lean, X), step(model, X))
    assert [c.detail for s in lean._training_optimization.steps for c in s.changes if not c.applied]


def test_hooks_and_what_shares_statistics_are_left_alone_with_the_reason() -> None:
    calls: list[int] = []
    hooked, shared = Residual(), Residual(lambda: nn.SyncBatchNorm(CHANNELS))
    hooked.norm.register_forward_hook(lambda *_: calls.append(1))
    for model, words in ((hooked, "norm does more than is known, or has hooks"), (shared, "from other processes")):
        _, lean = optimized(model)
        assert words in str(se_fx.report(lean))
    lean = optimized(hooked)[1]
    lean(X)
    assert calls


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", UNITS)
def test_low_precision_and_autocast(name: str, kind: torch.dtype) -> None:
    make, _, after = UNITS[name]
    model, lean = optimized(make())

    def cast(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    for each in (model, lean):
        each.to(torch.float32)
    x = X.float()
    assert_alike(step(lean, x, cast), step(model, x, cast), 1e-2)
    for each in (model, lean):
        each.to(kind)
    assert kept_maps(copy.deepcopy(lean), X.to(kind)) == after
    assert_alike(step(lean, X.to(kind)), step(model, X.to(kind)), 1e-2 if kind != torch.float32 else 1e-4)


def test_a_graph_that_is_kept_and_one_that_is_not() -> None:
    model, lean = optimized(Residual())
    for each in (model, lean):
        loss = each(X).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    for one, other in zip(lean.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_nothing_is_left_after_the_backward_pass() -> None:
    """Though what it computed is: a loss that somebody logs."""
    _, lean = optimized(Residual())
    kept: list[weakref.ref[Tensor]] = []
    lean.conv.register_forward_hook(lambda *found: kept.append(weakref.ref(found[2])))
    model = se_fx.optimize_for_training(lean)
    loss = model(X).square().sum()
    loss.backward()
    gc.collect()
    assert kept
    assert kept[0]() is None


def test_sources_are_kept_once_for_all_readers_but_hooks_get_each() -> None:
    value, gate = torch.randn(2, 4, 3, 3, requires_grad=True), torch.rand(2, 4, 1, 1)
    recipe = recipes.Recipe(torch.mul, recipes.Recipe(torch.relu, value), gate)
    assert recipe.under(None) is recipe
    packed: list[Tensor] = []
    hooks = (lambda tensor: packed.append(tensor) or tensor, lambda tensor: tensor)
    first, second = (recipe.under(hooks) for _ in range(2))
    assert first is not second
    assert len(packed) == 4
    assert torch.equal(first.unpack(), value.relu() * gate)


def test_values_are_computed_once_a_backward_pass_and_then_forgotten() -> None:
    runs: list[str] = []

    def counted(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: runs.append(name) or getattr(torch, name)(x)

    x, weight = (torch.rand(2, 3, requires_grad=True) for _ in range(2))
    value = x.square()
    squared = recipes.Recipe(counted("square"), x)
    grown, shrunk = (recipes.Recipe(counted(name), squared) for name in ("exp", "sigmoid"))
    results = [
        saving.recomputed(torch.mul, value, (weight,), {}, squared),
        saving.recomputed(torch.sin, value, (), {}, squared),
    ]
    for call, recipe in ((torch.exp, grown), (torch.sigmoid, shrunk)):
        results.append(saving.recomputed(call, value, (), {}, squared, recipe))
        results.append(saving.recomputed(torch.mul, results[-1], (weight,), {}, recipe))
    assert runs == []
    for _ in range(2):
        sum(result.sum() for result in results).backward(retain_graph=True)
        assert sorted(runs) == ["exp", "sigmoid", "square"]
        assert all(recipe.shelf.value is None for recipe in (squared, grown, shrunk))
        runs.clear()


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_recipes_are_run_under_the_autocast_that_they_were_made_under(made: bool, used: bool) -> None:
    matrix = torch.eye(4)
    with torch.autocast("cpu", torch.bfloat16, enabled=made):
        recipe = recipes.Recipe(torch.mm, matrix, matrix)
    with torch.autocast("cpu", torch.bfloat16, enabled=used):
        assert recipe.unpack().dtype == (torch.bfloat16 if made else torch.float32)


def test_hooks_around_keep_what_operators_within_a_call_do() -> None:
    x, weight = (torch.rand(2, 3, requires_grad=True) for _ in range(2))

    def composed(value: Tensor, weight: Tensor) -> Tensor:
        return torch.exp(torch.sin(value) * weight).sigmoid()

    found, gradients = [], []
    for call in (
        composed,
        lambda value, weight: saving.recomputed(composed, value, (weight,), {}, recipes.Recipe(torch.square, x)),
    ):
        value, packed = x.square(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=packed: kept.append(t) or t, lambda t: t):
            call(value, weight).sum().backward()
        found.append(packed)
        gradients.append((x.grad, weight.grad))
        x.grad = weight.grad = None
    plain, lean = found
    assert len(plain) == len(lean) == 5
    missing = [t for t in plain if not any(torch.equal(t, other) for other in lean)]
    assert len(missing) == 1
    assert torch.equal(missing[0], value)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_hooks_around_keep_all_that_operators_do() -> None:
    model, lean = optimized(Mobile())
    found = []
    for each in (model, lean):
        packed: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=packed: kept.append(t) or t, lambda t: t):
            each(X).sum().backward()
        found.append({(tuple(t.shape), t.dtype) for t in packed if t.ndim != 4 or t.shape[2:] == (1, 1)})
    assert found[0] <= found[1]


@pytest.mark.parametrize("make", [nn.PReLU, nn.Tanh, lambda: Random()])
@pytest.mark.parametrize("fused", [False, True])
def test_an_activation_that_another_takes_the_place_of(fused: bool, make: Callable[[], nn.Module]) -> None:
    layers = [NormAct(CHANNELS)] if fused else [nn.BatchNorm2d(CHANNELS), nn.SiLU()]
    model, lean = optimized(nn.Sequential(conv(), *layers, Gate(), conv()))
    new = make().double()
    for each in (model, lean):
        if fused:
            each[1].act = copy.deepcopy(new)
        else:
            each[2] = copy.deepcopy(new)
    assert_alike(step(lean, X), step(model, X))


class Doubled(nn.BatchNorm2d):
    """Does more than its base."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("given", [False, True])
def test_a_norm_that_becomes_another(given: bool) -> None:
    model, lean = optimized(Residual())
    for each in (model, lean):
        if given:
            each.norm.__class__ = Doubled
        else:
            each.norm = Doubled(CHANNELS).double()
    assert_alike(step(lean, X), step(model, X))


def test_a_part_that_did_nothing_and_is_replaced_later_and_parts_within_parts() -> None:
    norm = NormAct(CHANNELS)
    norm.act = nn.Sequential(nn.Identity(), nn.SiLU(inplace=True))
    model, lean = optimized(nn.Sequential(conv(), norm, Gate(), conv()))
    assert_alike(step(copy.deepcopy(lean), X), step(copy.deepcopy(model), X))
    for each in (model, lean):
        each[1].act[0] = nn.LeakyReLU()
    assert_alike(step(lean, X), step(model, X))


class Random(nn.Module):
    """Gives something else at each call."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5)


class NormAct(nn.BatchNorm2d):
    """A norm with an activation of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        operands = (self.running_mean, self.running_var, self._weight(), self.bias)
        return self.act(nn.functional.batch_norm(input, *operands, self.training, self.momentum, self.eps))

    def _weight(self) -> Tensor:
        return self.weight


class Shifted(NormAct):
    """Gives its function something else."""

    def _weight(self) -> Tensor:
        return self.weight + 1


class Counting(NormAct):
    """Counts otherwise."""

    def forward(self, input: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        return super().forward(input)


class Training(NormAct):
    """Takes each batch's statistics in evaluation, too."""

    def forward(self, input: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        operands = (self.running_mean, self.running_var, self.weight, self.bias)
        return self.act(nn.functional.batch_norm(input, *operands, True, self.momentum, self.eps))


@pytest.mark.parametrize(("kind", "known"), [(NormAct, True), (Shifted, False), (Counting, False), (Training, False)])
def test_norms_of_others_that_do_what_theirs_does_and_an_activation(kind: type[NormAct], known: bool) -> None:
    model, lean = optimized(nn.Sequential(conv(), kind(CHANNELS), Gate(), conv()))
    steps = {step.rewrite: step.changes for step in se_fx.report(lean).steps}
    assert [change.applied for change in steps["recompute_activations"]] == [known]
    assert_alike(step(lean, X), step(model, X))


class Switched(NormAct):
    """Its activation can be switched off; its momentum stands in its code."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.active = True

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        operands = (self.running_mean, self.running_var, self.weight, self.bias)
        normed = nn.functional.batch_norm(input, *operands, self.training, 0.1, self.eps)
        return self.act(normed) if self.active else normed


@pytest.mark.parametrize(("attribute", "value"), [("active", False), ("momentum", 0.5), ("eps", 0.5)])
def test_norms_of_others_that_are_set_otherwise_later(attribute: str, value: Any) -> None:
    model, lean = optimized(nn.Sequential(conv(), Switched(CHANNELS), Gate(), conv()))
    assert kept_maps(copy.deepcopy(lean), X) < kept_maps(copy.deepcopy(model), X)
    for each in (model, lean):
        setattr(each[1], attribute, value)
    assert_alike(step(lean, X), step(model, X))


class Giving(torch.autograd.Function):
    """A function whose input's gradient is X."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, told: Callable[[Tensor], object]) -> Tensor:
        ctx.told = told
        return value.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        made = gradient * X
        ctx.told(made)
        return made, None


def backward(y: Tensor, told: Callable[[Tensor], object] = lambda _: None) -> None:
    Giving.apply(y, told).backward()


#: Who else has the gradient of a product: each appends it to a list.
HOLDERS: dict[str, Callable[[Any, list[Any], Tensor], object]] = {
    "who made it": lambda y, held, _: backward(y, held.append),
    "a hook": lambda y, held, _: (y.register_hook(held.append), backward(y)),
    "a hook of the node": lambda y, held, _: (y.grad_fn.register_prehook(held.extend), backward(y)),
    "a hook behind the node": lambda y, held, _: (y.grad_fn.register_hook(lambda _, given: held.extend(given)), backward(y)),
    "the product": lambda y, held, _: (y.retain_grad(), backward(y), held.append(y.grad)),
    "who asks for it": lambda y, held, _: held.extend(
        torch.autograd.grad(Giving.apply(y, len), [y, *(node.variable for node, _ in y.grad_fn.next_functions)])[:1]
    ),
    "who gives it": lambda y, held, _: (held.append(X.clone()), y.backward(held[0])),
    "a summand": lambda y, held, other: (backward(y + other), held.append(other.grad)),
    "its whole": lambda y, held, _: backward(y, lambda made: held.append(made.view(-1))),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_gradient_that_somebody_has_is_not_written_to(holder: str) -> None:
    map_, gate = X.clone().requires_grad_(), X[:, :, :1, :1].clone().requires_grad_()
    held: list[Any] = []
    summand = torch.zeros_like(X).requires_grad_().mul(1)  # made before the product, it has its gradient after it
    summand.retain_grad()
    HOLDERS[holder](calls.product(map_, gate, calls.held(map_)), held, summand)
    (found,) = held
    assert torch.equal(found.view(X.shape), X)
    if map_.grad is not None:
        assert torch.equal(map_.grad, X * gate)


def test_a_gradient_that_nobody_has_makes_room_for_the_next() -> None:
    map_, gate = X.clone().requires_grad_(), X[:, :, :1, :1].clone().requires_grad_()
    places: list[int] = []
    map_.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    backward(calls.product(map_, gate, calls.held(map_)), lambda made: places.append(made.data_ptr()))
    assert (places[0] == places[1]) == (calls.LARGE == 0)
    assert torch.equal(map_.grad, X * gate)
    assert torch.allclose(gate.grad, (X * X).sum((2, 3), keepdim=True), rtol=1e-12, atol=0)


def test_the_next_gradient_is_added_to_that_of_a_product_in_its_memory() -> None:
    """Looking at who has a gradient leaves nobody behind that has it."""
    source, gate = X.clone().requires_grad_(), X[:, :, :1, :1].clone().requires_grad_()
    map_ = source * 1
    squeezed = map_.mean((2, 3), keepdim=True)
    loss = (calls.product(map_, gate, calls.held(map_)) * 2).sum() + squeezed.sum()
    with torch.profiler.profile() as profile:
        loss.backward()
    names = [event.key for event in profile.key_averages()]
    assert "aten::add_" in names
    assert "aten::add" not in names


def test_a_gradient_that_is_one_number_everywhere_is_not_written_to() -> None:
    map_, gate = X.clone().requires_grad_(), X[:, :, :1, :1].clone().requires_grad_()
    calls.product(map_, gate, calls.held(map_)).sum().backward()
    assert torch.equal(map_.grad, gate.expand_as(X))


@pytest.mark.parametrize("missing", ["_use_count", "_storage", "_uses_of_storage"])
def test_where_it_cannot_be_told_who_has_a_gradient(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, missing, None)
    monkeypatch.setattr(calls, "_unshared", calls._unshared.__wrapped__)
    test_a_gradient_that_somebody_has_is_not_written_to("who made it")


@pytest.mark.parametrize("name", [name for name in UNITS if name != "methods"])  # whose gate is as large as its map
def test_products_of_all_units_are_by_part_or_by_matrix(name: str) -> None:
    _, lean = optimized(UNITS[name][0]())
    has_matrix = matrices.LARGE == 0 and name in ("mobile", "group_norm")
    found = names_of_nodes(lean(X))
    assert ("_ProductBackward" in found) == (calls.LARGE == 0 and not has_matrix)
    assert ("_ConvolvedBackward" in found) == has_matrix


@pytest.mark.parametrize("samples", [1, 2, 4])
@pytest.mark.parametrize("name", UNITS)
def test_parts_of_all_sizes(name: str, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three samples: one by one, two and one, all at once."""
    monkeypatch.setattr(recipes, "PART", samples * X[0].numel() * X.element_size())
    model, lean = optimized(UNITS[name][0]())
    assert_alike(step(lean, X), step(model, X))


@pytest.mark.parametrize("small", [0, X.numel() * 8, X.numel() * 8 + 1])
def test_small_maps_are_kept(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "SMALL", small)
    model, lean = optimized(Mobile())
    assert (kept_maps(lean, X) == kept_maps(model, X)) == (small > X.numel() * 8)
    assert_alike(step(lean, X), step(model, X))


def test_forward_derivatives() -> None:
    model, lean = optimized(Residual())
    tangent = torch.randn_like(X)
    found = []
    for each in (model, lean):
        with forward_ad.dual_level():
            found.append(forward_ad.unpack_dual(each(forward_ad.make_dual(X, tangent))).tangent)
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


class Reasons(nn.Module):
    """A product that autograd keeps whatever is done, in one way or another."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.conv, self.norm, self.narrow, self.other = conv(), nn.BatchNorm2d(CHANNELS), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(self.conv(x))
        if self.case not in ("norm", "bare"):
            u = nn.functional.silu(u)
        gate = self.narrow(u.mean((2, 3), True)).sigmoid()
        if self.case == "in place":
            return u.mul_(gate) + 1
        if self.case == "changed":
            u.add_(1)
        y = u * gate
        return y + self.other(u) if self.case in ("kept", "norm") else y + 1


@pytest.mark.parametrize(
    ("case", "activations", "products", "readers"),
    [
        ("in place", "is scaled in place", "is scaled in place", "is scaled in place"),
        ("kept", "other keeps it anyway", "other keeps it anyway", "nothing keeps it"),
        ("norm", "other keeps it anyway", "other keeps it anyway", "nothing keeps it"),
        ("bare", "has no activation behind its norm", "is computed again from what norm keeps", "nothing keeps it"),
        ("changed", "add_ works in place", "is computed again from norm, by silu, add_", "nothing keeps it"),
        ("", "needs nothing but what norm keeps", "is computed again from what norm keeps, by silu", "nothing keeps it"),
    ],
)
def test_what_is_said(case: str, activations: str, products: str, readers: str) -> None:
    _, lean = optimized(Reasons(case))
    said = {step.rewrite: [change.detail for change in step.changes] for step in se_fx.report(lean).steps}
    assert said["recompute_activations"] == [activations]
    assert said["recompute_products"] == [products]
    assert said["recompute_readers"] == [readers]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    model, lean = optimized(Residual())
    rounded = X.to(dtype)
    _, own, _ = step(model.to(dtype), rounded)
    _, other, _ = step(lean.to(dtype), rounded)
    _, exact, _ = step(model.double(), rounded.double())
    for a, b, gradient in zip(other, own, exact, strict=True):
        assert (a - gradient).norm() <= 2 * (b - gradient).norm() + 1e-3 * gradient.norm()
