"""Random networks, random options: what se_fx promises holds for all of them.

Two tests draw 50 networks each, the same ones each time; `--hypothesis-show-statistics` says what. More, and others:

    python -m pytest -m random tests/test_random_networks.py --hypothesis-profile=many --hypothesis-seed=1

Whatever such a run finds gets a test of its own beside those of the promise that broke.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import currently_in_test_context, event, given, settings
from networks import Recipe, recipes
from pieces import AROUND, CODE, LAYERS
from promises import (
    FIRST,
    SECOND,
    Case,
    Pairs,
    assert_equal,
    assert_same_tensors,
    behaviour,
    description,
    gradients,
    is_new,
    transform,
)
from torch import fx, nn
from units import Scales

import se_fx
from se_fx import blocks
from se_fx.placement import PLACEMENTS


def small_kernels(name: str, module: nn.Module) -> bool:
    return module.kernel_size == (1, 1)


own_blocks = st.fixed_dictionaries(
    {"init": st.sampled_from(["identity", "identity", "identity", "default"])},
    optional={
        "latent_channels": st.sampled_from([1, 3, 0.5, 1 / 16]),
        "bias": st.booleans(),
        "gate": st.sampled_from(["sigmoid", "hardsigmoid", torch.sigmoid, nn.Hardsigmoid()]),
        "activation": st.sampled_from(["relu", "silu", "gelu", torch.tanh, nn.ELU()]),
        "overrides": st.sampled_from(
            [
                {"*": {"bias": True}},
                {"head": {"block": "scales"}},
                {"body.*": {"latent_channels": 2}, "*.b": {"gate": "hardsigmoid"}},
            ]
        ),
    },
)


other_blocks = st.fixed_dictionaries({"block": st.sampled_from([Scales, "scales"])})
places = st.fixed_dictionaries(
    {"min_channels": st.sampled_from([1, 4, 5, "auto"]), "placement": st.sampled_from(["conv", "conv", "conv", *PLACEMENTS])},
    optional={
        "where": st.sampled_from(["*", "body.*", "!head", ["*", "!stem", "!body.0*"], small_kernels]),
        "seed": st.sampled_from([0, 2**40]),
    },
)
options = st.builds(operator.or_, places, own_blocks | own_blocks | own_blocks | other_blocks)


# ---------------------------------------------------------------------------------------------------------------- tests
@pytest.mark.random
@settings(deadline=None)
@given(recipe=recipes, options=options, promises=st.sets(st.sampled_from(FIRST), min_size=1, max_size=2))
def test_identity_copies_plans_and_removal(recipe: Recipe, options: dict[str, Any], promises: set[Callable]) -> None:
    holds(recipe, options, promises)


@pytest.mark.random
@settings(deadline=None)
@given(recipe=recipes, options=options, promise=st.sampled_from(SECOND))
def test_costs_inference_and_training(recipe: Recipe, options: dict[str, Any], promise: Callable) -> None:
    holds(recipe, options, [promise])


@pytest.mark.parametrize("piece", [*LAYERS, *(f"code: {name}" for name in CODE), *((name, "conv", "conv") for name in AROUND)])
def test_every_piece_by_itself(piece: Any) -> None:
    holds(Recipe([piece]), {"min_channels": 1, "init": "identity"}, [gradients])


def holds(recipe: Recipe, options: dict[str, Any], promises: Iterable[Callable[[Case], Pairs]]) -> None:
    """Transform leaves its input alone, changes nothing at identity, and the `promises` hold."""
    with mock.patch.dict(blocks.BLOCKS, {"scales": Scales}):
        model = recipe.network()
        before = description(model)
        try:
            result = transform(model, **options)
        except se_fx.SqueezeExciteError as error:
            assert any(words in str(error) for words in ("no such place", "matches no Conv2d")), error  # noqa: PT017
            event("refused")  # where a placement or a pattern finds nothing in the network
            assert description(model) == before
            return
        assert description(model) == before
        if currently_in_test_context():
            note(recipe, result)
        assert_same_tensors(result, model)
        assert is_new(result.state_dict().keys() - model.state_dict().keys())
        case = Case(recipe, options, model, result)
        pairs = [pair for promise in promises for pair in promise(case)]
        if case.is_identity:
            pairs.append((result, model))
        start = {name: buffer.clone() for name, buffer in model.named_buffers()}
        outputs: dict[nn.Module, Any] = {}
        for pair in pairs:
            for each in pair:
                if each not in outputs:
                    outputs[each] = behaviour(each, recipe, start)
            assert_equal(*(outputs[each] for each in pair))


def note(recipe: Recipe, result: nn.Module) -> None:
    """For the statistics: what was drawn."""
    report = se_fx.report(result)
    event("whole" if isinstance(result, fx.GraphModule) and not report.opaque else "split in regions")
    event(f"sites: {len(report.sites)}")
    for field in ("dtype", "input", "output", "batch"):
        event(f"{field}: {getattr(recipe, field)}")
