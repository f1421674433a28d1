"""Scores of sites: a planted one comes first, however the data is split, and the model is left as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trained import settled

import se_fx
from se_fx.measure import SALIENCIES

CHANNELS, NOISY = 8, 5
BOTH = pytest.mark.parametrize("saliency", SALIENCIES)


class Planted(nn.Module):
    """Convolutions that mix channels, unmix and mix them again; the head reads two channels, and one of noise.

    Scaling the noise down is all that the classifier needs, and only the second convolution's channels have it apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False) for _ in range(3))
        self.head = nn.Linear(CHANNELS, 2)
        mix, again = (nn.init.orthogonal_(torch.empty(CHANNELS, CHANNELS)) for _ in range(2))
        reading = torch.zeros(2, CHANNELS)
        reading[0, 0] = reading[1, 1] = 1.0
        reading[0, NOISY], reading[1, NOISY] = 1.0, -1.0
        with torch.no_grad():
            for conv, weight in ((self.first, mix), (self.second, mix.T), (self.third, again)):
                conv.weight.copy_(weight[..., None, None])
            self.head.weight.copy_(reading @ again.T)
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.first(x))).mean((2, 3)))


def planted_data(count: int = 256) -> tuple[Tensor, Tensor]:
    labels = torch.randint(2, (count,))
    images = 0.5 * torch.randn(count, CHANNELS, 4, 4)
    images[torch.arange(count), labels] += 1.0
    images[:, NOISY] += 3 * torch.randn(count, 1, 1)
    return images, labels


