"""Capture runs every model exactly as it ran before, whatever its code does. Each test is one way tracing can go wrong."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import random
import types
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.checkpoint import checkpoint

import se_fx
from se_fx.capture import capture


class Model(nn.Module):
    """Two convs, of names `first` and `second`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def rewritten(model: nn.Module, sites: int = 2) -> nn.Module:
    result = se_fx.transform(model, min_channels=1, latent_channels=2, init="identity")
    assert len(se_fx.report(result).sites) == sites, str(se_fx.report(result))
    return result


def outputs(model: nn.Module, *args, **kwargs):
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    return model(*args, **kwargs)


def assert_same(model: nn.Module, result: nn.Module, *args, modes: tuple[bool, ...] = (True, False, True), **kwargs) -> None:
    for training in modes:
        model.train(training)
        result.train(training)
        expected = outputs(model, *args, **kwargs)
        actual = outputs(result, *args, **kwargs)
        assert torch.equal(actual, expected), f"{training=}"


X = torch.randn(2, 3, 8, 8)


# ------------------------------------------------------------------------------------------------------------------ modes
def test_one_graph_where_the_modes_agree() -> None:
    (region,) = capture(Model()).regions
    assert region.graphs[True] is region.graphs[False]


class DropsOut(Model):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.second(F.dropout(self.first(x), 0.5, self.training)), 0.5, training=self.training)


class BranchesOnMode(Model):
    def forward(self, x: Tensor):
        x = self.first(x)
        return (self.second(x), x) if self.training else self.second(x)


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


# ----------------------------------------------------------------------------------------------- code that can't be traced
class Branches(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if x.sum() > 0 else self.second(-x)


class Iterates(Model):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.second(self.first(sample[None]))[0] for sample in x])


class Optional(Model):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.first(x)
        if mask is not None:
            x = x * mask
        return self.second(x)


class NoGrad(Model):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(x)
        return self.second(x)


class Autocasts(Model):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            x = self.first(x.float())
        return self.second(x)


class Counts(Model):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        return self.second(self.first(x)) * self.calls


class DrawsNumbers(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * random.random() * np.random.rand() * torch.empty(1).uniform_()


class Checkpoints(Model):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.second, self.first(x), use_reentrant=False)


class ChecksPoints(Model):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.act, self.second(self.first(x)), use_reentrant=False)


UNTRACEABLE = [Branches, Iterates, Optional, NoGrad, Autocasts, Counts, DrawsNumbers, Checkpoints, ChecksPoints]


@pytest.mark.parametrize("kind", UNTRACEABLE)
def test_an_untraceable_root_keeps_its_class_and_runs_its_own_code(kind: type[nn.Module]) -> None:
    model = kind()
    result = rewritten(model)
    assert type(result) is kind
    assert result is not model
    assert_same(model, result, X)
    assert [name for name, _ in se_fx.report(result).opaque] == [""]
    state = result.state_dict()
    assert "first.squeeze_excite.fc1.weight" in state
    assert state["first.weight"] is not None
    assert torch.equal(outputs(copy.deepcopy(result), X), outputs(result, X)) or kind is Counts
    assert type(se_fx.remove(result)) is kind
    assert se_fx.remove(result).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("kind", [kind for kind in UNTRACEABLE if kind is not Optional])  # as called here, it can be traced
def test_an_untraceable_submodule_stays_a_call_in_its_parents_graph(kind: type[nn.Module]) -> None:
    model = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 3, 1), body=kind(), head=nn.Conv2d(8, 4, 1)))
    result = rewritten(model, 4)
    assert isinstance(result, fx.GraphModule)
    assert [n.target for n in result.graph.nodes if n.op == "call_module"] == [
        "stem", "squeeze_excite.stem", "body", "head", "squeeze_excite.head",
    ]  # fmt: skip
    assert isinstance(result.body, kind)
    if kind is not Counts:
        assert_same(model, result, X)
    for copied in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert copied.state_dict().keys() == result.state_dict().keys()


