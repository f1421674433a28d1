"""Moments: compiled, norm and squeeze are of one pass, up to rounding; without `torch.compile` they change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from functorch.compile import make_boxed_func
from recomputed import CHANNELS, UNITS, BeforeNorm, Gate, Mobile, Residual, Step, assert_alike, conv, kept_maps, step
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import gradcheck

import se_fx
from se_fx.rewrites.training.moments import measured

X = torch.randn(3, CHANNELS, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _compiles_anew() -> None:
    torch._dynamo.reset()


def both(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = make().double().train()
    return model, copy.deepcopy(se_fx.optimize_for_training(model, exact=False))


def compiled(model: nn.Module, backend: Any = "aot_eager", **options: Any) -> Any:
    return torch.compile(model, backend=backend, fullgraph=True, **options)


def assert_close(found: Step, expected: Step, tolerance: float = 1e-10) -> None:
    """Outputs, buffers and gradients within so much of their size; gradients that cancel, of the largest's."""
    largest = max(float(each.norm()) for each in expected[1] if each is not None)
    pairs = [(found[0], expected[0], 0.0), *((one, other, 0.0) for one, other in zip(found[2], expected[2], strict=True))]
    for one, other in zip(found[1], expected[1], strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            pairs.append((one, other, 1e-3 * largest))
    for one, other, least in pairs:
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert distance(one, other) <= tolerance * max(float(other.double().norm()), least)


def passes(model: nn.Module) -> int:
    """How many reductions of maps there are in what Dynamo captures, those that nobody reads left out."""
    found: list[int] = []

    def backend(captured: fx.GraphModule, inputs: Any) -> fx.GraphModule:
        captured.graph.eliminate_dead_code()
        calls = [node for node in captured.graph.nodes if node.op.startswith("call")]
        norms = {F.batch_norm, F.group_norm}
        found.append(sum((2, 3) in node.args or (-2, -1) in node.args or node.target in norms for node in calls))
        return captured

    compiled(copy.deepcopy(model), backend)(X)
    return sum(found)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm())


class Both(nn.Module):
    """conv, SE, norm, SE, norm: of one pass over the first convolution's map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = conv(), Gate(), Gate()
        self.norm, self.last = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.norm(self.first(self.conv(x)))))


class Idle(Residual):
    """With modules that do nothing between norm and squeeze, and the average by a module."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.pool, self.linear = nn.Sequential(nn.Identity()), nn.AdaptiveAvgPool2d(1), conv()

    def forward(self, x: Tensor) -> Tensor:
        u = self.idle(self.norm(self.conv(x)))
        return u * self.linear(self.pool(u)).sigmoid() + x


#: Passes over maps, as it is and optimised.
SHARED: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "after a norm": (Residual, 2, 1),
    "before a norm": (BeforeNorm, 2, 1),
    "before and after": (Both, 4, 1),
    "of groups": (lambda: Residual(lambda: nn.GroupNorm(4, CHANNELS)), 2, 1),
    "of one group": (lambda: Residual(lambda: nn.GroupNorm(1, CHANNELS, affine=False)), 2, 1),
    "of each batch alone": (lambda: Residual(lambda: nn.BatchNorm2d(CHANNELS, affine=False, track_running_stats=False)), 2, 1),
    "of timm's": (lambda: Residual(lambda: timm.layers.BatchNormAct2d(CHANNELS, apply_act=False)), 2, 1),
    "se_fx's block": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(CHANNELS), se_fx.SqueezeExcite2d(CHANNELS, 2)), 2, 1),
    "torchvision's block": (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(CHANNELS), torchvision.ops.SqueezeExcitation(CHANNELS, 2)),
        2,
        1,
    ),
    "an activation between": (Mobile, 2, 2),
}


@pytest.mark.parametrize("name", SHARED)
def test_one_pass_serves_norm_and_squeeze(name: str) -> None:
    make, before, after = SHARED[name]
    model, lean = both(make)
    pooling = "torchvision" in name  # whose average is a module's, not over named dimensions
    assert (passes(model) + pooling, passes(lean)) == (before, after)
    assert_close(step(compiled(lean), X), step(model, X))


