"""Plans: budgets, sets of sites, tables."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import get_model

import se_fx
from se_fx import Cost, Plan, Site, SqueezeExciteError
from se_fx.planning import Skip


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


def names(plan: Plan) -> list[str]:
    return [site.name for site in plan.sites]


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


# ----------------------------------------------------------------------------------------------------------------- sets
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


# --------------------------------------------------------------------------------------------------------------- tables
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
