"""Optimised programs do what the programs do, whatever is written down in whatever order."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from excited import assert_same, settled
from hypothesis import HealthCheck, given, settings
from programs import EFFECTS, GATES, MAPS, Program

import se_fx

NAMES = st.one_of(*(st.sampled_from(sorted(table)) for table in (MAPS, GATES, EFFECTS)))
RECENT = st.integers(0, 2)


def gradient(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """Of an image; None where autograd refuses to tell it."""
    x = x.clone().requires_grad_()
    try:
        sum(output.square().sum() for output in model(x.clone()) if output.requires_grad).backward()
    except RuntimeError:
        return None
    return x.grad


def check(steps: list[tuple[str, int, int]], seed: int, sized: bool) -> None:
    torch.manual_seed(seed)
    model = settled(Program(steps))
    try:
        with torch.no_grad():
            model(torch.randn(2, 3, 4, 5, dtype=torch.float64))
    except RuntimeError:
        return  # such as one that changes what is expanded
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    fast = se_fx.optimize_for_inference(model, x if sized else None)
    for size in ((2, 3, 4, 5), (3, 3, 6, 4), (1, 3, 4, 4)):
        x = torch.randn(size, dtype=torch.float64)
        with torch.no_grad():
            kept = x.clone()
            assert_same(fast(x), model(x))
            assert torch.equal(x, kept)
    expected = gradient(model, x)
    if expected is not None:
        found = gradient(fast, x)
        assert found is not None, "the model has gradients"
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.random
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, database=None)
@given(steps=st.lists(st.tuples(NAMES, RECENT, RECENT), min_size=2, max_size=12), seed=st.integers(0, 99), sized=st.booleans())
def test_random_programs(steps: list[tuple[str, int, int]], seed: int, sized: bool) -> None:
    check(steps, seed, sized)
