"""Placements: where in a residual unit each of them scales, by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from units import UNITS, Doubled, Scales, Unit

import se_fx
from se_fx.placement import PLACEMENTS, Spot


def branch(m: Unit, x: Tensor) -> Tensor:
    return m.norm(m.b(F.relu(m.a(x))))


PLACED = {
    "residual": lambda m, x: F.relu(2 * branch(m, x) + m.down(x)),
    "pre": lambda m, x: F.relu(branch(m, 2 * x) + m.down(x)),
    "post": lambda m, x: 2 * F.relu(branch(m, x) + m.down(x)),
    "identity": lambda m, x: F.relu(branch(m, x) + 2 * m.down(x)),
    "norm": lambda m, x: F.relu(2 * branch(m, x) + m.down(x)),
}


@pytest.mark.parametrize("placement", PLACED)
def test_where_each_placement_scales(placement: str) -> None:
    model = Unit(lambda m, x: F.relu(branch(m, x) + m.down(x))).eval()
    gm = se_fx.transform(model, placement=placement, block=Doubled, min_channels=1)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(gm(x), PLACED[placement](model, model.stem(x)))


class PlusOne(Doubled):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def total(m: Unit, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x))) + x


#: What follows a sum s, and what it is with a block that adds one behind the unit.
AFTER = {
    "activation": (lambda m, s: s.tanh(), lambda m, s: s.tanh() + 1),
    "module": (lambda m, s: m.tanh(s), lambda m, s: s.tanh() + 1),
    "other readers": (lambda m, s: torch.cat([s.tanh(), s], 1), lambda m, s: torch.cat([(s + 1).tanh(), s + 1], 1)),
    "other function": (lambda m, s: s.exp(), lambda m, s: (s + 1).exp()),
    "parameters": (lambda m, s: m.prelu(s), lambda m, s: m.prelu(s + 1)),
    "parameters, as a function": (lambda m, s: F.prelu(s, m.prelu.weight), lambda m, s: m.prelu(s + 1)),
}


@pytest.mark.parametrize("name", AFTER)
def test_behind_a_unit_is_behind_the_activation_that_alone_reads_it(name: str) -> None:
    after, expected = AFTER[name]
    model = Unit(lambda m, x: after(m, total(m, x))).eval()
    model.prelu, model.tanh = nn.PReLU(8), nn.Tanh()
    gm = se_fx.transform(model, placement="post", block=PlusOne, min_channels=1)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(gm(x), expected(model, total(model, model.stem(x))))


#: What only scales a branch y; m.position is not zero here.
SCALED = {
    "nothing": lambda m, y: y,
    "constant": lambda m, y: 0.1 * y,
    "layer scale": lambda m, y: y * m.position,
    "twice": lambda m, y: (y / 3).mul(m.position),
    "dropout": lambda m, y: F.dropout(y, training=True),
    "module": lambda m, y: m.drop(y),
}


@pytest.mark.parametrize("name", SCALED)
def test_at_the_end_of_a_branch_is_upstream_of_what_only_scales_it(name: str) -> None:
    scaled = SCALED[name]
    model = Unit(lambda m, x: x + scaled(m, m.b(F.relu(m.a(x)))))
    model.position, model.drop = nn.Parameter(torch.randn(1, 8, 1, 1)), nn.Dropout()
    gm = se_fx.transform(model, placement="residual", block=PlusOne, min_channels=1)
    s = model.stem(x := torch.randn(2, 3, 5, 5))
    torch.manual_seed(1)
    expected = s + scaled(model, model.b(F.relu(model.a(s))) + 1)
    torch.manual_seed(1)
    assert torch.equal(gm(x), expected)


def doubled_widths(m: Unit, x: Tensor) -> Tensor:
    x = x + m.b(F.relu(m.a(x)))
    y = m.b(F.relu(m.a(x)))
    return torch.cat([x, x], 1) + torch.cat([y, y], 1)


def read_late(m: Unit, x: Tensor) -> Tensor:
    name = x.view_as(x)
    y = x.mul_(2)
    return m.b(F.relu(m.a(name))) + y


#: Convs that get a block, by the placement and the code.
CHOSEN = [
    ("pre", lambda m, x: m.b(m.a(F.relu(x))) + x, ["b"]),
    ("pre", lambda m, x: m.b(m.a(F.relu_(x))) + x, []),  # what the shortcut reads is changed by the branch
    ("pre", lambda m, x: m.b(m.a(F.relu_(x.view_as(x)))) + x, []),  # the same by another name
    ("pre", lambda m, x: m.b(F.relu(m.a(x.view_as(x)))) + x.mul_(2), ["b"]),  # the branch reads first
    ("pre", read_late, []),  # what the branch reads is changed by the shortcut
    ("pre", lambda m, x: x.add_(m.b(F.relu(m.a(x)))), ["b"]),  # when the branch has read it
    ("identity", lambda m, x: m.b(m.a(F.relu_(x.view_as(x)))) + x, ["b"]),  # before the shortcut is read
    ("identity", lambda m, x: m.b(F.relu(m.a(x))).add_(x), ["b"]),
    ("identity", lambda m, x: x.add_(m.b(F.relu(m.a(x)))), []),  # who reads x reads the sum
    ("identity", lambda m, x: m.b(F.relu(m.a(x))).add(x), ["b"]),
    ("norm", lambda m, x: F.group_norm(m.b(F.relu(m.norm(m.a(x)))), 2), ["a", "b"]),
    ("norm", lambda m, x: m.a(F.relu(m.norm(m.a(x)))) + m.other(m.b(x)), ["b"]),  # the second call of `a` has none
    ("norm", lambda m, x: F.instance_norm(x, weight=m.a(x).mean((0, 2, 3))), ["stem"]),
    ("residual", doubled_widths, []),  # one block for two widths there can't be
]


def grown(m: Unit, x: Tensor) -> Tensor:
    y = m.b(F.relu(m.a(x)))
    name = y.view_as(y)
    z = y + x
    name.mul_(3)
    return z + y


def changed_late(m: Unit, x: Tensor) -> Tensor:
    y = m.b(F.relu(m.a(x))) + x
    x.mul_(3)
    return y + x


WRITING = [unit for _, unit, _ in CHOSEN if unit is not doubled_widths] + [grown, changed_late]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("unit", WRITING)
@torch.no_grad()
def test_a_block_that_changes_nothing_changes_nothing_wherever_memory_is_written(unit: Any, in_place: bool) -> None:
    x, placed = torch.randn(2, 3, 5, 5), 0
    for placement in PLACEMENTS:
        model = Unit(unit).eval()
        expected = model(x)
        with contextlib.suppress(se_fx.SqueezeExciteError):
            options = {"placement": placement, "block": Scales, "min_channels": 1}
            result = se_fx.apply_squeeze_excite(model, **options) or model if in_place else se_fx.transform(model, **options)
            assert torch.equal(result(x), expected), placement
            placed += 1
    assert placed


@pytest.mark.parametrize(("placement", "unit", "convs"), CHOSEN)
def test_which_convs_each_placement_chooses(placement: str, unit: Callable[[Unit, Tensor], Tensor], convs: list[str]) -> None:
    model = Unit(unit)
    if not convs:
        with pytest.raises(se_fx.SqueezeExciteError, match="no such place"):
            se_fx.plan(model, placement=placement, min_channels=1)
        return
    assert [site.name for site in se_fx.plan(model, placement=placement, min_channels=1).sites] == convs


def test_the_width_of_what_a_branch_reads_is_the_convs_that_read_it() -> None:
    class Bare(nn.Module):  # nothing tells the width of its input but the convs that read it
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(F.relu(self.a(x)))

    model, x = Bare().eval(), torch.randn(2, 8, 5, 5)
    once = se_fx.transform(model, placement="pre", block=Doubled, min_channels=1)
    assert [(site.name, site.channels) for site in se_fx.Plan.of(once).sites] == [("b", 8)]
    assert torch.equal(once(x), x + model.b(F.relu(model.a(2 * x))))


def test_on_the_shortcut_others_read_the_plain_value() -> None:
    model = Unit(lambda m, x: torch.cat([x, x + m.b(F.relu(m.a(x)))], 1)).eval()
    gm = se_fx.transform(model, placement="identity", block=Doubled, min_channels=1)
    s = model.stem(x := torch.randn(2, 3, 5, 5))
    assert torch.equal(gm(x), torch.cat([s, 2 * s + model.b(F.relu(model.a(s)))], 1))


def test_a_policy_of_ones_own() -> None:
    def deep_1x1(graph, root):
        for node in graph.nodes:
            module = root.get_submodule(node.target) if node.op == "call_module" else None
            if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.in_channels > 3:
                yield Spot(node.target, module.out_channels, (node,))

    model = Unit(UNITS["projected"])
    plan = se_fx.plan(model, placement=deep_1x1, min_channels=1)
    assert [site.name for site in plan.sites] == ["down"]
    assert {skip.reason for skip in plan.skipped} == {"is not chosen by test_placements.deep_1x1"}
    gm = se_fx.transform(model, plan)
    assert next(key for key in gm.state_dict() if "squeeze_excite" in key).startswith("squeeze_excite.of_down.")
