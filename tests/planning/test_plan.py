"""Plans: budgets, sets of sites, JSON, replay in other processes and on other models."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import pkgutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import get_model

import se_fx
from se_fx import Cost, Plan, Site, SqueezeExciteError
from se_fx.blocks import BLOCKS, GATES
from se_fx.placement import PLACEMENTS
from se_fx.planning import Options, Skip


def names(plan: Plan) -> list[str]:
    return [site.name for site in plan.sites]


# -------------------------------------------------------------------------------------------------------------- budgets
def plan_with(costs: list[tuple[int, int, int]]) -> Plan:
    sites = tuple(
        Site(f"conv{i}", 8, 2, cost=Cost(params=params, macs=0, flops=flops, bytes=moved))
        for i, (params, flops, moved) in enumerate(costs)
    )
    return Plan(sites, base=Cost(params=1000, macs=0, flops=1000, bytes=1000), measured=True)


@settings(max_examples=200, deadline=None)
@given(
    costs=st.lists(st.integers(0, 12), max_size=9),
    budget=st.integers(0, 40),
    name=st.sampled_from(["flops", "params", "bytes"]),
)
def test_within_a_budget_is_optimal(costs: list[int], budget: int, name: str) -> None:
    plan = plan_with([(cost, cost, cost) for cost in costs])
    kept = {int(site.name.removeprefix("conv")) for site in plan.within(**{name: budget}).sites}
    fitting = [
        chosen
        for count in range(len(costs) + 1)
        for chosen in itertools.combinations(range(len(costs)), count)
        if sum(costs[i] for i in chosen) <= budget
    ]
    # most blocks; of those the cheapest; of those the latest
    best = max(fitting, key=lambda chosen: (len(chosen), -sum(costs[i] for i in chosen), sorted(chosen, reverse=True)))
    assert kept == set(best)


@settings(max_examples=100, deadline=None)
@given(
    costs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), max_size=8),
    params=st.integers(0, 30),
    flops=st.integers(0, 30),
    moved=st.integers(0, 30),
)
def test_several_budgets_are_all_kept_to_and_used_up(costs, params, flops, moved) -> None:
    plan = plan_with(costs)
    kept = plan.within(params=params, flops=flops, bytes=moved)
    fits = lambda cost: cost.params <= params and cost.flops <= flops and cost.bytes <= moved  # noqa: E731
    assert fits(kept.added)
    assert not any(fits(kept.added + site.cost) for site in plan.sites if site not in kept.sites)


def test_a_block_costs_the_largest_share_of_any_budget() -> None:
    # Of 8 parameters and 1000 FLOPs: 1/8 or 1/2, 3/8 or 1/10, 5/8 or 1/5. The second is first, then the first; 1 + 3 + 5 > 8.
    kept = plan_with([(1, 500, 0), (3, 100, 0), (5, 200, 0)]).within(params=8, flops=1000)
    assert names(kept) == ["conv0", "conv1"]
    assert kept.skipped == (Skip("conv2", 8, "over the budget of flops=1000, params=8"),)


def test_fractions_are_of_the_models_own_cost() -> None:
    model = get_model("resnet18", weights=None)
    plan = se_fx.plan(model, example_inputs=torch.zeros(1, 3, 64, 64), placement="residual", min_channels=1)
    half = plan.within(params=0.005)
    assert half.added.params <= 0.005 * sum(p.numel() for p in model.parameters()) < half.added.params + 2 * 64 * 512
    assert 0 < len(half) < len(plan)
    assert {skip.reason for skip in half.skipped} >= {"over the budget of params=0.005"}
    gm = se_fx.transform(model, plan.within(flops=0.0001, bytes=0.5))
    assert names(Plan.of(gm)) == names(plan.within(flops=0.0001, bytes=0.5))
    assert se_fx.plan(model).within(params=0.5).sites  # no inputs needed


def test_a_plan_that_was_read_back_does_not_know_its_models_cost(cnn: nn.Module) -> None:
    plan = Plan.from_dict(se_fx.plan(cnn, min_channels=1).to_dict())
    with pytest.raises(SqueezeExciteError, match="pass a number of params"):
        plan.within(params=0.5)
    assert len(plan.within(params=10**6)) == 2
    assert len(plan.within(params=0)) == 0


# ------------------------------------------------------------------------------------------------------------------ sets
def test_sets_of_sites() -> None:
    plan = se_fx.plan(get_model("resnet18", weights=None), placement="residual", min_channels=1)
    assert names(plan.without("layer1.*", "layer2.*")) == [n for n in names(plan) if n[:6] in ("layer3", "layer4")]
    assert names(plan.only("layer4.*")) == ["layer4.0.conv2", "layer4.1.conv2"]
    assert names(plan - plan.only("layer4.*")) == names(plan.without("layer4.*"))
    assert set(names(plan.only("layer4.*") | plan.only("layer1.*"))) == set(names(plan.only("layer[14].*")))
    skipped = {skip.name: skip.reason for skip in plan.without("layer1.*").skipped}
    assert skipped["layer1.0.conv2"] == "taken out of the plan"
    with pytest.raises(SqueezeExciteError, match=r"'layer9.*' matches no site.*'layer1.0.conv2'"):
        plan.without("layer9.*")
    with pytest.raises(SqueezeExciteError, match=r"'layer1' matches no site of this plan$"):
        Plan(()).only("layer1")
    with pytest.raises(TypeError):
        plan | 3


def test_a_plan_can_mix_kinds_and_placements() -> None:
    model = get_model("resnet18", weights=None).eval()
    wide = se_fx.plan(model, placement="residual", latent_channels=128, min_channels=1, where="layer4.*", init="identity")
    light = se_fx.plan(model, placement="post", latent_channels=4, min_channels=1, where="layer[123].*", init="identity")
    gm = se_fx.transform(model, wide | light)
    assert {site.name: site.latent_channels for site in Plan.of(gm).sites}["layer4.1.conv2"] == 128
    assert {site.placement for site in Plan.of(gm).sites} == {"residual", "post"}
    assert "placement" in str(se_fx.report(gm))
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(gm(x), model(x))


# ----------------------------------------------------------------------------------------------- blocks, gates, overrides
class Attention(nn.Module):
    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels // reduction, 1)
        self.out = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x):
        return x * self.out(self.conv(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def squeeze_excitation(channels: int) -> nn.Module:
    return torchvision.ops.SqueezeExcitation(channels, channels // 16)


@pytest.mark.parametrize("factory", [Attention, squeeze_excitation, "timm.layers.EcaModule", "timm.layers.cbam.CbamModule"])
def test_blocks_of_others(factory) -> None:
    if isinstance(factory, str):
        factory = pkgutil.resolve_name(factory)
    model = get_model("resnet18", weights=None).eval().to(torch.bfloat16)
    example = torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16)
    plan = se_fx.plan(model, example_inputs=example, placement="residual", min_channels=256, block=factory)
    expected = sum(p.numel() for p in factory(256).parameters()) * 2 + sum(p.numel() for p in factory(512).parameters()) * 2
    assert plan.added.params == expected
    assert plan.added.flops > 0
    gm = se_fx.transform(model, plan)
    assert all(p.dtype == torch.bfloat16 for p in gm.parameters())
    blocks = [m for n, m in gm.named_modules() if n.count("squeeze_excite") and type(m) is type(factory(16))]
    assert len(blocks) == 4
    assert not any(block.training for block in blocks)
    report = se_fx.report(gm, example)
    assert report.added == plan.added
    assert "block" in str(report)
    assert gm(example).shape == (1, 1000)
    assert len(se_fx.plan(gm, min_channels=1)) == 16  # a second transform leaves what is in the blocks alone
    assert se_fx.remove(gm).state_dict().keys() == model.state_dict().keys()
    assert pickle.loads(pickle.dumps(gm)).state_dict().keys() == gm.state_dict().keys()
    assert copy.deepcopy(gm)(example).shape == (1, 1000)


def test_blocks_gates_and_policies_of_ones_own_are_saved_by_name(monkeypatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU())
    own = {"block": (BLOCKS, Attention), "placement": (PLACEMENTS, PLACEMENTS["conv"]), "gate": (GATES, torch.tanh)}
    for option, (table, value) in own.items():
        value = (lambda graph, root: PLACEMENTS["conv"](graph, root)) if option == "placement" else value
        plan = se_fx.plan(model, min_channels=1, **{option: value})
        name = getattr(plan.sites[0], option)
        data = json.loads(json.dumps(plan.to_dict()))
        assert pickle.loads(pickle.dumps(plan)) == plan  # without the function, which is local
        with pytest.raises(SqueezeExciteError, match=f"{option}.*must be added to se_fx"):
            Plan.from_dict(data)
        monkeypatch.setitem(table, name, (lambda value=value: value) if option == "gate" else value)
        assert Plan.from_dict(data).to_dict() == plan.to_dict()
        assert (
            se_fx.transform(model, Plan.from_dict(data)).state_dict().keys() == se_fx.transform(model, plan).state_dict().keys()
        )


def test_gates_and_activations_of_ones_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1))
    gm = se_fx.transform(model, min_channels=1, gate=torch.tanh, activation=nn.PReLU())
    slopes = {id(p) for n, p in gm.named_parameters() if "activation" in n}
    assert len(slopes) == 2  # each block has its own
    assert se_fx.Plan.of(gm).sites[0].activation == "torch.nn.modules.activation.PReLU"
    with pytest.raises(SqueezeExciteError, match=r"gate=.*identity"):
        se_fx.transform(model, min_channels=1, gate=torch.tanh, init="identity")


def test_overrides() -> None:
    model = get_model("resnet18", weights=None)
    overrides = {
        "layer[34].*": {"latent_channels": 1 / 4, "bias": True},
        "layer4.1.*": {"block": Attention},
        "layer4.0.*": {"gate": "hardsigmoid"},
    }
    plan = se_fx.plan(model, placement="residual", min_channels=1, latent_channels=16, overrides=overrides)
    kinds = {site.name: (site.latent_channels, site.bias, site.gate, site.block) for site in plan.sites}
    assert kinds["layer2.0.conv2"] == (16, False, "sigmoid", None)
    assert kinds["layer3.0.conv2"] == (64, True, "sigmoid", None)
    assert kinds["layer4.0.conv2"] == (128, True, "hardsigmoid", None)
    assert kinds["layer4.1.conv2"] == (None, False, "sigmoid", "test_plan.Attention")


def test_options_of_one_site() -> None:
    options = Options(
        latent_channels=16, overrides={"a*": {"bias": True}, "ab": {"latent_channels": 4}, "c": {"block": Attention}}
    )
    assert options.of("ab") == Options(latent_channels=4, bias=True)
    assert options.of("c") == Options(block=Attention)  # whose width is its own affair
    assert options.of("d") == options


# ----------------------------------------------------------------------------------------------------------------- tables
STEM = Site("stem", 16, 4, cost=Cost(params=128, macs=128))
LAST = Site("layer4.conv", 2048, 128, spatial=(14, 7), cost=Cost(params=524_288, macs=524_288))
OTHER = Site("head", 512, None, "post", block="own.Eca", cost=Cost(params=3))
PRINTED = {
    Plan(()): "0 sites, 0 Conv2d layers skipped",
    Plan((STEM,), (Skip("a", 8, "why"),)): """
