"""What people and their tools do to a rewritten model afterwards: it goes on agreeing with the original, or says no."""

from __future__ import annotations

import copy
import operator
import pickle
import unittest.mock
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call, stack_module_state
from torch.fx.experimental.optimization import fuse
from torchvision.models._utils import IntermediateLayerGetter
from trained import settled

import se_fx

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PLACEMENTS = ["conv", "norm", "activation", "residual", "pre", "post", "identity"]


class Unit(nn.Module):
    """A residual unit whose activations are functions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)
        self.strength = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(x + self.strength * y)


class Network(nn.Module):
    """With a stem, two stages, methods, and attributes that its code reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.stages = nn.Sequential(Unit(8), Unit(8))
        self.head = nn.Linear(8, 2)
        self.options = {"temperature": 1.0}
        self.pooled = True

    def features(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return self.head(y.mean((2, 3))) / self.options["temperature"] if self.pooled else y


def network() -> Network:
    return settled(Network())


def transformed(model: nn.Module, **options) -> nn.Module:
    return se_fx.transform(model, min_channels=1, latent_channels=4, **options)


def applied(model: nn.Module, **options) -> nn.Module:
    model = copy.deepcopy(model)
    se_fx.apply_squeeze_excite(model, latent_channels=4, min_channels=1, **options)
    return model


BOTH = pytest.mark.parametrize("insert", [transformed, applied])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_both_results_have_the_same_keys_and_the_same_function(placement: str) -> None:
    model = network()
    graph, code = (insert(model, placement=placement, seed=1) for insert in (transformed, applied))
    assert graph.state_dict().keys() == code.state_dict().keys()
    assert model.state_dict().keys() < code.state_dict().keys()
    assert isinstance(graph, fx.GraphModule)
    assert not isinstance(code, fx.GraphModule)
    for each in (graph, code):
        assert isinstance(each, Network)
        assert type(each).__name__ == "Network"
        assert torch.equal(each(X), graph(X))
        assert torch.equal(each.features(X), graph.features(X))
        for copied in (copy.deepcopy(each), pickle.loads(pickle.dumps(each))):
            assert torch.equal(copied(X), graph(X))
            assert torch.equal(copied.features(X), graph.features(X))
        assert type(se_fx.remove(each)) is Network
        assert torch.equal(se_fx.remove(each)(X), model(X))
        assert not torch.equal(each(X), model(X))
    graph.load_state_dict(transformed(model, placement=placement, seed=2).state_dict())
    code.load_state_dict(graph.state_dict())
    assert torch.equal(graph(X), code(X))


@pytest.mark.parametrize("placement", PLACEMENTS)
@BOTH
def test_the_models_parts_run_with_their_blocks(insert: Callable[..., nn.Module], placement: str) -> None:
    model = network()
    full = insert(model, placement=placement, init="identity")
    assert torch.equal(full.features(X), model.features(X))
    for block in se_fx.blocks_of(full).values():
        nn.init.normal_(block.fc2.weight)
    expected = full.features(X)
    assert torch.equal(full.stages(full.stem(X)), expected)
    assert torch.equal(full.stages[1](full.stages[0](full.stem(X))), expected)
    parts = IntermediateLayerGetter(full, {"stages": "out"})
    assert torch.equal(parts(X)["out"], expected)
    assert set(map(id, se_fx.remove(full).stages.parameters())) < set(map(id, parts.parameters()))
    assert torch.equal(nn.Sequential(*list(full.children())[:-1])(X), expected)
    assert torch.equal(nn.Sequential(*full.stem, *full.stages)(X), expected)


@BOTH
def test_a_slice_of_a_sequential_has_its_blocks(insert: Callable[..., nn.Module]) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU())
    model = insert(plain)
    assert len(model) == 4
    assert [type(each).__name__ for each in model] == ["Conv2d", "ReLU", "Conv2d", "ReLU"]
    assert isinstance(model[-2], nn.Conv2d)
    part = model[:2]
    assert len(part) == 2
    assert torch.equal(model[2:](part(X)), model(X))
    assert se_fx.blocks_of(model)["0"].fc1.weight in set(part.parameters())
    assert not torch.equal(part(X), plain[:2](X))
    assert torch.equal(copy.deepcopy(part)(X), part(X))