def test_modules_that_do_nothing_may_stand_between() -> None:
    model, lean = both(Idle)
    assert passes(lean) == 1
    assert_close(step(compiled(lean), X), step(model, X))


def summed(model: nn.Module) -> set[tuple[int, ...]]:
    """The dimensions that maps are summed over in backward."""
    found: set[tuple[int, ...]] = set()

    def look(captured: fx.GraphModule, inputs: Any) -> Any:
        for node in captured.graph.nodes:
            if node.target is torch.ops.aten.native_batch_norm_backward.default:
                found.add((0, 2, 3))
            if node.target is torch.ops.aten.sum.dim_IntList and node.args[0].meta["val"].shape[2:] == X.shape[2:]:
                found.add(tuple(node.args[1]))
        return make_boxed_func(captured)

    backend = aot_autograd(fw_compiler=lambda captured, inputs: make_boxed_func(captured), bw_compiler=look)
    step(compiled(copy.deepcopy(model), backend), X)
    return found


@pytest.mark.parametrize("name", ["after a norm", "before a norm", "before and after", "se_fx's block"])
def test_backward_sums_maps_over_one_range(name: str) -> None:
    """Sums over space alone are of one pass; those over samples, too, would be of another."""
    model, lean = both(SHARED[name][0])
    assert summed(model) == {(2, 3), (0, 2, 3)}
    assert summed(lean) == {(2, 3)}


class IdleBefore(nn.Module):
    """SE before a norm, with modules that do nothing before and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.before, self.behind = conv(), nn.Identity(), nn.Identity()
        self.linear, self.norm = conv(), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        u = self.before(self.conv(x))
        return self.norm(self.behind(u * self.linear(u.mean((2, 3), keepdim=True)).sigmoid()))


LATER = [(Idle, name) for name in ("idle", "idle.0", "pool", "linear")]
LATER += [(IdleBefore, name) for name in ("before", "behind", "linear")]


@pytest.mark.parametrize(("make", "name"), LATER)
def test_hooks_that_are_registered_later_change_what_they_do(make: Callable[[], nn.Module], name: str) -> None:
    """On what does nothing between norm, squeeze and product, what pools, and what makes the gate."""
    model, lean = both(make)
    for each in (model, lean):
        each.get_submodule(name).register_forward_hook(lambda module, inputs, output: output.square())
    assert_close(step(compiled(lean), X), step(model, X))


OTHERS = {
    "idle": nn.Tanh(),
    "pool": nn.AdaptiveMaxPool2d(1),
    "pool, of another size": nn.AdaptiveAvgPool2d(X.shape[2:]),
    "linear": nn.Sequential(conv(), nn.Tanh()).double(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_put_in_a_place_later_runs(name: str) -> None:
    model, lean = both(Idle)
    for each in (model, lean):
        setattr(each, name.partition(",")[0], copy.deepcopy(OTHERS[name]))
    assert_close(step(compiled(lean), X), step(model, X))


class Expanded(Residual):
    """A gate without an activation, expanded, and as the product's first factor; its result is squeezed once more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(self.conv(x))
        y = self.first(u.mean((2, 3), keepdim=True)).expand_as(u) * u
        return y * self.second(y.mean((2, 3), keepdim=True)).sigmoid() + u


def test_gates_in_other_forms() -> None:
    model, lean = both(Expanded)
    assert_close(step(compiled(copy.deepcopy(lean)), X), step(copy.deepcopy(model), X))
    assert_close(step(lean, X), step(model, X))