1 site, 1 Conv2d layer skipped
conv      channels    hidden    parameters
------  ----------  --------  ------------
stem            16         4           128""",
    Plan((STEM, LAST), base=Cost(macs=50_000_000), measured=True): """
2 sites, 0 Conv2d layers skipped
conv           channels    hidden    spatial    parameters     MACs    of model
-----------  ----------  --------  ---------  ------------  -------  ----------
stem                 16         4          -           128      128     0.000 %
layer4.conv       2,048       128       14x7       524,288  524,288     1.049 %""",
    Plan((STEM, OTHER), measured=True): """
2 sites, 0 Conv2d layers skipped
conv    placement    block              channels    hidden    spatial    parameters    MACs    of model
------  -----------  ---------------  ----------  --------  ---------  ------------  ------  ----------
stem    conv         SqueezeExcite2d          16         4          -           128     128           -
head    post         own.Eca                 512         -          -             3       0           -""",
}


@pytest.mark.parametrize("plan", PRINTED, ids=["no site", "parameters", "measured", "of other kinds"])
def test_plans_print_as_tables(plan: Plan) -> None:
    assert str(plan) == PRINTED[plan].lstrip()


# --------------------------------------------------------------------------------------------------------- save and load
SAVE = """
import torch, se_fx
from torchvision.models import get_model
torch.manual_seed(3)
model = get_model("resnet18", weights=None)
options = {"placement": "residual", "min_channels": 1, "latent_channels": 0.25, "init": "identity"}
plan = se_fx.plan(model, **options, overrides={"layer4.*": {"bias": True}})
gm = se_fx.transform(model, plan.without("layer1.0.*")).eval()
for parameter in gm.parameters():
    parameter.data.add_(torch.randn_like(parameter), alpha=0.01)