@BOTH
@pytest.mark.parametrize(
    "change",
    {
        "an attribute": lambda m: setattr(m.stages[0], "strength", 0.5),
        "an attribute that is a branch": lambda m: setattr(m, "pooled", False),
        "what an attribute holds": lambda m: m.options.update(temperature=2.0),
        "an attribute of a class": lambda m: setattr(m.stages[1], "strength", torch.tensor(3.0)),
        "a child": lambda m: setattr(m, "head", nn.Linear(8, 5, bias=False)),
        "a stage": lambda m: setattr(m, "stages", nn.Sequential(*m.stages, nn.AvgPool2d(2))),
        "a forward": lambda m: setattr(m.head, "forward", lambda x: x.sum()),
        "the forward of a stage": lambda m: setattr(m.stages, "forward", lambda x: -x),
        "a mode": lambda m: m.stages[0].train(),
        "a hook": lambda m: m.stages.register_forward_hook(lambda module, args, output: 2 * output),
        "a hook before": lambda m: m.stages[1].register_forward_pre_hook(lambda module, args: args[0] + 1),
        "a hook on a leaf": lambda m: m.stages[0].norm1.register_forward_hook(lambda module, args, output: output - 1),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_what_is_changed_afterwards_is_followed(insert: Callable[..., nn.Module], change: tuple[str, Callable]) -> None:
    name, act = change
    model = network()
    full = insert(model, placement="norm", init="identity")
    torch.manual_seed(1)
    act(model)
    torch.manual_seed(1)
    act(full)
    if name == "the forward of a stage":  # a copy's would be the original's
        results = [full]
    else:
        torch._dynamo.reset()
        results = [torch.compile(copy.deepcopy(full), backend="eager"), full, copy.deepcopy(full)]
    for each in results:
        assert torch.equal(each(X), copy.deepcopy(model)(X)), name


def test_when_a_hook_is_gone_the_graph_runs_again() -> None:
    model, seen = transformed(network()), []
    expected = model(X)
    handle = model.stages.register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(model(X), expected)
    assert torch.equal(seen[0], model.features(X))
    handle.remove()
    before = len(seen)
    assert torch.equal(model(X), expected)
    assert len(seen) == before


def test_a_graph_that_was_edited_is_not_given_up_for_code() -> None:
    model = transformed(network())
    for node in list(model.graph.nodes):
        if node.target is operator.truediv:
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)
    model.recompile()
    assert torch.equal(model(X), model(X))
    model.options["temperature"] = 2.0
    with pytest.raises(se_fx.SqueezeExciteError, match=r"'?options.* was changed; its graph .* was edited since"):
        model(X)


@pytest.mark.parametrize("placement", PLACEMENTS)
@BOTH
def test_others_fuse_around_the_blocks(insert: Callable[..., nn.Module], placement: str) -> None:
    full = insert(network(), placement=placement)
    fused = fuse(copy.deepcopy(full))
    torch.testing.assert_close(fused(X), full(X), rtol=1e-4, atol=1e-5)
    left = sum(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert left == {"conv": 5, "norm": 5}.get(placement, left)


def test_fuse_modules_and_folding_by_hand_are_refused() -> None:
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval
    for insert in (transformed, applied):
        full = insert(network(), placement="conv")
        with pytest.raises(AssertionError, match=r'Conv2d scaled by a .*placement="activation" or "residual"'):
            torch.ao.quantization.fuse_modules(full, [["stages.0.conv1", "stages.0.norm1"]])
        unit = full.stages[0]
        plain = se_fx.remove(full).stages[0]
        unit.conv1, unit.norm1 = fused(plain.conv1, plain.norm1), nn.Identity()
        with pytest.raises(se_fx.SqueezeExciteError, match=r'conv1, or replaced, and .*placement="norm"'):
            full(X)
        full = insert(network(), placement="norm")
        del full.stages[1].norm2
        with pytest.raises(se_fx.SqueezeExciteError, match=r"Unit: norm2 was deleted, and with it .*se_fx.remove"):
            full(X)


class Fusible(nn.Module):
    """All that PyTorch fuses in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.conv1, self.norm1, self.relu1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.norm2, self.relu2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv3, self.relu3 = nn.Conv2d(8, 8, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.relu2(self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x))))) + x)
        return self.relu3(self.conv3(x))


FUSIBLE = ["first.0 first.1 first.2", "first.0 first.1", "first.1 first.2", "conv1 norm1 relu1", "conv1 norm1", "norm1 relu1"]
FUSIBLE += ["conv2 norm2", "conv3 relu3"]


@pytest.mark.parametrize("placement", ["conv", "norm", "activation", "residual"])
@BOTH
def test_what_pytorch_fuses_is_right_or_says_what_to_do(insert: Callable[..., nn.Module], placement: str) -> None:
    fuse, refused = torch.ao.quantization.fuse_modules, []
    for names in FUSIBLE:
        model = settled(Fusible())
        torch.testing.assert_close(fuse(model, [names.split()])(X), model(X), rtol=1e-4, atol=1e-5)
        full = insert(model, placement=placement)
        expected = full(X)
        try:
            found = fuse(full, [names.split()])(X)
        except (AssertionError, se_fx.SqueezeExciteError) as error:
            refused.append(str(error))
        else:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    ways_out = ('placement="activation" or "residual"', "se_fx.optimize_for_inference")
    assert all(way in error for error in refused for way in ways_out)
    assert len(refused) == {"conv": 8, "norm": 7, "activation": 5, "residual": 1}[placement]


class Branches(nn.Module):
    """Two convs in training, one for deployment."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.narrow = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        self.act = nn.ReLU()

    def deploy(self) -> None:
        wide, narrow = (torch.nn.utils.fusion.fuse_conv_bn_eval(*branch) for branch in (self.wide, self.narrow))
        self.one = wide
        with torch.no_grad():
            self.one.weight += F.pad(narrow.weight, [1, 1, 1, 1])
            self.one.bias += narrow.bias
        del self.wide, self.narrow

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.one(x) if hasattr(self, "one") else self.wide(x) + self.narrow(x))


class Deployed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unit, self.act = Branches(), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.unit(x))