def test_blocks_in_untraceable_code_do_scale() -> None:
    model = Branches()
    result = se_fx.transform(model, min_channels=1, latent_channels=2)
    first, second = result.first, result.second
    x = model.first(X) * first.squeeze_excite.excitation(model.first(X))
    sign = 1 if x.sum() > 0 else -1
    expected = second.squeeze_excite(model.second(sign * x))
    assert torch.equal(result(X), expected)
    assert type(first) is nn.Conv2d
    assert first.stride == (1, 1)


def test_state_kept_in_attributes_goes_on_being_kept() -> None:
    model = Counts()
    result = rewritten(model)
    result(X), result(X)
    assert (result.calls, result.seen) == (2, [1, 2])
    assert (model.calls, model.seen) == (0, [])


def test_optional_arguments_work_with_and_without() -> None:
    model = Optional()
    result = rewritten(model)
    mask = (torch.rand(2, 8, 1, 1) > 0.5).float()
    assert_same(model, result, X)
    assert_same(model, result, X, mask)
    assert_same(model, result, X, mask=mask)


def test_an_optional_number_is_just_an_argument() -> None:
    class Scaled(Model):
        def forward(self, x: Tensor, scale: float = 2.0, *, shift: float = 1.0) -> Tensor:
            return self.second(self.first(x)) * scale + shift

    model = Scaled()
    result = rewritten(model)
    assert isinstance(result, fx.GraphModule)
    assert_same(model, result, X)
    assert_same(model, result, X, 3.0, shift=4.0)


def test_gradients_stop_where_they_stopped() -> None:
    result = rewritten(NoGrad())
    result(X).sum().backward()
    assert result.first.weight.grad is None
    assert result.second.weight.grad is not None


def test_a_region_inside_untraceable_code_is_a_graph_of_the_modules_own_class() -> None:
    class Backbone(Model):
        out_channels = 8

        def describe(self) -> str:
            return f"{type(self).__name__} of {self.out_channels}"

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Backbone()

        def forward(self, images: list[Tensor]) -> list[Tensor]:
            return [self.backbone(image[None]) for image in images]

    model = Detector()
    result = rewritten(model)
    assert se_fx.report(result).regions == ("backbone",)
    assert isinstance(result.backbone, type(model.backbone))
    assert result.backbone.describe() == "Backbone of 8"
    assert "backbone.squeeze_excite.first.fc1.weight" in result.state_dict()
    for each in (result, copy.deepcopy(result)):
        assert all(map(torch.equal, each([X[0], X[1]]), model([X[0], X[1]])))
    assert torch.equal(torch.compile(result.backbone, fullgraph=True, backend="eager")(X), model.backbone(X))


def test_a_sequential_may_be_iterated_by_its_owner() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 8, 1)))
            self.pieces = nn.ModuleDict({"a": nn.ModuleList([nn.Conv2d(8, 8, 1)])})

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 1e9:
                return x
            for layer in self.body:
                x = layer(x)
            return self.pieces["a"][0](x)

    model = Owner()
    result = se_fx.transform(model, min_channels=1, latent_channels=2)
    for name in ("body.0", "body.2.0", "pieces.a.0"):
        assert f"{name}.squeeze_excite.fc1.weight" in result.state_dict()
    blocks = [module for module in result.modules() if isinstance(module, se_fx.SqueezeExcite2d)]
    calls: list[nn.Module] = []
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: calls.append(module))
    result(X)
    assert calls == blocks