class SourceChanged(nn.Module):
    """What the first convolution gives is changed in place when it has been scaled, or normalised, and is read no more."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.conv, self.linear = conv(), conv()
        self.first, self.last = nn.BatchNorm2d(CHANNELS) if norm_first else nn.Identity(), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        source = self.conv(x)
        u = self.first(source)
        gate = self.linear(u.mean((2, 3), keepdim=True)).sigmoid()
        if isinstance(self.first, nn.Identity):
            u = u * gate
            source.exp_()
            return self.last(u)
        source.exp_()
        return self.last(u * gate)


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_source_that_is_changed_in_place_is_not_read_again(norm_first: bool) -> None:
    model, lean = both(lambda: SourceChanged(norm_first))
    with torch.no_grad():  # autograd would refuse it
        assert_close((compiled(lean)(X), [X], list(lean.buffers())), (model(X), [X], list(model.buffers())))


@pytest.mark.parametrize("make", [lambda: nn.BatchNorm2d(CHANNELS), lambda: nn.GroupNorm(4, CHANNELS)], ids=["batch", "group"])
@pytest.mark.parametrize("where", ["before", "after"])
def test_hooks_of_norms_registered_later_see_and_change_what_they_do(where: str, make: Callable[[], nn.Module]) -> None:
    """What a norm is given, or gives, isn't what has the moments that are known, then."""
    model, lean = both(lambda: Residual(make))
    for each in (model, lean):
        if where == "before":
            each.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0].square(),))
        else:
            each.norm.register_forward_hook(lambda module, inputs, output: output.square())
    assert_close(step(compiled(lean), X), step(model, X))


def test_models_in_bfloat16_stay_in_it() -> None:
    model, lean = (each.bfloat16() for each in both(Residual))
    found, expected = compiled(lean)(X.bfloat16()), model(X.bfloat16())
    assert found.dtype == expected.dtype == torch.bfloat16
    largest = float(expected.detach().double().norm())
    assert distance(found.detach(), expected.detach()) <= 2e-2 * largest  # several roundings of 2^-9


def test_moments_are_of_maps_of_real_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert measured(X) is not None
    assert measured(X[0]) is None
    assert measured(X.to(torch.complex128)) is None


@pytest.mark.parametrize("name", UNITS)
def test_without_compiling_it_is_exact_and_keeps_as_little(name: str) -> None:
    make, _, kept = UNITS[name]
    model, lean = both(make)
    assert kept_maps(copy.deepcopy(lean), X) == kept
    assert_alike(step(lean, X), step(model, X))


