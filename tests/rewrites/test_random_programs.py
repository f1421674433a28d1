"""Optimised programs do what the programs do, whatever is written down in whatever order."""

from __future__ import annotations

import copy
import sys
from random import Random

import hypothesis.strategies as st
import pytest
import torch
from excited import assert_same, settled
from hypothesis import HealthCheck, given, settings
from programs import EFFECTS, GATES, MAPS, Program
from torch import Tensor, nn

import se_fx

NAMES = st.one_of(*(st.sampled_from(sorted(table)) for table in (MAPS, GATES, EFFECTS)))
RECENT = st.integers(0, 2)
HOW = ("float64", "float64", "float32", "autocast")


def gradient(model: nn.Module, x: Tensor) -> Tensor | None:
    """Of an image; None where autograd refuses to tell it."""
    x = x.clone().requires_grad_()
    try:
        sum(output.square().sum() for output in called(model, x.clone()) if output.requires_grad).backward()
    except RuntimeError:
        return None
    return x.grad


def check(steps: list[tuple[str, int, int]], seed: int, sized: bool, how: str = "float64") -> None:
    torch.manual_seed(seed)
    exact = settled(Program(steps))
    model, dtype = (exact, torch.float64) if how == "float64" else (single(exact), torch.float32)
    try:
        with torch.no_grad(), autocast(how):
            model(torch.randn(2, 3, 4, 5, dtype=dtype))
    except RuntimeError:
        return  # such as one that changes what is expanded
    fast = se_fx.optimize_for_inference(model, torch.randn(2, 3, 4, 5, dtype=dtype) if sized else None)
    for size in ((2, 3, 4, 5), (3, 3, 6, 4), (1, 3, 4, 4)):
        x = torch.randn(size, dtype=dtype)
        kept = x.clone()
        with torch.no_grad(), autocast(how):
            found, expected = called(fast, x), called(model, x)
            if how == "float64":
                assert_same(found, expected)
            else:
                assert_as_near(found, expected, called(exact, x.double()))
        assert torch.equal(x, kept)
    expected = gradient(model, x) if how == "float64" else None
    if expected is not None:
        found = gradient(fast, x)
        assert found is not None, "the model has gradients"
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9, equal_nan=True)


def called(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(0)  # of noise
    return model(x)


def single(model: nn.Module) -> nn.Module:
    """In float32, but for what is of one type in any model."""
    model = copy.deepcopy(model)
    wide = model.exact
    model = model.float()
    model.exact = wide
    return model


def autocast(how: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast")


def assert_as_near(found: list[Tensor], expected: list[Tensor], exact: list[Tensor]) -> None:
    """Of the same types and shapes, and as near as the model to what it is in float64, rounding by rounding."""
    for a, b, c in zip(found, expected, exact, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        error, bound = (float((each.double() - c).nan_to_num().abs().max()) for each in (a, b))
        tiny = torch.finfo(a.dtype).eps * float(c.nan_to_num().abs().max())
        assert error <= 16 * bound + 64 * tiny, f"{error} from float64, the model {bound}"


@pytest.mark.random
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, database=None)
@given(
    steps=st.lists(st.tuples(NAMES, RECENT, RECENT), min_size=2, max_size=12),
    seed=st.integers(0, 99),
    sized=st.booleans(),
    how=st.sampled_from(HOW),
)
def test_random_programs(steps: list[tuple[str, int, int]], seed: int, sized: bool, how: str) -> None:
    check(steps, seed, sized, how)


def drawn(number: int) -> tuple[list[tuple[str, int, int]], int, bool, str]:
    """Program and options of a number."""
    random = Random(number)
    tables = [sorted(table) for table in (MAPS, GATES, EFFECTS)]
    steps = [
        (random.choice(random.choice(tables)), random.randrange(3), random.randrange(3)) for _ in range(random.randint(2, 12))
    ]
    return steps, random.randrange(100), random.random() < 0.5, random.choice(HOW)


if __name__ == "__main__":  # python test_random_programs.py 5000 [first number]
    count, first = int(sys.argv[1]), int([*sys.argv, "0"][2])
    faults = 0
    for number in range(first, first + count):
        try:
            check(*drawn(number))
        except Exception as error:  # whatever comes of it
            faults += 1
            print(number, drawn(number), type(error).__name__, str(error)[:300], flush=True)
        if (number - first + 1) % 500 == 0:
            print(f"{number - first + 1} programs, {faults} disagree", flush=True)
    print(f"{count} programs, {faults} disagree")