def test_submodules_whose_methods_are_called_are_not_captured_whole() -> None:
    class Wrapped(Model):
        def features(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Wrapped()

        def forward(self, x: Tensor) -> Tensor:
            x = self.net.features(x)
            return x if x.sum() > 0 else -x

    result = rewritten(Owner())
    assert {"net.first.squeeze_excite.fc1.weight", "net.second.squeeze_excite.fc1.weight"} <= result.state_dict().keys()


def test_a_conv_called_from_two_regions_has_one_block_applied_once_a_call() -> None:
    class Half(nn.Module):
        def __init__(self, conv: nn.Conv2d) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.sum() > 0 else self.conv(-x)

    shared = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(shared, Half(shared))
    result = se_fx.transform(model, min_channels=1, latent_channels=2)
    assert [key for key in result.state_dict() if "squeeze" in key and key.startswith("0.")] == [
        "0.squeeze_excite.fc1.weight", "0.squeeze_excite.fc2.weight",
    ]  # fmt: skip
    block = result.get_submodule("0.squeeze_excite")
    x = block(shared(X))
    x = block(shared(x if x.sum() > 0 else -x))
    assert torch.equal(result(X), x)


class Recorder:
    """An object that is no module, as feature extractors have it."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = {}

    def hook(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.seen.setdefault(name, []).append(output)


class HooksIntoObjects(Model):
    def __init__(self) -> None:
        super().__init__()
        self.recorder = Recorder()
        self.first.register_forward_hook(functools.partial(self.recorder.hook, "first"))

    def forward(self, x: Tensor) -> list[Tensor]:
        self.recorder.seen.clear()
        x = super().forward(x)
        return [*self.recorder.seen["first"], x]


class CountsInObjects(Model):
    def __init__(self) -> None:
        super().__init__()
        self.recorder = Recorder()

    def forward(self, x: Tensor) -> Tensor:
        self.recorder.seen.setdefault("calls", []).append(x)
        return super().forward(x)


def test_state_kept_in_other_objects_goes_on_being_kept() -> None:
    model = HooksIntoObjects()
    expected, actual = model(X), rewritten(model)(X)
    assert len(actual) == len(expected) == 2
    assert all(map(torch.equal, actual, expected))

    model = CountsInObjects()
    result = rewritten(model)
    assert model.recorder.seen == {}
    result(X), result(X)
    assert len(result.recorder.seen["calls"]) == 2


def test_timms_feature_extractor_by_hooks() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("mobilenetv3_small_050", features_only=True, feature_cls="hook").eval()
    result = se_fx.transform(model, min_channels=1, latent_channels=2, init="identity")
    x = torch.randn(1, 3, 64, 64)
    expected, actual = model(x), result(x)
    assert len(actual) == len(expected) == 5
    assert all(map(torch.equal, actual, expected))
    assert all(map(torch.equal, copy.deepcopy(result)(x), expected))


def test_a_forward_replaced_on_the_instance_is_the_one_that_runs() -> None:
    model = Model()

    def doubled(self: Model, x: Tensor) -> Tensor:
        return 2 * Model.forward(self, x)

    model.forward = types.MethodType(doubled, model)
    result = rewritten(model)
    assert_same(model, result, X)
    nested = nn.Sequential(model, nn.Conv2d(8, 8, 1))
    assert_same(nested, rewritten(nested, 3), X)


class FreezesNorm(nn.Sequential):
    """Keeps its norm in eval mode whatever it is told, as detection backbones do."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))

    def train(self, mode: bool = True):
        super().train(mode)
        self[1].eval()
        return self


class Doubles(Model):
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


class KeepsExtraState(Model):
    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state) -> None:
        self.version = state["version"]