x = torch.randn(2, 3, 64, 64)
torch.save({"plan": se_fx.Plan.of(gm).to_dict(), "state_dict": gm.state_dict(), "x": x, "y": gm(x)}, "saved.pt")
"""
LOAD = """
import torch, se_fx
from torchvision.models import get_model
saved = torch.load("saved.pt", weights_only=True)
gm = se_fx.transform(get_model("resnet18", weights=None), se_fx.Plan.from_dict(saved["plan"])).eval()
gm.load_state_dict(saved["state_dict"])
assert torch.equal(gm(saved["x"]), saved["y"])
print("bitwise")
"""


def test_saved_in_one_process_and_rebuilt_in_another(tmp_path: Path) -> None:
    for code, output in ((SAVE, ""), (LOAD, "bitwise\n")):
        run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True)
        assert (run.returncode, run.stdout) == (0, output), run.stderr


def test_checkpoints_of_the_original_load_with_only_the_blocks_missing() -> None:
    model, fresh = get_model("resnet18", weights=None), get_model("resnet18", weights=None)
    gm = se_fx.transform(fresh, placement="residual", min_channels=1)
    missing, unexpected = gm.load_state_dict(model.state_dict(), strict=False)
    assert unexpected == []
    assert all("squeeze_excite" in key for key in missing)
    assert len(missing) == 16


@pytest.mark.parametrize(
    ("options", "other", "message"),
    [
        ({"placement": "residual"}, "resnet34", "site 'layer1.0.conv3' does not fit: ResNet has no such Conv2d"),
        ({"placement": "residual"}, "vgg11", "site 'layer1.0.conv3' does not fit: VGG has no such Conv2d"),
        ({"placement": "residual"}, "wide_resnet50_2", None),
        ({"where": "*.conv1"}, "wide_resnet50_2", "site 'layer1.0.conv1' does not fit: .* 64 channels there, the model 128"),
    ],
)
def test_a_plan_for_another_model_names_the_first_site_that_does_not_fit(options, other, message) -> None:
    plan = se_fx.plan(get_model("resnet50", weights=None), min_channels=1, **options)
    model = get_model(other, weights=None)
    if message is None:
        assert len(Plan.of(se_fx.transform(model, plan))) == 16
        return
    with pytest.raises(SqueezeExciteError, match=message):
        se_fx.transform(model, plan)


def test_a_site_whose_conv_is_elsewhere_now_says_so() -> None:
    class Plain(nn.Module):
        def __init__(self, residual: bool) -> None:
            super().__init__()
            self.stem, self.conv, self.residual = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), residual

        def forward(self, x):
            x = self.stem(x)
            y = self.conv(x.relu())
            return x + y if self.residual else y

    plan = se_fx.plan(Plain(True), placement="residual", min_channels=1)
    with pytest.raises(SqueezeExciteError, match=r"'conv' does not fit: .* is not the last Conv2d of a residual branch"):
        se_fx.transform(Plain(False), plan)


class Factors(nn.Module):
    """Another attention block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize("options", [{"init": "identity"}, {"block": Factors}])