class Small(nn.Module):
    """With a norm, dropout and a unit that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.twice = nn.Conv2d(16, 16, 1)
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head(self.dropout(self.twice(self.twice(x).relu()).mean((2, 3))))


def data(count: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.randint(4, (count,), generator=generator)


def scored(model: nn.Module, batches: Any, **options) -> se_fx.Plan:
    return se_fx.score(model, se_fx.plan(model, min_channels=1), batches, F.cross_entropy, progress=False, **options)


def scores(plan: se_fx.Plan) -> list[float]:
    return [site.score for site in plan.sites]


@pytest.mark.parametrize("seed", range(10))
def test_a_planted_site_comes_first(seed: int) -> None:
    torch.manual_seed(seed)
    found = scored(Planted(), [planted_data()])
    best = max(found.sites, key=lambda site: site.score)
    assert best.name == "second"
    assert [site.name for site in found.within(params=max(site.cost.params for site in found.sites), by="score").sites] == [
        "second"
    ]


def test_a_gate_there_does_fix_it() -> None:
    torch.manual_seed(0)
    model, (images, labels) = Planted(), planted_data(2000)
    gates = torch.ones(CHANNELS, 1, 1)
    gates[NOISY] = 0.0
    before = (model(images).argmax(1) == labels).float().mean()
    handle = model.second.register_forward_hook(lambda module, args, value: value * gates)
    after = (model(images).argmax(1) == labels).float().mean()
    handle.remove()
    assert before < 0.8 < 0.95 < after


@BOTH
def test_scores_are_the_same_for_any_split(saliency: str) -> None:
    model, (images, labels) = settled(Small()), data()
    whole = torch.tensor(scores(scored(model, [(images, labels)], saliency=saliency)))
    for size in (1, 5, 12):
        parts = list(zip(images.split(size), labels.split(size), strict=True))
        torch.testing.assert_close(torch.tensor(scores(scored(model, parts, saliency=saliency))), whole, rtol=1e-5, atol=1e-7)


@BOTH
def test_scores_are_what_the_formulas_say(saliency: str) -> None:
    model, (images, labels) = settled(Small()).double().eval(), data(6)
    labels = labels.clamp(max=1)  # so that samples agree in what they want
    found = scored(model, [(images.double(), labels)], saliency=saliency)
    assert found.sites[0].score > 0
    gradients, features = [], []
    for image, label in zip(images.double(), labels, strict=True):
        gate = torch.ones(1, 16, 1, 1, dtype=torch.float64, requires_grad=True)
        squeezed = model.stem(image[None]).mean((2, 3))
        x = model.norm(model.stem(image[None]) * gate).relu()
        value = model.head(model.twice(model.twice(x).relu()).mean((2, 3)))
        gradients.append(torch.autograd.grad(F.cross_entropy(value, label[None]), gate)[0].flatten())
        unit = (squeezed - squeezed.mean()) / (squeezed.std(correction=0) * 4)
        features.append(torch.cat([torch.ones(1), unit.flatten()]).detach())
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    products = [(gradients[i] @ gradients[j]) * (features[i] @ features[j]) for i, j in pairs]
    expected = {
        "first_order": (sum(products) / len(pairs)).clamp(min=0).sqrt(),
        "fisher": torch.stack(gradients).square().sum(1).mean().sqrt(),
    }
    torch.testing.assert_close(torch.tensor(found.sites[0].score).double(), expected[saliency], rtol=1e-6, atol=1e-12)


def test_the_model_and_the_surroundings_are_left_as_they_were() -> None:
    model = settled(Small()).train()
    model.stem.weight.requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    with torch.no_grad():
        found = scored(model, [data()], saliency="fisher")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.stem.weight.requires_grad
    assert found.sites[0].score > 0


def test_scores_stay_with_the_sites() -> None:
    model = settled(Small())
    found = scored(model, [data()])
    gm = se_fx.transform(model, found)
    assert scores(se_fx.Plan.of(gm)) == scores(found)
    assert "score" in str(found)
    assert "score" in str(se_fx.report(gm))
    assert "score" not in str(se_fx.plan(model, min_channels=1))
    assert scores(se_fx.Plan.from_dict(found.to_dict())) == [None, None]


def test_a_shared_module_has_one_score_of_all_its_calls() -> None:
    model, (images, labels) = settled(Small()).eval(), data(8)
    assert len(scored(model, [(images, labels)]).sites) == 2
    wide = nn.Sequential(nn.Conv2d(3, 300, 1), nn.Flatten(), nn.Linear(300 * 64, 4))
    assert scored(wide, [(images, torch.zeros_like(labels))]).sites[0].score > 0


def test_a_site_that_nothing_depends_on_scores_nothing() -> None:
    class Unused(Small):
        def forward(self, x: Tensor) -> Tensor:
            self.twice(self.norm(self.stem(x)))
            return self.head(x.mean((2, 3)).repeat(1, 6)[:, :16] + self.stem(x).mean((2, 3)))

    assert scores(scored(settled(Unused()), [data()], saliency="fisher"))[1] == 0.0


def test_within_keeps_what_is_worth_most_for_its_cost() -> None:
    sites = [se_fx.Site(name, 64, 8, score=score) for name, score in (("a", 1.0), ("b", 3.0), ("c", 2.0))]
    plan = se_fx.Plan.from_dict(se_fx.Plan(tuple(sites)).to_dict())
    plan = se_fx.Plan(
        tuple(se_fx.Site(s.name, 64, 8, cost=s.cost, score=t.score) for s, t in zip(plan.sites, sites, strict=True))
    )
    one, two = (plan.within(params=n * sites[0].channels * 16, by="score") for n in (1, 2))
    assert [site.name for site in one.sites] == ["b"]
    assert [site.name for site in two.sites] == ["b", "c"]
    assert [site.name for site in plan.within(params=1024).sites] == ["c"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"plan": 3}, "plan=3: expected a Plan"),
        ({"loss": 3}, "loss=3: expected a function"),
        ({"saliency": "taylor"}, "saliency='taylor': expected one of 'first_order', 'fisher'"),
        ({"batches": []}, "expected at least one batch"),
        ({"batches": [(torch.empty(0, 3, 8, 8), torch.empty(0).long())]}, "expected at least one batch"),
        ({"batches": data()[0]}, "batches=Tensor: expected batches"),
        ({"batches": [data()[0]]}, "expected pairs of inputs and targets, and got Tensor"),
        ({"batches": [(torch.randn(2, 5, 8, 8), data(2)[1])]}, "could not be called with"),
        ({"batches": [(data(2)[0], torch.tensor([7, 8]))]}, "loss: it failed"),
        ({"loss": lambda output, target: output}, "loss: expected a single number"),
        ({"loss": lambda output, target: output.sum().detach()}, "loss: expected a single number"),
        ({"loss": lambda output, target: 1.0}, "loss: expected a single number"),
        ({"progress": "yes"}, "progress='yes'"),
    ],
)
def test_bad_arguments(change: dict[str, Any], words: str) -> None:
    model = settled(Small())
    given = {
        "plan": se_fx.plan(model, min_channels=1),
        "batches": [data()],
        "loss": F.cross_entropy,
        "progress": False,
        **change,
    }
    with pytest.raises(se_fx.SqueezeExciteError) as caught:
        se_fx.score(model, **given)
    assert words in str(caught.value)


def test_a_model_with_these_blocks_is_refused() -> None:
    model = settled(Small())
    plan = se_fx.plan(model, min_channels=1)
    with pytest.raises(se_fx.SqueezeExciteError, match="it has a block at 'stem' already"):
        se_fx.score(se_fx.transform(model, plan), plan, [data()], F.cross_entropy)


def test_by_needs_scores() -> None:
    plan = se_fx.plan(Small(), min_channels=1)
    with pytest.raises(se_fx.SqueezeExciteError, match="this plan's sites have no scores"):
        plan.within(params=100, by="score")
    with pytest.raises(se_fx.SqueezeExciteError, match="by='size': expected None, or 'score'"):
        plan.within(params=100, by="size")