@BOTH
def test_convs_that_are_folded_into_one(insert: Callable[..., nn.Module]) -> None:
    model = Deployed().eval()
    for placement, where in (("conv", "unit.*"), ("norm", None)):
        full = insert(model, placement=placement, where=where)
        full.unit.deploy()
        with pytest.raises(se_fx.SqueezeExciteError, match=r"Branches: wide was deleted.*placement=\"activation\""):
            full(X)
    full = insert(model, where="act")
    expected = full(X)
    full.unit.deploy()
    torch.testing.assert_close(full(X), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(full(X), full.act(full.unit(X)))


@BOTH
def test_a_forward_set_on_a_host_of_graphs_is_refused(insert: Callable[..., nn.Module]) -> None:
    full = insert(network(), placement="activation")
    with pytest.raises(se_fx.SqueezeExciteError, match=r"Unit.forward was set.*Use placement="):
        full.stages[0].forward = lambda x: x
    full = insert(network(), placement="post")
    full.stages[0].forward = lambda x: x  # the unit scales what it returns, whatever that is
    assert torch.equal(full(X), full(X))
    assert not torch.equal(full.stages[0](full.stem(X)), full.stem(X))


@BOTH
def test_blocks_are_bypassed_for_a_while(insert: Callable[..., nn.Module]) -> None:
    model = network()
    full = insert(model)
    before = full(X)
    with se_fx.bypassed(full):
        assert torch.equal(full(X), model(X))
        assert torch.equal(full.features(X), model.features(X))
    assert torch.equal(full(X), before)
    with pytest.raises(ValueError, match="on purpose"), se_fx.bypassed(full):
        raise ValueError("on purpose")
    assert torch.equal(full(X), before)


@BOTH
def test_an_ensemble_of_results_made_alike(insert: Callable[..., nn.Module]) -> None:
    models = [insert(network(), seed=seed) for seed in (1, 2, 3)]
    extra = [name for name in models[0].state_dict() if name.endswith("_extra_state")]
    assert extra
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    found = torch.vmap(lambda p, b: functional_call(base, (p, b), (X,)))(parameters, buffers)
    for one, model in zip(found, models, strict=True):
        torch.testing.assert_close(one, model(X), rtol=1e-4, atol=1e-5)


class WithDefault(nn.Module):
    """Adds a number, which its callers may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor, added: float = 1.0) -> Tensor:
        return self.conv(x) + added


def test_models_made_alike_share_their_code_until_one_is_edited() -> None:
    one, two, three = (transformed(network(), seed=seed) for seed in (1, 2, 3))
    assert type(one) is type(two) is type(copy.deepcopy(three)) is type(pickle.loads(pickle.dumps(one)))
    before = two(X)
    output = next(node for node in one.graph.nodes if node.op == "output")
    with one.graph.inserting_before(output):
        output.replace_input_with(output.all_input_nodes[0], one.graph.call_function(torch.zeros_like, output.args))
    one.recompile()
    assert type(one) is not type(two)
    assert not one(X).any()
    assert not copy.deepcopy(one)(X).any()
    assert torch.equal(two(X), before)


def test_defaults_of_arguments_tell_models_apart() -> None:
    first = transformed(WithDefault())
    with unittest.mock.patch.object(WithDefault.forward, "__defaults__", (2.0,)):
        second = transformed(WithDefault())
        second.load_state_dict(first.state_dict())
        torch.testing.assert_close(second(X), first(X, 2.0))
    torch.testing.assert_close(first(X), first(X, 1.0))


@BOTH
def test_names_end_in_no_name_of_the_models_own(insert: Callable[..., nn.Module]) -> None:
    model = network()
    full, own = insert(model), {name for name, _ in model.named_modules()}
    new = {name for name, _ in full.named_modules()} - own
    assert new
    assert not any(name.endswith(f".{last}") for name in new for last in ("conv1", "conv2", "norm1", "stem", "head", "0", "1"))


class Masked(nn.Module):
    """Code that goes another way with another argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor, negate: bool = False) -> Tensor:
        y = F.relu(self.conv(x))
        return -y if negate else y + 1