@pytest.mark.parametrize("make", [Residual, BeforeNorm])
def test_gradients(make: Callable[[], nn.Module]) -> None:
    _, lean = both(make)
    call, x = compiled(lean), X[:2, :, :2, :3].clone().requires_grad_()
    assert gradcheck(lambda x, *_: call(x), (x, *(p for p in lean.parameters() if p.ndim < 3)), atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_in_lower_precision_it_is_as_near_to_the_truth(layout: torch.memory_format, dtype: torch.dtype) -> None:
    """No further from float64 than twice what the model is: outputs, all gradients together, all statistics together."""

    def make() -> nn.Module:
        return nn.Sequential(conv(), nn.BatchNorm2d(CHANNELS), Gate(), conv(), Gate(), nn.BatchNorm2d(CHANNELS))

    model, lean = (each.float().to(memory_format=layout) for each in both(make))
    x = torch.randn(8, CHANNELS, 16, 16).contiguous(memory_format=layout)

    def lower(model: nn.Module, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(x)

    truth = step(copy.deepcopy(model).double(), x.double())
    call = compiled(lean)
    found, expected = step(lean, x, lambda _, x: lower(call, x)), step(model, x, lower)
    assert found[0].dtype == expected[0].dtype
    assert distance(found[0], truth[0]) <= 2 * distance(expected[0], truth[0])
    for place in (1, 2):
        errors = [
            sum(distance(one, goal) ** 2 for one, goal in zip(each[place], truth[place], strict=True) if one is not None)
            for each in (found, expected)
        ]
        assert errors[0] <= 4 * errors[1]  # of squares


def test_running_statistics_are_updated_once_a_step() -> None:
    model, lean = both(lambda: Residual(lambda: nn.BatchNorm2d(CHANNELS, momentum=0.3)))
    call = compiled(lean)
    for scale in (1, 2, 3):
        call(X * scale)
        model(X * scale)
    assert int(lean.norm.num_batches_tracked) == 3
    assert_close((X, [X], list(lean.buffers())), (X, [X], list(model.buffers())))


def test_frozen_norms_keep_their_statistics() -> None:
    model, lean = both(Residual)
    for each in (model, lean):
        each(X)
        each.norm.eval()
    assert_close(step(compiled(lean), X), step(model, X))


def test_a_batch_of_another_size_and_evaluation() -> None:
    model, lean = both(Residual)
    call = compiled(lean, dynamic=True)
    for x in (X, X[:2], X[:1]):
        assert_close(step(call, x), step(model, x))
    assert_close(step(compiled(lean.eval()), X), step(model.eval(), X))


def test_too_few_values_are_refused_as_ever() -> None:
    model, lean = both(Residual)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(X[:1, :, :1, :1])
    with pytest.raises(Exception, match="Expected more than 1 value per channel"):
        compiled(lean)(X[:1, :, :1, :1])


class Changed(nn.Module):
    """A map with moments, or its product with a gate, changed in place before it is read."""

    def __init__(self, what: str, last: type[nn.Module]) -> None:
        super().__init__()
        self.what, self.conv, self.linear = what, conv(), nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.norm, self.last = nn.BatchNorm2d(CHANNELS), last(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(self.conv(x))
        if self.what == "before it is averaged":
            u.square_().add_(1)
        gate = self.linear(u.mean((2, 3), keepdim=True)).sigmoid()
        if self.what == "before it is scaled":
            u.exp_()
        if self.what == "before it is scaled, by another name":
            u.flatten(2).exp_()
        if self.what == "by being scaled":
            view = u[:]
            u.mul_(gate)
            return self.last(view)
        y = u * gate
        if self.what == "the product":
            y.exp_()
        return self.last(y)


WHEN = [
    "before it is averaged",
    "before it is scaled",
    "before it is scaled, by another name",
    "by being scaled",
    "the product",
]


@pytest.mark.parametrize("what", ["nothing", *WHEN])
@pytest.mark.parametrize("last", [nn.Identity, nn.BatchNorm2d])
def test_what_is_changed_in_place_has_other_moments(last: type[nn.Module], what: str) -> None:
    model, lean = both(lambda: Changed(what, last))
    assert_close(step(compiled(lean), X), step(model, X))
    assert_close(step(lean, X), step(model, X))


class Parts(nn.Module):
    """Averages over a part of the map, or of some of the channels, are no squeezes of all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(self.conv(x))
        part = u[:, :, 1:].mean((2, 3), keepdim=True) + u.amax((2, 3), keepdim=True) + u.mean((1, 2, 3), keepdim=True)
        return u * part.sigmoid()


def test_other_reductions_are_left_alone() -> None:
    model, lean = both(Parts)
    assert se_fx.report(lean).steps[0].changes == ()
    assert_close(step(compiled(lean), X), step(model, X))


def test_norms_with_hooks_and_of_several_processes_are_left_alone() -> None:
    for make in (lambda: Residual(lambda: nn.SyncBatchNorm(CHANNELS)), hooked):
        assert se_fx.report(se_fx.optimize_for_training(make(), exact=False)).steps[0].changes == ()


def hooked() -> nn.Module:
    model = Residual()
    model.norm.register_forward_hook(lambda module, args, out: 2 * out)
    return model


@pytest.mark.integration
@pytest.mark.parametrize(
    "name", ["seresnet18", "residual", "conv", "norm", "regnety_002", "ecaresnet26t", "mobilenetv3_small_050"]
)
def test_networks(name: str) -> None:
    """In float64, compiled as one graph."""
    placements = {"residual", "conv", "norm"}
    resnet, options = torchvision.models.resnet18, {"placement": name, "min_channels": 64, "latent_channels": 8}
    model, lean = both(lambda: se_fx.transform(resnet(), **options) if name in placements else timm.create_model(name))
    for module in (*model.modules(), *lean.modules()):
        if isinstance(module, nn.BatchNorm2d) and module.weight is not None:
            nn.init.constant_(module.weight, 0.7)  # timm starts some at 0
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    assert_close(step(compiled(lean), x), step(model, x), 1e-9)
