"""Seeds: one gives one set of weights, whatever the global generator."""

from __future__ import annotations

import torch
import torchvision
from test_copies import weights
from torch import nn

import se_fx


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


def drawn_under(own: int, model: nn.Module, **options) -> dict[str, torch.Tensor]:
    """The blocks' weights when the global generator is at a seed of its own."""
    torch.manual_seed(own)
    state = torch.get_rng_state()
    drawn = weights(se_fx.transform(model, min_channels=1, **options))
    assert torch.equal(torch.get_rng_state(), state) == ("seed" in options)
    return drawn


def test_one_seed_one_set_of_weights_whatever_the_global_generator() -> None:
    model = torchvision.models.resnet18()
    drawn = drawn_under(1, model, seed=7)
    assert same(drawn, drawn_under(2, model, seed=7))
    assert not same(drawn, drawn_under(1, model, seed=8))
    assert same(drawn, drawn_under(7, model))  # what the global generator gives at that seed
    assert not same(drawn, drawn_under(1, model))


def test_a_seed_is_for_plans_other_blocks_and_identity_too(cnn: nn.Sequential) -> None:
    plan = se_fx.plan(cnn, min_channels=1)
    assert same(weights(se_fx.transform(cnn, plan, seed=7)), drawn_under(1, cnn, seed=7))
    factory = lambda channels: nn.Conv2d(channels, channels, 1)  # noqa: E731
    assert same(drawn_under(1, cnn, block=factory, seed=7), drawn_under(2, cnn, block=factory, seed=7))
    identity = drawn_under(1, cnn, init="identity", seed=7)
    assert same(identity, drawn_under(2, cnn, init="identity", seed=7))
    assert not any(value.any() for key, value in identity.items() if "fc2" in key)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(se_fx.transform(cnn.eval(), min_channels=1, init="identity", seed=7)(x), cnn(x))


def test_apply_squeeze_excite_draws_from_a_seed_as_transform_does(cnn: nn.Sequential) -> None:
    expected = drawn_under(1, cnn, seed=7)
    state = torch.get_rng_state()
    se_fx.apply_squeeze_excite(cnn, min_channels=1, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(weights(cnn), expected)


def test_seeded_weights_are_drawn_on_the_cpu_and_go_where_the_conv_is(cnn: nn.Sequential) -> None:
    drawn = drawn_under(1, cnn, seed=7)
    with torch.device("meta"):  # another default device, such as an accelerator
        assert same(drawn, drawn_under(1, cnn, seed=7))
        made = []
        factory = lambda channels: made.append(nn.Linear(channels, channels)) or nn.Identity()  # noqa: E731
        se_fx.transform(cnn, min_channels=1, block=factory, seed=7)
        assert {layer.weight.device.type for layer in made[-2:]} == {"cpu"}
    on_meta = se_fx.transform(cnn.to("meta"), min_channels=1, seed=7)
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}