class Masks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Masked(), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))


@BOTH
def test_a_host_called_in_another_way_says_so(insert: Callable[..., nn.Module]) -> None:
    full = insert(Masks(), placement="activation")
    assert torch.equal(full(X), full.last(full.inner(X)))
    with pytest.raises(se_fx.SqueezeExciteError, match=r"Masked.forward: negate=True: .* as it runs with negate=False"):
        full.inner(X, negate=True)


def test_a_graph_module_in_place_can_be_recompiled() -> None:
    model = fx.symbolic_trace(network())
    expected = transformed(network(), placement="norm", seed=1)
    expected.load_state_dict(model.state_dict(), strict=False)
    for placement in ("norm", "activation"):
        full = applied(model, placement=placement)
        before = full(X)
        assert not torch.equal(before, model(X))
        full.recompile()
        assert torch.equal(full(X), before)
        assert torch.equal(copy.deepcopy(full)(X), before)
        assert torch.equal(se_fx.remove(full)(X), model(X))


@pytest.mark.parametrize("again", [transformed, applied, se_fx.optimize_for_inference])
@BOTH
def test_a_part_that_scales_what_it_returns_is_rewritten_by_itself(
    insert: Callable[..., nn.Module], again: Callable[..., nn.Module]
) -> None:
    full = insert(network(), placement="post")
    part, y = full.stages[0], full.stem(X)
    more = again(part) if again is se_fx.optimize_for_inference else again(part, placement="norm", init="identity")
    torch.testing.assert_close(more(y), part(y), rtol=1e-4, atol=1e-5)
    assert not torch.equal(part(y), se_fx.remove(full).stages[0](y))
    if again is transformed:
        more.strength = part.strength = 2.0  # its graph stands back
        assert torch.equal(more(y), part(y))


class Adapter(nn.Module):
    """Adds to what a conv returns, and may be merged into it."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base, self.more = base, nn.Conv2d(base.in_channels, base.out_channels, base.kernel_size, padding=base.padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.more(x)

    def merged(self) -> nn.Conv2d:
        with torch.no_grad():
            self.base.weight += self.more.weight
            self.base.bias += self.more.bias
        return self.base


@BOTH
def test_an_adapter_around_a_conv_is_scaled_with_it_and_merged_into_it(insert: Callable[..., nn.Module]) -> None:
    model = network()
    full = insert(copy.deepcopy(model))
    before, block = full(X), se_fx.blocks_of(full)["stages.0.conv1"]
    full.stages[0].conv1 = adapter = Adapter(full.stages[0].conv1)
    y = full.stem(X)
    scaled = adapter(y)
    plain = model.stages[0].conv1(y) + adapter.more(y)
    assert torch.equal(scaled, block(plain))
    adapted = full(X)
    assert not torch.equal(adapted, before)
    full.stages[0].conv1 = adapter.merged()
    torch.testing.assert_close(full(X), adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("placement", ["norm", "residual"])
@BOTH
def test_norms_that_are_converted_keep_their_blocks(insert: Callable[..., nn.Module], placement: str) -> None:
    full = insert(network(), placement=placement)
    expected = full(X)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(full)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == 5
    assert torch.equal(converted(X), expected)
    for name, module in converted.stages[0]._modules.items():  # past all that would notice
        if isinstance(module, nn.SyncBatchNorm):
            converted.stages[0]._modules[name] = nn.Identity()
    with pytest.raises(se_fx.SqueezeExciteError, match=r"Unit: norm\d was replaced"):
        converted(X)


@BOTH
def test_another_class_for_what_scales_its_value_is_refused(insert: Callable[..., nn.Module]) -> None:
    full = insert(network(), placement="norm")
    full.stages[1].norm2.__class__ = nn.BatchNorm2d
    with pytest.raises(se_fx.SqueezeExciteError, match=r"Unit: norm2 was given another class"):
        full(X)


class Stated(nn.Module):
    """Adds by a statement whose result nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)))
        y.add_(x)
        return y


