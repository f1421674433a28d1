"""One program for each way in which a rewrite could change what somebody sees."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from excited import NARROW, WIDE, assert_same, outcomes, settled
from test_random_programs import check
from torch import Tensor, nn

import se_fx
from se_fx.rewrites import REWRITES
from se_fx.rewrites.evaluation import Evaluation

KINDS = {
    "reads moved past changes in place": [
        [("scaled", 0, 0), ("relu_", 1, 0), ("norm", 0, 0)],
        [("scaled", 0, 0), ("gate changed", 0, 0), ("norm", 0, 0)],
        [("scaled", 0, 0), ("gate changed", 0, 0), ("added", 0, 1)],
        [("scaled", 0, 0), ("gate's view changed", 0, 0), ("added", 0, 1)],
        [("scaled", 0, 0), ("view changed", 1, 0), ("added", 0, 1)],
        [("swapped", 0, 0), ("scaled", 0, 0), ("flat view changed", 2, 0), ("norm", 0, 0)],
        [("wider", 0, 0), ("gate", 0, 0), ("narrow changed", 0, 0), ("scaled", 0, 0)],
        [("wider", 0, 0), ("view changed", 0, 0), ("gate", 0, 0), ("scaled", 0, 0)],
        [("wider", 0, 0), ("data added to", 0, 1), ("gate", 0, 0), ("scaled", 0, 0)],
        [("conv", 0, 0), ("scaled", 0, 0), ("view changed", 1, 0), ("added", 0, 1), *[("relu", 0, 0)] * 3],
        [("conv", 0, 0), ("scaled", 0, 0), ("gate's view changed", 0, 0), ("norm", 0, 0), *[("relu", 0, 0)] * 3],
    ],
    "effects erased": [
        [("scaled in place", 0, 0), ("another norm", 0, 0), ("added in place", 0, 0), ("expanded", 1, 0)],
        [("scaled by operator", 0, 0), ("norm", 0, 0), ("relu", 0, 0), ("relu", 0, 0)],
        [("conv", 0, 0), ("scaled in place", 0, 0), ("scaled and added", 3, 1), ("relu", 0, 0), ("relu", 0, 0), ("relu", 0, 0)],
        [("conv", 0, 0), ("scaled in place", 0, 0), ("added", 0, 2), ("relu", 0, 0), ("relu", 0, 0), ("relu", 0, 0)],
        [("scaled in place", 0, 0), ("norm", 0, 0), ("added", 0, 2)],
        [("scaled by operator", 0, 0), ("added", 0, 1)],
        [("gate squashed", 0, 0), ("scaled", 0, 0), ("norm", 0, 0)],
        [("map scaled", 0, 0), ("norm", 0, 0)],
        [("gate, constant", 0, 0), ("gate changed", 0, 0), ("scaled", 0, 0)],
        [("gate, constant", 0, 0), ("scaled in place", 0, 0), ("added", 0, 1)],
        [("scaled", 0, 0), ("map added", 0, 1)],
    ],
    "aliases": [
        [("relu", 0, 0), ("view kept", 0, 0), ("scaled", 0, 0)],
        [("conv", 0, 0), ("dropped", 0, 0), ("scaled", 0, 0), ("read", 2, 0)],
        [("conv", 0, 0), ("unary plus", 0, 0), ("scaled", 0, 0), ("added", 0, 2)],
        [("conv", 0, 0), ("ravelled and changed", 0, 0), ("norm", 0, 0)],
        [("conv", 0, 0), ("gate", 0, 0), ("diagonal changed", 0, 0), ("scaled", 0, 0)],
        [("conv", 0, 0), ("gate", 0, 0), ("unfolded and changed", 0, 0), ("scaled", 0, 0)],
        [("conv", 0, 0), ("gate", 0, 0), ("written by out", 0, 0), ("scaled", 0, 0)],
        [("conv", 0, 0), ("einsum", 0, 0), ("scaled", 0, 0), ("added", 1, 2)],
    ],
    "shapes and orders": [
        [("wider", 0, 0), ("gate in another order", 0, 0), ("scaled", 0, 0)],
        [("wider", 0, 0), ("gate shuffled", 0, 0), ("scaled", 0, 0)],
        [("wider", 0, 0), ("gate of square windows", 0, 0), ("scaled", 0, 0)],
        [("wider", 0, 0), ("gate of rows", 0, 0), ("scaled", 0, 0)],
        [("wider", 0, 0), ("gate of a sum", 0, 0), ("scaled", 0, 0)],
        [("wider", 0, 0), ("gate of a clamped map", 0, 0), ("scaled", 0, 0)],
        [("wider", 0, 0), ("gate of the largest", 0, 0), ("scaled", 0, 0)],
        [("wider", 0, 0), ("gate that is changed", 0, 0), ("scaled", 0, 0)],
        [("wider", 0, 0), ("of one sample", 0, 0), ("scaled", 0, 0)],
    ],
    "arguments by keyword": [
        [("conv by keywords", 0, 0), ("norm", 0, 0)],
        [("first again", 0, 0), ("another norm", 0, 0)],
        [("scaled by keyword", 0, 0), ("norm", 0, 0)],
        [("addcmul", 0, 0), ("gate", 0, 0), ("scaled", 0, 0)],
        [("addcmul, weighted", 0, 0), ("norm", 0, 0)],
        [("scaled", 0, 0), ("added, weighted", 0, 1)],
        [("conv", 0, 0), ("norm by function", 0, 0)],
    ],
}


@pytest.mark.parametrize(("kind", "number"), [(kind, number) for kind in KINDS for number in range(len(KINDS[kind]))])
def test_what_a_program_does_is_kept(kind: str, number: int) -> None:
    for sized in (False, True):
        check(KINDS[kind][number], number, sized)


class Net(nn.Module):
    """A pointwise conv, a norm and a block, in one order or another."""

    def __init__(self, norm_first: bool = True, block: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, NARROW, 3), nn.Conv2d(NARROW, WIDE, 1), nn.BatchNorm2d(WIDE)
        self.block, self.norm_first = block or se_fx.SqueezeExcite2d(WIDE, 4), norm_first

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.relu(self.stem(x)))
        z = self.block(self.norm(y)) if self.norm_first else self.norm(self.block(y))
        z += y
        return z


class Doubling(nn.Dropout):
    """Untraceable, and no dropout."""

    def forward(self, input: Tensor) -> Tensor:
        return input * 2 if bool(input.abs().sum() >= 0) else input


@pytest.mark.parametrize("part", ["conv", "norm", "block.fc1", "block.activation"])
def test_a_forward_replaced_on_the_instance_runs(part: str) -> None:
    model = settled(Net())
    module = model.get_submodule(part)
    own = module.forward
    module.forward = lambda *args: own(*args) * 2
    fast = se_fx.optimize_for_inference(model)
    assert_same(fast(x := torch.randn(2, 3, 6, 5, dtype=torch.float64)), model(x))


def test_a_subclass_of_dropout_that_does_something_runs() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 1), Doubling(), nn.BatchNorm2d(4)))
    fast = se_fx.optimize_for_inference(model)
    assert_same(fast(x := torch.randn(2, 3, 6, 5, dtype=torch.float64)), model(x))


BLOCKS: dict[str, Callable[[], nn.Module | None]] = {
    "ours": lambda: None,
    "torchvision's": lambda: torchvision.ops.SqueezeExcitation(WIDE, 4),
    "timm's": lambda: timm.layers.SEModule(WIDE, rd_channels=4),
    "eca": lambda: timm.layers.EcaModule(WIDE),
    "ese": lambda: timm.layers.EffectiveSEModule(WIDE),
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_are_kept_under_autocast(block: str, norm_first: bool, dtype: torch.dtype) -> None:
    model = settled(Net(norm_first, BLOCKS[block]())).float()
    fast = se_fx.optimize_for_inference(model)
    x = torch.randn(2, 3, 8, 6)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        torch.testing.assert_close(fast(x), model(x), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("shape", [(WIDE, 1, 1), (1, WIDE, 1, 1), (1, 1, 1)])
def test_the_type_that_a_constant_gives_is_kept(shape: tuple[int, ...]) -> None:
    class Factor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.n = nn.Conv2d(3, 4, 1), nn.Conv2d(4, WIDE, 1), nn.BatchNorm2d(4)
            self.factor = nn.Parameter(torch.rand(shape))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.n(self.a(x))) * self.factor

    model = settled(Factor())
    fast = se_fx.optimize_for_inference(model)
    assert outcomes(fast, "fold_norms") == [True, True]
    assert_same(fast(x := torch.randn(2, 3, 6, 5, dtype=torch.float64)), model(x))
    model = model.float()
    fast = se_fx.optimize_for_inference(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = fast(x.float()), model(x.float())
    assert found.dtype == expected.dtype == torch.float32


def test_a_batch_of_a_factor_is_nothing_to_put_before_a_map_that_may_have_none() -> None:
    class Factor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.factor = nn.Conv2d(3, 4, 1), nn.Conv2d(4, WIDE, 1), nn.Parameter(torch.rand(1, WIDE, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) * self.factor

    model = settled(Factor())
    fast = se_fx.optimize_for_inference(model)
    assert outcomes(fast, "fold_norms") == []
    assert_same(fast(x := torch.randn(3, 6, 5, dtype=torch.float64)), model(x))


@pytest.mark.parametrize("norm_first", [True, False])
def test_norms_of_another_type_than_convs(norm_first: bool) -> None:
    model = settled(Net(norm_first)).bfloat16()
    model.norm.float()
    fast = se_fx.optimize_for_inference(model)
    x = torch.randn(2, 3, 8, 6, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=5e-2, atol=5e-2)


def test_complex_numbers_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1)).to(torch.complex128).eval()
    fast = se_fx.optimize_for_inference(model)
    x = torch.randn(2, 3, 4, 4, dtype=torch.complex128)
    assert torch.equal(fast(x), model(x))


@pytest.mark.parametrize("block", ["ours", "torchvision's"])
def test_images_without_a_batch(block: str) -> None:
    class Unbatched(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.conv(F.relu(self.stem(x))))

    model = settled(Unbatched(block=BLOCKS[block]()))
    fast = se_fx.optimize_for_inference(model)
    assert outcomes(fast, "hoist_squeezes") == [True]
    x = torch.randn(3, 8, 6, dtype=torch.float64)
    with torch.no_grad():
        assert_same(fast(x), model(x))
        assert_same(fast(x[None]), model(x[None]))


@pytest.mark.parametrize("norm_first", [True, False])
def test_models_without_values(norm_first: bool) -> None:
    with torch.device("meta"):
        model = Net(norm_first).eval()
        assert se_fx.optimize_for_inference(model)(torch.empty(2, 3, 8, 6)).shape == (2, WIDE, 6, 4)


class Sized(nn.Module):
    """A gate that asks for the size, the type and the place of its map."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDE, 4), nn.Linear(4, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = x.mean((2, 3)).type_as(x).view(x.size(0), WIDE)
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(squeezed)))).view(x.size(0), WIDE, 1, 1)


