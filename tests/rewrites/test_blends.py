"""As much of a block as was learned goes into its gate, where nobody can tell."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from excited import NARROW, WIDE, Excited, assert_same, images, outcomes, settled
from torch import Tensor, nn

import se_fx


class Blend(nn.Module):
    """u + s (u g - u), and what else may happen to the values in it."""

    def __init__(self, strength: float, case: str) -> None:
        super().__init__()
        self.case = case
        self.conv, self.se = nn.Conv2d(NARROW, WIDE, 3), Excited([], "linear", WIDE)
        self.strength = nn.Parameter(torch.full((WIDE, 1, 1), strength))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        u = self.conv(x)
        gate = self.se.gate(u)
        made = u.mul_(gate) if self.case == "scaled in place" else u * gate
        if self.case == "the map changes":
            u.add_(1)
        if self.case == "the gate changes":
            gate.zero_()
        difference = made - (u + 0 if self.case == "of another map" else u)
        y = u + self.strength * difference
        if self.case == "the sum changes":
            F.relu_(y)
        return y, {"the product is read": made, "the difference is read": difference}.get(self.case, u) + 1


#: Whether a share that isn't 0 goes into the gate; None where it isn't looked for.
CASES = {
    "plain": True,
    "the sum changes": True,
    "the gate changes": False,
    "the map changes": False,
    "scaled in place": False,
    "of another map": None,
    "the product is read": None,
    "the difference is read": None,
}


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_blends(case: str, strength: float) -> None:
    model = settled(Blend(strength, case))
    for rewrites in (None, ["blends"]):
        fast = copy.deepcopy(se_fx.optimize_for_inference(model, rewrites=rewrites))
        for _ in range(2):
            assert_same(fast(x := images()), model(x))
    found = outcomes(se_fx.optimize_for_inference(model, rewrites=["blends"]), "blends")
    assert found == ([] if CASES[case] is None else [CASES[case] or strength == 0])
