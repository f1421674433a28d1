"""All rewrites, together and each alone: values changed in place or read by others, and random chains."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from excited import NARROW, STYLES, WIDE, Excited, assert_same, images, outcomes, settled
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import se_fx
from se_fx import SqueezeExcite2d
from se_fx.rewrites import REWRITES


class Written(nn.Module):
    """Values that are changed in place, under their own or another name, or read by others."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem, self.conv = nn.Conv2d(NARROW, NARROW, 3), nn.Conv2d(NARROW, WIDE, 1)
        self.norm, self.se = nn.BatchNorm2d(WIDE), SqueezeExcite2d(WIDE, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        y = self.conv(x)
        if self.how == "output changed":
            F.relu_(y)
        elif self.how == "output changed by an argument":
            F.hardswish(y, True)
        elif self.how == "a view changed":
            y.view(y.shape[0], -1).clamp_(min=0)
        elif self.how == "a part changed":
            y[:, 0] = 0
        elif self.how == "input changed later":
            x.mul_(2)
        elif self.how == "input changed before":
            x = F.relu_(x)
            y = self.conv(x)
        if self.how == "a view read later":
            view = y.view(y.shape[0], -1)
            return self.se(y), view
        z = self.se(self.norm(y))
        if self.how == "output changed later":
            y.zero_()
        if self.how == "sum in place into the shortcut":
            y += z
            return y, z
        return {
            "conv read too": (z, y),
            "scaled read too": (z + y, z),
            "scaled read by nobody": (y,),
            "sum": (z + y,),
            "sum with itself": (z + z,),
            "weighted sum": (torch.add(z, y, alpha=2),),
            "sum with a number": (z + 1,),
        }.get(self.how, (z,))


CHANGED = ("output changed", "output changed by an argument", "a view changed", "a part changed")
READ = ("input changed later", "input changed before", "output changed later", "sum in place into the shortcut")
SUMS = ("sum", "sum with itself", "weighted sum", "sum with a number")


@pytest.mark.parametrize(
    "how", ["plain", *CHANGED, *READ, *SUMS, "conv read too", "scaled read too", "scaled read by nobody", "a view read later"]
)
def test_changes_in_place_and_other_readers(how: str) -> None:
    model = settled(Written(how))
    for rewrites in (*([name] for name in REWRITES), None):
        fast = se_fx.optimize_for_inference(model, rewrites=rewrites)
        x = images()
        assert_same(fast(x.clone()), model(x.clone()))
    if how in CHANGED:
        assert not any(outcomes(fast, "hoist_squeezes"))


class ScaledInPlace(nn.Module):
    """The product with the gate takes the place of the map."""

    def __init__(self, reader: str, late: str) -> None:
        super().__init__()
        self.reader, self.late = reader, late
        self.conv, self.shortcut = nn.Conv2d(NARROW, WIDE, 1), nn.Conv2d(NARROW, WIDE, 1)
        self.norm, self.se = nn.BatchNorm2d(WIDE), Excited([], "linear", WIDE)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        shortcut, y = self.shortcut(x), self.conv(x)
        view = y.flatten(2)
        z = y.mul_(self.se.gate(y))
        out = self.norm(z) if self.reader == "norm" else z + shortcut
        return (out, {"nothing": x, "the map": y, "a view of it": view, "the product": z}[self.late] + 1)


@pytest.mark.parametrize("late", ["nothing", "the map", "a view of it", "the product"])
@pytest.mark.parametrize("reader", ["norm", "sum"])
def test_what_is_scaled_in_place_and_read_again(reader: str, late: str) -> None:
    model = settled(ScaledInPlace(reader, late))
    rewrite = {"norm": "fold_norms", "sum": "fuse_scales"}[reader]
    for rewrites in (None, [rewrite]):
        fast = se_fx.optimize_for_inference(model, rewrites=rewrites)
        assert_same(fast(x := images()), model(x))
    assert any(outcomes(fast, rewrite)) is (late == "nothing")


# -------------------------------------------------------------------------------------------------------- random chains
class Chain(nn.Module):
    """Convs, norms, activations and blocks in a row, some shared, some values read twice, some changed in place."""

    def __init__(self, steps: list[tuple]) -> None:
        super().__init__()
        self.steps, self.layers, width = [], nn.ModuleList(), NARROW
        previous: dict[int, nn.Module] = {}
        for kind, *options in steps:
            module: nn.Module | None = None
            if kind == "conv":
                out, groups, bias, kernel, stride, padding = options
                groups = groups if width % groups == 0 == out % groups else 1
                module = nn.Conv2d(width, out, kernel, stride, padding, groups=groups, bias=bias)
                width = out
            elif kind == "same conv again":
                module = previous.get(width)
            elif kind == "norm":
                module = nn.BatchNorm2d(width)
            elif kind == "block":
                module = Excited([], options[0], width)
            if isinstance(module, nn.Conv2d) and module.in_channels == width:
                previous[width] = module
            if module is not None:
                self.layers.append(module)
            self.steps.append((kind, len(self.layers) - 1 if module is not None else None))

    def forward(self, x: Tensor) -> list[Tensor]:
        read = []
        for kind, layer in self.steps:
            if layer is not None:
                x = self.layers[layer](x)
            elif kind == "relu":
                x = F.relu(x)
            elif kind == "relu in place":
                F.relu_(x)
            elif kind == "read":
                read.append(x.amax((2, 3)))
            elif kind == "sum":
                x = x + x.flip(0)
            elif kind == "scaled":
                x = x * 2
        return [x, *read]


WIDTHS = st.sampled_from([4, 8, 12])
STEPS = st.one_of(
    st.tuples(st.just("conv"), WIDTHS, st.sampled_from([1, 2, 4]), st.booleans(), st.just(1), st.just(1), st.just(0)),
    st.tuples(st.just("conv"), WIDTHS, st.just(1), st.booleans(), st.sampled_from([1, 3]), st.sampled_from([1, 2]), st.just(1)),
    st.sampled_from([(kind,) for kind in ("norm", "relu", "relu in place", "read", "sum", "scaled", "same conv again")]),
    st.tuples(st.just("block"), st.sampled_from([*STYLES, "eca"])),
)


@pytest.mark.random
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(steps=st.lists(STEPS, min_size=2, max_size=9), sized=st.booleans(), seed=st.integers(0, 99))
def test_random_chains(steps: list[tuple], sized: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = settled(Chain([("conv", 8, 1, True, 1, 1, 0), *steps, ("block", "ours")]))
    x = images(2, NARROW, 9, 7)
    fast = se_fx.optimize_for_inference(model, x if sized else None)
    for batch in (x, images(1, NARROW, 6, 6)):
        assert_same(fast(batch.clone()), model(batch.clone()))