def test_the_default_device_decides_nothing() -> None:
    model = settled(Net(block=Sized()))
    usual = se_fx.optimize_for_inference(model)
    with torch.device("meta"):
        elsewhere = se_fx.optimize_for_inference(model)
    assert outcomes(usual, "hoist_squeezes") == [True]
    for rewrite in REWRITES:
        assert outcomes(elsewhere, rewrite) == outcomes(usual, rewrite)
    assert_same(elsewhere(x := torch.randn(2, 3, 6, 5, dtype=torch.float64)), model(x))


@pytest.mark.parametrize("norm_first", [True, False])
def test_what_is_made_under_inference_mode_works_outside(norm_first: bool) -> None:
    model = settled(Net(norm_first))
    with torch.inference_mode():
        fast = se_fx.optimize_for_inference(model)
    gradients = []
    for each in (model, fast):
        x = torch.ones(2, 3, 6, 5, dtype=torch.float64).requires_grad_()
        each(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["regnety_002", "mobilenetv3_small_050", "ese_vovnet19b_dw"])
def test_gradients_of_images(name: str) -> None:
    model = settled(timm.create_model(name, num_classes=10))
    fast, gradients = se_fx.optimize_for_inference(model), []
    assert any(outcomes(fast, "fuse_scales"))
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for each in (model, fast):
        x = image.clone().requires_grad_()
        each(x).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6 * float(gradients[0].abs().max()))


# ----------------------------------------------------------------------------------------- a check less is a fault that is seen
SABOTAGE = {
    "may_change": lambda self, value, after, before: False,
    "is_forgotten": lambda self, value, last: True,
    "writers": lambda self, value: iter(()),
    "averages": lambda self, way, source, channels: True,
    "keeps_order": lambda self, node, source, shape, maps: True,
}


@pytest.mark.parametrize("check_left_out", SABOTAGE)
def test_a_check_left_out_is_seen(check_left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Evaluation if hasattr(Evaluation, check_left_out) else se_fx.analysis.Effects
    monkeypatch.setattr(home, check_left_out, SABOTAGE[check_left_out])
    for number, steps in ((number, steps) for programs in KINDS.values() for number, steps in enumerate(programs)):
        try:
            check(steps, number, sized=False)
        except Exception:  # whatever comes of it
            return
    pytest.fail("no program is another without it")
