"""Folding of constant gates, against models scaled by hand."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import se_fx
from se_fx import Folding, GateProfile, SqueezeExcite2d

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def blocks(model: nn.Module) -> dict[str, SqueezeExcite2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SqueezeExcite2d)}


def make_constant(block: SqueezeExcite2d, gate: Tensor) -> None:
    """Have `block` return `gate`, (C,), whatever it is given: sigmoid(0 * anything + logit(gate))."""
    with torch.no_grad():
        block.fc2.weight.zero_()
        block.fc2.bias.copy_(torch.logit(gate / block.gate_scale))


def fold(model: nn.Module, tolerance: float = 0.02, x: Tensor = X, **options) -> Folding:
    return se_fx.fold_gates(model, se_fx.profile_gates(model, [x], progress=False), tolerance, progress=False, **options)


def reasons(folding: Folding) -> dict[str, str]:
    return {site.name: site.reason for site in folding.kept}


def assert_same_outputs(one: nn.Module, other: nn.Module, x: Tensor = X) -> None:
    """Bitwise, in both modes, under one seed."""
    for training in (True, False):
        results = []
        for model in (one, other):
            model = copy.deepcopy(model).train(training)
            torch.manual_seed(1)
            results.append(model(x.clone()))
        assert torch.equal(*results)


# --------------------------------------------------------------------------------------------------------------- by hand
@pytest.mark.parametrize("conv_bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_conv_takes_the_gate(conv_bias: bool, groups: int) -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, bias=conv_bias, groups=groups), nn.ReLU())
    model = se_fx.transform(net, min_channels=1, latent_channels=2, bias=True)
    gate = torch.tensor([0.25, 0.5, 0.75, 0.9])
    make_constant(blocks(model)["squeeze_excite.0"], gate)
    folding = fold(model, x=X[:, :2])
    (site,) = folding.folded
    assert (site.name, site.into, site.deviation) == ("0", "0", None)
    assert site.spread == pytest.approx(0, abs=1e-7)
    assert site.saved.params == folding.saved.params == (4 * 2 + 2) + (2 * 4 + 4)
    assert not blocks(folding.model)
    torch.testing.assert_close(folding.model.get_submodule("0").weight, net[0].weight * gate[:, None, None, None])
    if conv_bias:
        torch.testing.assert_close(folding.model.get_submodule("0").bias, net[0].bias * gate)
    x = torch.randn(2, 2, 9, 7)
    torch.testing.assert_close(folding.model(x), F.relu(net[0](x) * gate[:, None, None]))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)])
def test_a_norm_takes_the_gate(norm: nn.Module) -> None:
    norm = copy.deepcopy(norm)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(inplace=True))
    model = se_fx.transform(net, placement="norm", min_channels=1, latent_channels=2, bias=True)
    gate = torch.tensor([0.25, 0.5, 0.75, 0.9])
    make_constant(blocks(model)["squeeze_excite.0"], gate)
    folding = fold(model)
    assert folding.folded[0].into == "1"
    folded = folding.model.get_submodule("1")
    torch.testing.assert_close((folded.weight, folded.bias), (norm.weight * gate, norm.bias * gate))
    for training in (True, False):
        net.train(training), folding.model.train(training)
        torch.testing.assert_close(folding.model(X), F.relu(norm(net[0](X)) * gate[:, None, None]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("placement", ["conv", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"init": "identity"}, {}], ids=["gate 1", "gate 1/2"])
def test_powers_of_two_fold_exactly(cnn: nn.Module, placement: str, dtype: torch.dtype, options: dict) -> None:
    model = se_fx.transform(cnn.to(dtype), placement=placement, min_channels=1, latent_channels=4, **options)
    for block in blocks(model).values():
        nn.init.zeros_(block.fc2.weight)
    folding = fold(model, 0.0, X.to(dtype))
    assert len(folding.folded) == 2
    assert all(parameter.dtype == dtype for parameter in folding.model.parameters())
    if options or dtype != torch.float16:
        assert_same_outputs(folding.model, model, X.to(dtype))
    else:  # halves of the smallest float16 numbers are rounded
        torch.testing.assert_close(folding.model.eval()(X.half()), model.eval()(X.half()), rtol=0, atol=1e-4)


class Residual(nn.Module):
    """A strided unit with a projection on its shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branch = nn.Sequential(
            nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        )
        self.shortcut = nn.Sequential(nn.Conv2d(8, 8, 1, 2), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return F.relu(self.branch(x) + self.shortcut(x))


@pytest.mark.parametrize(
    ("placement", "into"),
    [
        ("conv", ["stem", "branch.0", "branch.3", "shortcut.0"]),
        ("norm", ["branch.1", "branch.4", "shortcut.1"]),
        ("residual", ["branch.4"]),
        ("identity", ["shortcut.1"]),
        ("pre", "what stem returns is read by others too"),
        ("post", "it scales what relu returns, which is no module's value"),
    ],
)
def test_placements(placement: str, into: list[str] | str) -> None:
    model = se_fx.transform(Residual(), placement=placement, min_channels=1, latent_channels=2, init="identity")
    folding = fold(model, 0.0)
    if isinstance(into, str):
        assert reasons(folding) == {"branch.3": into}
        assert len(blocks(folding.model)) == 1
    else:
        assert [site.into for site in folding.folded] == into
        assert not blocks(folding.model)
    assert_same_outputs(folding.model, model)


# --------------------------------------------------------------------------------------------------- kinds of rewritten models
class TwoModes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(F.relu(self.aux(x))) if self.training else self.b(x)


class Split(nn.Module):
    """Runs its own code: `body` is a region, `head` a lone conv, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
        self.head = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(self.head(x)) if x.sum() > -1e9 else x


def split() -> nn.Module:
    return se_fx.transform(Split(), min_channels=1, latent_channels=2, init="identity")


def applied() -> nn.Module:
    model = Split()
    se_fx.apply_squeeze_excite(model, latent_channels=2, min_channels=1)
    for block in blocks(model).values():
        nn.init.zeros_(block.fc2.weight)
    return model


def test_both_modes_graphs_are_folded_and_what_only_training_reaches_is_kept() -> None:
    model = se_fx.transform(TwoModes(), min_channels=1, latent_channels=2, init="identity")
    folding = fold(model, 0.0)
    assert [site.name for site in folding.folded] == ["a", "b"]
    assert "no sample" in reasons(folding)["aux"]
    assert list(blocks(folding.model)) == ["squeeze_excite.aux"]
    assert_same_outputs(folding.model, model)


@pytest.mark.parametrize("make", [split, applied])
def test_regions_inside_and_lone_convs(make) -> None:
    model = make()
    folding = fold(model, 0.0)
    assert [site.into for site in folding.folded] == ["body.0", "body.2", "head"]
    assert not blocks(folding.model)
    assert type(folding.model).__name__ == "Split"
    assert_same_outputs(folding.model, model)
    profile = se_fx.profile_gates(model, [X], progress=False)
    first = GateProfile(tuple(site for site in profile.sites if site.name == "body.0"))
    partly = se_fx.fold_gates(model, first)
    assert reasons(partly) == dict.fromkeys(("body.2", "head"), "the profile has no gates for it")
    assert len(blocks(partly.model)) == 2
    assert_same_outputs(partly.model, model)


def test_a_real_network_partly(lite0: nn.Module) -> None:
    options = {"placement": "norm", "where": "*_depthwise_conv", "min_channels": 480, "latent_channels": 4}
    model = se_fx.transform(lite0, init="identity", **options)
    moved = [block for name, block in blocks(model).items() if "_blocks.9." in name or "_blocks.12." in name]
    for block in moved:
        nn.init.normal_(block.fc2.weight)
    x = torch.rand(2, 3, 64, 64)
    folding = fold(model, x=x)
    assert all("spread" in reason for reason in reasons(folding).values())
    assert sorted(reasons(folding)) == ["_blocks.12._depthwise_conv", "_blocks.9._depthwise_conv"]
    with torch.no_grad():
        assert torch.equal(folding.model.eval()(x), model.eval()(x))
    assert [name for name in folding.model.state_dict() if "squeeze_excite" in name] == [
        name for name in model.state_dict() if "_blocks.9._depthwise_conv.fc" in name or "_blocks.12._depthwise_conv.fc" in name
    ]


# ------------------------------------------------------------------------------------------------------------ what is kept
class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.b(self.a(x))))


class ReadsWeights(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.b(self.a(x)), self.b.weight)


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_a_conv_called_twice_is_kept() -> None:
    model = se_fx.transform(Shared(), min_channels=1, latent_channels=2, init="identity")
    folding = fold(model, 0.0)
    assert reasons(folding) == {"b": "b is called several times"}
    assert_same_outputs(folding.model, model)


def test_weights_that_the_graph_reads_are_kept() -> None:
    model = se_fx.transform(ReadsWeights(), where=["a", "b"], min_channels=1, latent_channels=2, init="identity")
    assert reasons(fold(model, 0.0)) == {"b": "weights of b are read in another way too"}


def test_tied_weights_are_kept() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
    net[2].bias = net[1].bias
    model = se_fx.transform(net, min_channels=1, latent_channels=2, init="identity")
    assert reasons(fold(model, 0.0)) == {"1": "1.bias is also 2.bias", "2": "1.bias is also 2.bias"}


@pytest.mark.parametrize("make", [split, applied])
def test_modules_with_hooks_are_kept(make) -> None:
    model = make()
    seen: list[Tensor] = []
    for name in ("body.0", "head"):
        model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    expected = model.eval()(X)
    before = list(seen)
    folding = fold(model, 0.0)
    assert reasons(folding) == {name: f"{name} has hooks, which see its value unscaled" for name in ("body.0", "head")}
    seen.clear()
    assert torch.equal(folding.model.eval()(X), expected)
    assert len(seen) == len(before) == 3
    assert all(torch.equal(one, other) for one, other in zip(seen, before, strict=True))


def test_a_block_with_hooks_is_kept(cnn: nn.Module) -> None:
    model = se_fx.transform(cnn, min_channels=1, latent_channels=2, init="identity")
    blocks(model)["squeeze_excite.0"].register_forward_hook(lambda block, args, output: output * 3)
    assert reasons(fold(model, 0.0)) == {"0": "its block has hooks"}


@pytest.mark.parametrize(
    ("conv", "norm", "placement", "reason"),
    [
        (parametrizations.weight_norm(nn.Conv2d(3, 8, 1)), nn.Identity(), "conv", "0 is parametrized"),
        (Doubled(3, 8, 1), nn.Identity(), "conv", "it scales what 0 returns, a Doubled: no plain Conv2d or norm"),
        (nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False), "norm", "1 has no weight of its own"),
        (nn.Conv2d(3, 8, 1), nn.LocalResponseNorm(2), "norm", "it scales what 1 returns, a LocalResponseNorm: no plain"),
    ],
)
def test_what_takes_no_gate_is_kept(conv: nn.Module, norm: nn.Module, placement: str, reason: str) -> None:
    model = se_fx.transform(nn.Sequential(conv, norm), placement=placement, min_channels=1, latent_channels=2, init="identity")
    folding = fold(model, 0.0)
    assert reasons(folding)["0"].startswith(reason)
    assert_same_outputs(folding.model, model)


def test_every_channel_counts(cnn: nn.Module) -> None:
    """One channel in 16 whose gate spreads more than the tolerance: the mean spread is below it."""
    model = se_fx.transform(cnn, min_channels=1, latent_channels=4)
    profile = se_fx.profile_gates(model, [X], progress=False)
    first, second = profile.sites
    spreads = torch.zeros(16, dtype=torch.float64)
    spreads[3] = 0.05
    made = GateProfile((replace(first, channel_spreads=spreads), replace(second, channel_spreads=torch.full((32,), 0.02))))
    folding = se_fx.fold_gates(model, made, 0.0201)
    assert [site.name for site in folding.folded] == ["3"]
    assert reasons(folding) == {"0": "its gates' spread over samples is up to 0.0500"}


def test_a_rare_class_counts(cnn: nn.Module) -> None:
    model = se_fx.transform(cnn, min_channels=1, latent_channels=4, init="identity")
    profile = se_fx.profile_gates(model, [X], progress=False)
    one = torch.ones(16, dtype=torch.float64)
    first = replace(profile.sites[0], samples=1000, class_means={0: one, 7: one - 0.3})
    folding = se_fx.fold_gates(model, GateProfile((first, *profile.sites[1:])))
    assert reasons(folding) == {"0": "a class's mean gate is up to 0.3000 off the mean"}
    within = se_fx.fold_gates(model, GateProfile((first, *profile.sites[1:])), 0.31)
    assert within.folded[0].deviation == pytest.approx(0.3)
    assert "over classes" in str(within)


def test_gates_that_are_not_finite_and_single_samples_are_kept(cnn: nn.Module) -> None:
    model = se_fx.transform(cnn, min_channels=1, latent_channels=4, init="identity")
    assert set(reasons(fold(model, x=X * math.nan)).values()) == {"some of its gates are not finite"}
    assert "one sample" in reasons(fold(model, x=X[:1]))["0"]


def test_blocks_of_others_are_kept(cnn: nn.Module) -> None:
    own = se_fx.transform(cnn, where="0", min_channels=1, latent_channels=4, init="identity")
    model = se_fx.transform(own, where="3", min_channels=1, block=lambda channels: nn.Hardtanh())
    folding = fold(model, 0.0)
    assert [site.name for site in folding.folded] == ["0"]
    assert reasons(folding) == {"3": "the profile has no gates for it"}
    assert_same_outputs(folding.model, model)


# ---------------------------------------------------------------------------------------------------------------- the result
def half_constant(cnn: nn.Module) -> nn.Module:
    """The first block is constant, the second isn't."""
    model = se_fx.transform(cnn, min_channels=1, latent_channels=4, bias=True, example_inputs=X)
    make_constant(blocks(model)["squeeze_excite.0"], torch.linspace(0.1, 0.9, 16))
    nn.init.normal_(blocks(model)["squeeze_excite.3"].fc2.weight, std=20.0)
    return model


def test_all_but_the_folded_weights_is_shared_and_the_input_is_untouched(cnn: nn.Module) -> None:
    model = half_constant(cnn).train()
    model.get_submodule("1").eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    code, plan = model.code, se_fx.Plan.of(model)
    folding = fold(model, 0.02, held_out=[X])
    folded = folding.model.state_dict(keep_vars=True)
    assert all(torch.equal(*pair) for pair in before.values())
    assert {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if tensor is not before[name][0]} == {}
    assert (model.code, se_fx.Plan.of(model)) == (code, plan)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert folding.model.training
    assert not folding.model.get_submodule("1").training
    assert [name for name in before if name not in folded] == [name for name in before if "squeeze_excite.0." in name]
    assert [name for name in folded if folded[name] is not before[name][0]] == ["0.weight", "0.bias"]
    assert all(type(folded[name]) is nn.Parameter for name in ("0.weight", "0.bias"))


def test_frozen_weights_stay_frozen_and_the_rest_trains(cnn: nn.Module) -> None:
    model = half_constant(cnn)
    model.get_submodule("0").requires_grad_(False)
    folded = fold(model).model
    assert not folded.get_submodule("0").weight.requires_grad
    folded(X).square().sum().backward()
    assert blocks(folded)["squeeze_excite.3"].fc1.weight.grad.abs().sum() > 0


def test_copies(cnn: nn.Module) -> None:
    folded = fold(half_constant(cnn)).model
    for copied in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert_same_outputs(copied, folded)
        assert se_fx.Plan.of(copied) == se_fx.Plan.of(folded)
    again = fold(pickle.loads(pickle.dumps(half_constant(cnn))))
    assert [site.name for site in again.folded] == ["0"]


def test_plan_and_state_dict_rebuild_it(cnn: nn.Module) -> None:
    fresh = copy.deepcopy(cnn)
    folded = fold(half_constant(cnn)).model
    file = io.BytesIO()
    torch.save({"plan": se_fx.Plan.of(folded).to_dict(), "state_dict": folded.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    rebuilt = se_fx.transform(fresh, se_fx.Plan.from_dict(saved["plan"]))
    rebuilt.load_state_dict(saved["state_dict"])
    assert_same_outputs(rebuilt, folded)


def test_report_and_remove_and_a_second_transform(cnn: nn.Module) -> None:
    model = half_constant(cnn)
    folding = fold(model)
    report = se_fx.report(folding.model, X)
    assert [site.name for site in report.sites] == ["3"]
    assert {skip.name: skip.reason for skip in report.skipped} == {"0": "its gate was constant, and is folded"}
    assert folding.saved == se_fx.report(model, X).added - report.added
    assert report.base == se_fx.report(model, X).base
    plain = se_fx.remove(folding.model)
    assert type(plain) is nn.Sequential
    assert list(plain.state_dict()) == list(cnn.state_dict())
    torch.testing.assert_close(plain[0].weight, cnn[0].weight * torch.linspace(0.1, 0.9, 16)[:, None, None, None])
    assert len(blocks(se_fx.transform(folding.model, min_channels=1, latent_channels=4))) == 2


def test_nothing_left(cnn: nn.Module) -> None:
    model = se_fx.transform(cnn, min_channels=1, latent_channels=4, init="identity")
    folded = fold(model, 0.0).model
    assert len(se_fx.Plan.of(folded)) == 0
    assert "no Squeeze-and-Excitation block" in str(se_fx.report(folded))
    assert list(folded.state_dict()) == list(cnn.state_dict())
    assert_same_outputs(se_fx.remove(folded), cnn)


def test_a_folded_model_compiles_and_exports(cnn: nn.Module) -> None:
    folded = fold(half_constant(cnn)).model.eval()
    with torch.no_grad():
        compiled = torch.compile(folded, fullgraph=True, backend="eager")(X)
        exported = torch.export.export(folded, (X,)).module()(X)
        assert torch.equal(compiled, folded(X))
        torch.testing.assert_close(exported, folded(X))


# ------------------------------------------------------------------------------------------------------------------ changes
class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


def test_changes_on_held_out_batches() -> None:
    net = Classifier()
    model = se_fx.transform(net, min_channels=1, latent_channels=4).eval()
    for block in blocks(model).values():
        nn.init.normal_(block.fc2.weight)
    profile = se_fx.profile_gates(model, [X], progress=False)
    x, labels = torch.randn(11, 3, 8, 8) * 3, torch.randint(5, (11,))
    batches = iter([(x[:6], labels[:6]), (x[6:], labels[6:])])
    folding = se_fx.fold_gates(model, profile, 1.0, held_out=batches, progress=False)

    def by_hand(folded: set[str]) -> Tensor:
        y = x
        for layer, site in zip(("a", "b"), profile.sites, strict=True):
            conv, block = net.get_submodule(layer), blocks(model)[f"squeeze_excite.{layer}"]
            y = conv(y)
            y = F.relu(y * site.channel_means[:, None, None].float() if layer in folded else block(y))
        return net.head(y.mean((2, 3)))

    with torch.no_grad():
        before, after = by_hand(set()), by_hand({"a", "b"})
        alone = {name: float((by_hand({name}) - before).abs().max()) for name in ("a", "b")}
    changes = folding.changes
    largest = float((after - before).abs().max())
    assert largest > 1e-3
    assert changes.largest == pytest.approx(largest, rel=1e-3)
    assert changes.relative == pytest.approx(largest / float(before.std(correction=0)), rel=1e-3)
    assert changes.agreement == pytest.approx(float((before.argmax(1) == after.argmax(1)).float().mean()))
    assert changes.accuracy == pytest.approx([float((y.argmax(1) == labels).float().mean()) for y in (before, after)])
    assert changes.alone == pytest.approx(alone, rel=1e-3)
    data = json.loads(json.dumps(folding.to_dict()))
    assert data["changes"]["accuracy"] == list(changes.accuracy)
    assert [site["saved"]["params"] for site in data["folded"]] == [128, 128]
    assert "moves outputs by" in str(folding)
    assert "top-1 accuracy" in str(folding)


def test_changes_of_other_outputs(cnn: nn.Module) -> None:
    class TwoOutputs(nn.Sequential):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = super().forward(x)
            return {"map": y, "mean": y.mean((2, 3))}

    model = se_fx.transform(TwoOutputs(*cnn), min_channels=1, latent_channels=4, init="identity")
    changes = fold(model, held_out=[{"x": X}]).changes
    assert (changes.largest, changes.relative, changes.agreement, changes.accuracy) == (0.0, 0.0, None, None)


def test_detection_models() -> None:
    detector = torchvision.models.get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=3)
    model = se_fx.transform(detector.eval(), placement="norm", where="*extra*", min_channels=256, init="identity")
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 64)]
    profile = se_fx.profile_gates(model, [(images,)], progress=False)
    folding = se_fx.fold_gates(model, profile, held_out=[(images,)], progress=False)
    assert folding.folded
    assert not folding.kept
    assert folding.changes.largest == 0


# ------------------------------------------------------------------------------------------------------------------- errors