@pytest.mark.parametrize("kind", [FreezesNorm, Doubles, KeepsExtraState])
def test_methods_of_every_module_that_a_model_overrides_stay_overridden(kind: type[nn.Module]) -> None:
    model = kind()
    result = rewritten(model)
    assert isinstance(result, fx.GraphModule)
    assert isinstance(result, kind)
    for each in (result, copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert_same(model, each, X)
        each.load_state_dict(each.state_dict())
        assert getattr(each, "version", 3) == 3
        if kind is FreezesNorm:
            assert not each.train()[1].training
        if kind is not Doubles:  # dynamo compiles forward alone
            assert torch.equal(torch.compile(each.eval(), fullgraph=True, backend="eager")(X), model.eval()(X))
    assert set(model.state_dict()) <= set(result.state_dict())
    assert type(se_fx.remove(result)) is kind
    twice = rewritten(result)
    assert twice.state_dict().keys() == result.state_dict().keys()
    assert_same(model, twice, X)


# ---------------------------------------------------------------------------------------------------- what tracing drops
class DropPath(Model):
    """Stochastic depth in the way of EfficientNet-Lite0: a random tensor of a traced size."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training:
            x = x * torch.floor(0.5 + torch.rand([x.size(0), 1, 1, 1], dtype=x.dtype, device=x.device))
        return self.second(x) + torch.randn(1)


class ChecksTypes(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        xs = [x] if isinstance(x, Tensor) else x
        assert torch.is_tensor(x)
        assert not isinstance(x, (list, tuple, dict))
        return self.second(torch.cat(xs))


class Buffers(Model):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.ones(1))
        self.register_buffer("b", torch.ones(1), persistent=False)
        self.plain = torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        self.a.add_(1)
        return self.second(self.first(x)) * (self.a + self.b) + self.plain + torch.tensor([0.25])


class InPlace(Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        F.relu_(y)
        y.mul_(2)
        y[:, 0] = 0
        return self.second(y)


@pytest.mark.parametrize("kind", [DropPath, ChecksTypes, InPlace])
def test_traced_whole_and_exact(kind: type[nn.Module]) -> None:
    model = kind()
    result = rewritten(model)
    assert isinstance(result, fx.GraphModule)
    assert_same(model, result, X)
    assert_same(model, result, torch.randn(5, 3, 6, 9))


def test_buffers_and_constants_are_read_at_each_call() -> None:
    model, reference = Buffers(), Buffers()
    reference.load_state_dict(model.state_dict())
    result = rewritten(model)
    assert isinstance(result, fx.GraphModule)
    assert set(result.state_dict()) - set(model.state_dict()) == {k for k in result.state_dict() if "squeeze_excite" in k}
    for _ in range(3):
        assert torch.equal(result(X), reference(X))
    assert torch.equal(result.a, torch.tensor([4.0]))
    result.b.fill_(5)
    reference.b.fill_(5)
    assert torch.equal(result(X), reference(X))
    for copied in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        fresh = copy.deepcopy(reference)
        assert torch.equal(copied(X), fresh(X))
    assert result.double()(X.double()).dtype == torch.float64
    removed = se_fx.remove(result)
    assert set(removed.__dict__) == set(model.__dict__)


Pair = namedtuple("Pair", ["a", "b"])


@dataclass
class Result:
    out: Tensor
    aux: Tensor | None = None


@pytest.mark.parametrize(
    "structure",
    [
        lambda a, b: Pair(a, b),
        lambda a, b: OrderedDict(out=a, aux=b),
        lambda a, b: {"out": a, "nested": [b, (a, None, 3)]},
        lambda a, b: Result(a, b),
        lambda a, b: [a, b],
    ],
)
def test_outputs_keep_their_structure_and_types(structure) -> None:
    class Structured(Model):
        def forward(self, x: Tensor):
            a = self.first(x)
            return structure(a, self.second(a))

    model = Structured()
    result = rewritten(model)
    assert isinstance(result, fx.GraphModule)
    with torch.no_grad():
        expected, actual = model(X), result(X)
    assert type(actual) is type(expected)
    assert repr(actual) == repr(expected)


def test_keyword_arguments_and_nested_inputs() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Model()

        def forward(self, batch: dict[str, Tensor], *, flip: Tensor) -> Tensor:
            return self.inner(x=batch["image"]) * flip

    model = Keywords()
    assert_same(model, rewritten(model), {"image": X}, flip=torch.tensor(-1.0))


def test_hooks_fire_as_often_as_before_on_every_level() -> None:
    calls: list[str] = []

    def note(name: str, *args) -> None:
        calls.append(name)

    model = nn.Sequential(OrderedDict(a=Model(), b=nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())))
    for name, module in model.named_modules():
        module.register_forward_hook(functools.partial(note, f"forward {name}"))
        module.register_forward_pre_hook(functools.partial(note, f"pre {name}"))
        module.register_full_backward_hook(functools.partial(note, f"backward {name}"))
        module.register_state_dict_post_hook(functools.partial(note, f"state {name}"))
    result = rewritten(model, 3)
    for each in (result, copy.deepcopy(result), pickle.loads(pickle.dumps(se_fx.transform(Model(), min_channels=1)))):
        each(X)
    for hooked in (model, result):
        calls.clear()
        hooked(X.clone().requires_grad_()).sum().backward()
        hooked.state_dict()
        if hooked is model:
            expected = sorted(calls)
    assert sorted(calls) == expected


def test_hooks_that_change_values_go_on_changing_them() -> None:
    model = nn.Sequential(Model(), nn.Conv2d(8, 8, 1))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    model[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert_same(model, rewritten(model, 3), X)


def test_a_hook_that_is_a_models_own_method_acts_on_the_copy() -> None:
    class Hooked(Model):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0
            self.first.register_forward_hook(self.look)

        def look(self, module, args, output) -> None:
            self.seen += 1

    model = Hooked()
    result = rewritten(model)
    result(X)
    assert (model.seen, result.seen) == (0, 1)


@pytest.mark.parametrize(
    "normalise",
    [
        weight_norm,
        nn.utils.spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_parametrized_convs(normalise) -> None:
    model = Model()
    normalise(model.first)
    model(X)  # spectral norms estimate as they go
    reference = Model()
    normalise(reference.first)
    reference.load_state_dict(model.state_dict())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    result = rewritten(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    state = result.state_dict(keep_vars=True)
    assert all(state[key] is value for key, value in model.state_dict(keep_vars=True).items())
    assert_same(reference, result, X)
    result(X).sum().backward()
    assert all(p.grad is not None for n, p in result.first.named_parameters() if "squeeze" not in n and n != "bias")


def test_conv_subclasses_are_sites() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, w, self.bias, self.stride, self.padding)

    model = nn.Sequential(Standardized(3, 8, 3), nn.ReLU())
    result = rewritten(model, 1)
    assert_same(model, result, X)
    assert type(result.get_submodule("0")) is Standardized


def test_tied_parameters_and_modules_stay_tied() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ReLU())
    model[1].weight = model[0].weight
    model.append(model[0])
    result = rewritten(model, 2)
    assert list(se_fx.remove(result).state_dict()) == list(model.state_dict())
    assert set(model.state_dict()) <= set(result.state_dict())
    assert result.get_submodule("1").weight is model[0].weight
    assert_same(model, result, X)


def test_attributes_survive() -> None:
    model = Model()
    model.num_classes = 7
    model.first.note = {"k": [1]}
    model.alias = [model.first, {"second": model.second}]
    model.second.requires_grad_(False)
    result = rewritten(model)
    assert result.num_classes == 7
    assert result.first.note == {"k": [1]}
    assert result.alias[0] is result.first
    assert result.alias[1]["second"] is result.second
    assert result.alias[0] is not model.first
    assert [n for n, p in result.named_parameters() if not p.requires_grad] == ["second.weight", "second.bias"]


def test_modules_kept_in_plain_lists_are_called_in_the_copy() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.order = [self.a, self.b]

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.order:
                x = layer(x)
            return x

    model = Listed()
    assert_same(model, rewritten(model), X)


def test_an_own_child_called_squeeze_excite_is_respected() -> None:
    class Own(Model):
        def __init__(self) -> None:
            super().__init__()
            self.squeeze_excite = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.squeeze_excite(super().forward(x))

    model = Own()
    result = se_fx.transform(model, min_channels=1, latent_channels=2, init="identity")
    assert_same(model, result, X)
    assert set(model.state_dict()) <= set(result.state_dict())
    assert all("squeeze_excite" in key.split(".") for key in set(result.state_dict()) - set(model.state_dict()))
    assert se_fx.remove(result).state_dict().keys() == model.state_dict().keys()


def test_an_error_while_tracing_leaves_everything_as_it_was() -> None:
    class Interrupts(Model):
        def forward(self, x: Tensor) -> Tensor:
            self.first(x)
            raise KeyboardInterrupt

    model = Interrupts()
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    call, getattribute = nn.Module.__call__, nn.Module.__getattr__
    state = torch.get_rng_state()
    with contextlib.suppress(KeyboardInterrupt):
        se_fx.transform(model)
        pytest.fail("should have been interrupted")
    assert (nn.Module.__call__, nn.Module.__getattr__) == (call, getattribute)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == attributes
    assert rewritten(Model()) is not None


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


# ------------------------------------------------------------------------------------------------ what graphs can't answer
class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return -gradient


def run_body(body, *args, sites: int = 1, calls: int = 2, **kwargs) -> nn.Module:
    """Check a model whose forward is `body(self, x)` with one conv, in both modes, called repeatedly; returns the result."""

    class OneConv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.register_buffer("buf", torch.full((1,), 2.0))

        forward = body

    model = OneConv()
    result = rewritten(model, sites)
    for training in (False, True):
        model.train(training), result.train(training)
        for _ in range(calls):
            theirs, ours = copy.deepcopy(args), copy.deepcopy(args)
            expected = outputs(model, *theirs, **kwargs)
            actual = outputs(result, *ours, **kwargs)
            assert torch.equal(actual, expected)
            assert all(not isinstance(a, Tensor) or torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
    return result


def accumulates(self, x):
    total = torch.zeros(1, 3, 1, 1)
    for _ in range(2):
        total += self.conv(x).mean((0, 2, 3), keepdim=True)
    return total


def fills_a_constant(self, x):
    out = torch.zeros(2, 3, 8, 8)
    out[:, 1] = self.conv(x)[:, 1]
    out.add_(1)
    return out


def augments_an_alias(self, x):
    y = self.conv(x)
    alias = y
    y += 1
    view = y[:, :1]
    view *= 5
    x -= 1
    return alias


def sums_parameters(self, x):
    return self.conv(x) * self.conv._parameters["weight"].square().sum() * dict(self.named_buffers())["buf"]


def unpacks_lists(self, x):
    if isinstance(x, (list, tuple)):
        x = x[0]
    return self.conv(x)


def checks_sizes(self, x):
    size = x.shape[-2:]
    if not isinstance(size, (tuple, list)):
        size = (size, size)
    return F.interpolate(self.conv(x), size=size)


def asks_for_attributes(self, x):
    if hasattr(x, "tensors"):
        x = x.tensors
    return self.conv(x)


def looks_up_a_dtype(self, x):
    y = self.conv(x)
    return y * {3: 2.0}.get(x.shape[1], 1.0) if x.dtype in {torch.float32} else y


def sets_data(self, x):
    x.data = x.data.clamp(0)
    return self.conv(x)


def catches_errors(self, x):
    y = self.conv(x)
    try:
        if x.sum() > -1e9:
            y = y * 2
    except Exception:
        pass
    return y


def asks_for_the_grad_mode(self, x):
    return self.conv(x) * (1 if torch.is_grad_enabled() else 2)


def seeds(self, x):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return self.conv(x) + torch.randn(1, 3, 1, 1)


BODIES = [
    lambda self, x: Reverse.apply(self.conv(x)),
    lambda self, x: torch.as_tensor(self.conv(x)) * 2,
    accumulates, fills_a_constant, augments_an_alias, sums_parameters, unpacks_lists, checks_sizes, asks_for_attributes,
    looks_up_a_dtype, sets_data, catches_errors, asks_for_the_grad_mode, seeds,
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
def test_questions_and_side_effects_of_code(body) -> None:
    run_body(body, X)


def test_code_that_goes_through_all_parameters_finds_the_blocks_among_them() -> None:
    class Penalised(Model):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + sum(p.square().sum() for p in self.parameters())

    result = rewritten(Penalised())  # a limit: else optimizers wouldn't find them either
    penalty = sum(p.square().sum() for p in result.parameters())
    assert torch.equal(result(X), result.second(result.first(X)) + penalty)
    assert any("squeeze_excite" in name for name, p in result.named_parameters() if p.any())


def test_backward_passes_of_custom_functions_are_kept() -> None:
    result = run_body(BODIES[0], X)
    x = X.clone().requires_grad_()
    result(x).sum().backward()
    ones = torch.ones(2, 3, 8, 8)
    expected = torch.nn.grad.conv2d_input(x.shape, result.conv.weight, -ones, padding=1)
    torch.testing.assert_close(x.grad, expected)


def test_lists_where_lists_are_taken() -> None:
    run_body(unpacks_lists, [X])


def test_parameters_are_read_at_each_call() -> None:
    result = run_body(sums_parameters, X)
    before = result(X)
    with torch.no_grad():
        result.buf.mul_(3)
    assert torch.equal(result(X), before * 3)


def mask_or_none(self, x, mask):
    y = self.conv(x)
    return y if mask is None else y * mask


def one_or_the_other(self, x, a=None, b=None):
    y = self.conv(x)
    return y + b if (a is None and b is not None) else y


def keywords(self, x, **options):
    y = self.conv(x)
    return y * options["mask"] if options.get("mask") is not None else y


@pytest.mark.parametrize("mask", [None, torch.tensor(2.0)])
def test_none_and_optional_arguments(mask) -> None:
    run_body(mask_or_none, X, mask)
    run_body(one_or_the_other, X, b=mask)
    run_body(one_or_the_other, X, a=mask, b=mask)
    run_body(keywords, X, mask=mask)
    run_body(keywords, X)


class Partial(nn.Conv2d):
    def forward(self, x: Tensor):
        return super().forward(x), 1


class ChannelsLast(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).permute(0, 2, 3, 1)


class Doubled(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Partial, ChannelsLast])
def test_conv_subclasses_that_return_something_else_are_skipped(kind: type[nn.Conv2d], dtype: torch.dtype) -> None:
    model = nn.Sequential(kind(3, 8, 1)).to(dtype)
    result = rewritten(model, 0)
    assert repr(result(X.to(dtype))) == repr(model(X.to(dtype)))
    assert se_fx.report(result).skipped[0].reason == "returns something else than a tensor (N, C, H, W)"


def test_leaves_whose_call_is_their_own() -> None:
    model = nn.Sequential(Doubled(3, 8, 1), nn.ReLU())
    assert_same(model, rewritten(model, 1), X)


def test_names_that_containers_have_too() -> None:
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add, self.names = nn.Conv2d(3, 8, 1), nn.Sequential(nn.Conv2d(8, 8, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.names(self.add(x))

    model = Names()
    assert_same(model, rewritten(model), X)
    assert type(se_fx.remove(rewritten(model))) is Names


def test_a_hooked_block_shared_by_two_regions() -> None:
    class Uses(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block, self.conv = block, nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.block(x))

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
            block.register_forward_hook(lambda module, args, output: output * 2)
            self.a, self.z = Uses(block), Uses(block)

        def forward(self, x: Tensor) -> Tensor:
            return self.z(self.a(x)) if float(x.sum()) > -1e9 else x

    model = Owner()
    assert_same(model, rewritten(model, 3), X)


def test_closures_and_hooks_over_the_model_act_on_the_copy() -> None:
    class Closes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.drop = nn.Conv2d(3, 8, 1), nn.Dropout(0.5)
            self.body = lambda x: self.drop(self.conv(x))

        def before(self, x: Tensor) -> Tensor:
            return x * 2

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model = Closes()
    model.register_forward_pre_hook(lambda module, args: (module.before(args[0]),))
    result = rewritten(model, 1)
    assert_same(model, result, X)
    result.eval()
    model.train()
    assert torch.equal(result(X), result(X))


def test_generators_of_the_models_own_are_left_alone() -> None:
    class Draws(Model):
        def __init__(self) -> None:
            super().__init__()
            self.numpy, self.python = np.random.default_rng(0), random.Random(0)
            self.generator = torch.Generator().manual_seed(0)

        def forward(self, x: Tensor) -> Tensor:
            noise = torch.empty(1).normal_(generator=self.generator)
            return super().forward(x) * (self.numpy.random() + self.python.random()) * noise

    model, reference = Draws(), Draws()
    reference.load_state_dict(model.state_dict())
    result = rewritten(model)
    for _ in range(2):
        assert torch.equal(result(X), reference(X))


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