def test_plans_go_the_way_that_values_behind_blocks_decide(options: dict) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.wide, self.narrow = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.wide(x) if x.sum() > 0 else self.narrow(x)

    model = Branches()
    nn.init.constant_(model.stem.weight, 0.1)
    costs = []
    for sign in (1, -1):
        x = torch.full((1, 3, 8, 8), 1e3 * sign)
        plan = se_fx.plan(model, example_inputs=x, min_channels=1, **options)
        assert plan == Plan.of(se_fx.transform(model, example_inputs=x, min_channels=1, **options))
        costs.append(plan.base.macs)
    assert costs == [3 * 8 * 64 + 8 * 8 * 9 * 36, 3 * 8 * 64 + 8 * 8 * 64]


# ---------------------------------------------------------------------------------------------------------------- suggest
def test_suggestions_follow_the_method_card() -> None:
    large = se_fx.suggest(get_model("resnet50", weights=None), torch.zeros(1, 3, 64, 64))
    assert large.options == {"min_channels": 512, "latent_channels": 64}
    assert "ImageNet-scale" in str(large)
    assert "bytes on these inputs" in str(large)
    assert len(large.plan) == len(se_fx.plan(get_model("resnet50", weights=None), **large.options)) > 0
    features = get_model("mobilenet_v3_small", weights=None).features[:9]
    small = se_fx.suggest(features)
    widest = max(module.out_channels for module in features.modules() if isinstance(module, nn.Conv2d))
    assert small.options["min_channels"] == widest
    assert "attention" in str(small)