class Around(nn.Module):
    """Adds by a statement to what another module has returned, and hands that on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unit, self.body, self.head = nn.Conv2d(3, 8, 1), Stated(), Branch(), Head()

    def forward(self, x: Tensor) -> Tensor:
        x = self.unit(self.stem(x))
        y = self.body(x)
        y.add_(x)
        return self.head(y)


class Branch(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize("placement", ["post", "residual", "pre", "identity", "conv"])
def test_statements_in_the_code_of_hosts(placement: str) -> None:
    model = Around().eval()
    graph, code = (insert(model, placement=placement, seed=1) for insert in (transformed, applied))
    expected = graph(X)
    assert not torch.equal(expected, model(X))
    assert torch.equal(code(X), expected)
    graph.unit.register_forward_hook(lambda module, args, output: None)  # its code runs
    assert torch.equal(graph(X), expected)


class Settings(nn.Module):
    """Holds what others read: a module of its own, a plain one, a leaf, one that is called; or a tuple."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.kind = nn.Conv2d(3, 8, 1), kind
        holders = {"plain": nn.Module, "leaf": nn.ReLU, "with a conv": lambda: nn.Sequential(nn.Conv2d(8, 8, 1))}
        self.held: Any = holders[kind]()
        self.held.factor, self.held.sizes = 1.0, (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = y if self.kind == "plain" else self.held(y)
        return y * self.held.factor + getattr(self.held, "sizes")[0]  # noqa: B009


@BOTH
@pytest.mark.parametrize("kind", ["plain", "leaf", "with a conv"])
def test_attributes_of_other_modules_that_code_has_read(insert: Callable[..., nn.Module], kind: str) -> None:
    """Settings in a module that the graph doesn't go through, or only calls."""
    model = Settings(kind).eval()
    result = insert(copy.deepcopy(model), init="identity")
    x = torch.randn(2, 3, 5, 5)
    for name, value in (("factor", 3.0), ("sizes", (2, 2)), ("factor", 1.0)):
        for each in (model, result):
            setattr(each.held, name, value)
        assert torch.equal(result(x), model(x))


class Mixes(nn.Module):
    """Convolutions of parts of the channels, which code goes through as children: its own, or those of a Sequential."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, parts = how, [nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)]
        if how == "of a Sequential":
            self.parts = nn.Sequential(*parts)
        else:
            self.left, self.right = parts

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "of a Sequential":
            parts = list(self.parts.children())
        else:
            parts = list(self._modules.values()) if self.how == "its modules" else list(self.children())
        return torch.cat([part(piece) for piece, part in zip(x.split(4, 1), parts, strict=False)], 1)


@BOTH
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("how", ["its modules", "its children", "of a Sequential"])
def test_code_that_goes_through_children_finds_no_block_among_them(
    insert: Callable[..., nn.Module], how: str, within: bool
) -> None:
    model = nn.Sequential(Mixes(how), nn.BatchNorm2d(8)).eval() if within else Mixes(how).eval()
    result = insert(copy.deepcopy(model), init="identity")
    x = torch.randn(2, 8, 5, 5)
    assert len(se_fx.blocks_of(result)) == 2
    assert torch.equal(result(x), model(x))
    hook = result.register_forward_hook(lambda module, args, output: None)  # whose code may run then
    assert torch.equal(result(x), model(x))
    hook.remove()
    assert se_fx.remove(result).state_dict().keys() == model.state_dict().keys()


@BOTH
def test_a_norms_own_block_is_named_after_its_conv(insert: Callable[..., nn.Module]) -> None:
    class Row(nn.Module):
        """Code that goes through its children, the last of which gives its result."""

        def __init__(self) -> None:
            super().__init__()
            self.left, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            for _, child in zip(range(2), self.children(), strict=False):
                x = child(x)
            return x

    model = nn.Sequential(nn.Identity(), Row()).eval()
    result = insert(model, placement="norm", init="identity")
    assert torch.equal(result(X), model(X))
    result.register_forward_hook(lambda module, args, output: None)  # so that its code runs
    assert torch.equal(result(X), model(X))
    assert {key for key in result.state_dict() if "fc1" in key} == {"1.norm.squeeze_excite.of_1_left.fc1.weight"}
