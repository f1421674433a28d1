"""Each rewrite alone: by hand, where it is legal and where it isn't, and on random chains of convs, norms and blocks."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import se_fx
from se_fx import SqueezeExcite2d
from se_fx.rewrites import REWRITES
from se_fx.rewrites.products import VectorLinear

WIDE, NARROW = 12, 4


def settled(model: nn.Module) -> nn.Module:
    """In float64 and eval mode, with norms that do something: what is exact but for rounding agrees to 12 digits."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    return model.double().eval()


def outcomes(model: nn.Module, rewrite: str) -> list[bool]:
    (step,) = (step for step in se_fx.report(model).steps if step.rewrite == rewrite)
    return [change.applied for change in step.changes]


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (3, NARROW, 7, 5), dtype=torch.float64)


def assert_same(a, b) -> None:
    for x, y in zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)  # sums in another order, in float64


class Excited(nn.Module):
    """A conv and what may follow it, then a block written in one of many styles."""

    def __init__(self, before, style="ours", channels=WIDE) -> None:
        super().__init__()
        self.before, self.style = nn.ModuleList(before), style
        self.fc1, self.fc2 = nn.Linear(channels, 5), nn.Linear(5, channels)
        self.conv1, self.conv2 = nn.Conv2d(channels, 5, 1), nn.Conv2d(5, channels, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        layers = (nn.Linear(channels, 5, bias=False), nn.ReLU(), nn.Linear(5, channels, bias=False), nn.Sigmoid())
        self.pool_and_mlp = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers)
        self.blocks = nn.ModuleDict(
            {
                "ours": SqueezeExcite2d(channels, 5),
                "timm": timm.layers.SEModule(channels, rd_channels=5),
                "timm effnet": timm.models._efficientnet_blocks.SqueezeExcite(channels, 0.5, act_layer=nn.SiLU),
                "torchvision": torchvision.ops.SqueezeExcitation(channels, 5),
                "hard": torchvision.ops.SqueezeExcitation(channels, 5, nn.Hardswish, nn.Hardsigmoid),
                "eca": timm.layers.EcaModule(channels),
            }
        )

    def gate(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        if self.style == "sequential":
            n, c, _, _ = x.shape
            return self.pool_and_mlp(x).reshape(n, c, 1, 1)
        if self.style == "linear":
            return torch.sigmoid(self.fc2(F.relu(self.fc1(self.pool(x).view(n, c))))).view(n, c, 1, 1)
        if self.style == "flattened":
            return self.fc2(self.fc1(x.flatten(2).mean(-1)).relu()).sigmoid()[:, :, None, None].expand_as(x)
        if self.style == "functional":
            squeezed = F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), self.fc1.weight, self.fc1.bias)
            return torch.sigmoid(F.linear(F.silu(squeezed), self.fc2.weight)).unsqueeze(-1).unsqueeze(-1)
        if self.style == "window":
            return self.conv2(F.relu(self.conv1(F.avg_pool2d(x, x.shape[2:])))).sigmoid()
        return F.conv2d(F.conv2d(torch.mean(x, (-1, -2), True), self.conv1.weight), self.conv2.weight).tanh()

    def forward(self, x: Tensor) -> Tensor:
        for module in self.before:
            x = module(x)
        return self.blocks[self.style](x) if self.style in self.blocks else x * self.gate(x)


STYLES = (
    "ours",
    "timm",
    "timm effnet",
    "torchvision",
    "hard",
    "sequential",
    "linear",
    "flattened",
    "functional",
    "window",
    "conv2d",
)


@pytest.mark.parametrize("style", STYLES)
def test_a_squeeze_is_hoisted_whoever_wrote_the_block(style: str) -> None:
    model = settled(Excited([nn.Conv2d(NARROW, NARROW, 3), nn.Conv2d(NARROW, WIDE, 1), nn.BatchNorm2d(WIDE)], style))
    fast = se_fx.optimize_for_inference(model)
    assert outcomes(fast, "hoist_squeezes") == [True]
    assert outcomes(fast, "fold_norms") == [True]
    assert outcomes(fast, "vector_products") == [True, True]
    for x in (images(), images(1, NARROW, 9, 9), images(0, NARROW, 5, 5)):
        assert_same(fast(x), model(x))


def test_the_algebra_by_hand() -> None:
    model = settled(Excited([nn.Conv2d(NARROW, WIDE, 1), nn.BatchNorm2d(WIDE)], "linear"))
    model = settled(nn.Sequential(nn.Conv2d(NARROW, NARROW, 1), model))
    fast = se_fx.optimize_for_inference(model)
    conv, norm, block = model[1].before[0], model[1].before[1], model[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    weight = scale[:, None] * conv.weight[:, :, 0, 0]
    bias = scale * (conv.bias - norm.running_mean) + norm.bias
    first, second = (module for module in fast.modules() if isinstance(module, VectorLinear))
    torch.testing.assert_close(first.weight, block.fc1.weight @ weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first.bias, block.fc1.weight @ bias + block.fc1.bias, rtol=1e-12, atol=1e-12)
    assert torch.equal(second.weight, block.fc2.weight)
    (folded,) = (module for module in fast.modules() if isinstance(module, nn.Conv2d) and module.out_channels == WIDE)
    torch.testing.assert_close(folded.weight[:, :, 0, 0], weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(folded.bias, bias, rtol=1e-12, atol=1e-12)


def training_norm() -> nn.Module:
    return nn.BatchNorm2d(WIDE).train()


BETWEEN = {
    "nothing": ([], True),
    "a norm": ([nn.BatchNorm2d(WIDE)], True),
    "a norm without affine": ([nn.BatchNorm2d(WIDE, affine=False)], True),
    "two norms": ([nn.BatchNorm2d(WIDE), nn.BatchNorm2d(WIDE)], True),
    "an identity": ([nn.Identity(), nn.Dropout(0.5), nn.Dropout2d(0.5, inplace=True)], True),
    "another pointwise conv": ([nn.Conv2d(WIDE, WIDE, 1, groups=2), nn.BatchNorm2d(WIDE)], True),
    "ReLU": ([nn.ReLU()], False),
    "ReLU in place": ([nn.ReLU(inplace=True)], False),
    "a norm, then SiLU": ([nn.BatchNorm2d(WIDE), nn.SiLU()], False),
    "a norm without statistics": ([nn.BatchNorm2d(WIDE, track_running_stats=False)], False),
    "instance norm": ([nn.InstanceNorm2d(WIDE, affine=True)], False),
    "group norm": ([nn.GroupNorm(3, WIDE)], False),
    "a strided pointwise conv": ([nn.Conv2d(WIDE, WIDE, 1, stride=2)], False),
    "a padded pointwise conv": ([nn.Conv2d(WIDE, WIDE, 1, padding=1)], False),
    "a 3x3 conv": ([nn.Conv2d(WIDE, WIDE, 3, padding=1)], False),
    "max pooling": ([nn.MaxPool2d(2)], False),
    "average pooling": ([nn.AvgPool2d(2)], False),
    "pixel shuffle": ([nn.PixelShuffle(2), nn.PixelUnshuffle(2)], False),
    "channel shuffle": ([nn.ChannelShuffle(2)], False),
}


@pytest.mark.parametrize("case", BETWEEN)
@pytest.mark.parametrize("style", ["ours", "timm"])
def test_what_stands_between_decides(case: str, style: str) -> None:
    between, hoisted = BETWEEN[case]
    model = settled(Excited([nn.Conv2d(NARROW, NARROW, 3, padding=1), nn.Conv2d(NARROW, WIDE, 1), *between], style))
    fast = se_fx.optimize_for_inference(model)
    assert any(outcomes(fast, "hoist_squeezes")) == hoisted
    x = images()
    assert_same(fast(x), model(x))


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([nn.Conv2d(NARROW, WIDE, 1)], "(before.0) reads what need not be (N, C, H, W), such as the model's own input"),
        ([nn.Conv2d(NARROW, WIDE, 3, padding=1)], "a 3x3 convolution of stride 1 (before.0) stands before it"),
        ([nn.Conv2d(NARROW, WIDE, 1), nn.ReLU()], "ReLU (before.1) stands before it"),
    ],
)
def test_a_squeeze_that_stays_says_why(layers: list[nn.Module], reason: str) -> None:
    (step,) = se_fx.report(se_fx.optimize_for_inference(settled(Excited(layers, "ours")), rewrites=["hoist_squeezes"])).steps
    assert [change.detail for change in step.changes if not change.applied and change.detail.endswith(reason)]


def test_a_norm_in_training_mode_stays() -> None:
    model = settled(Excited([nn.Conv2d(NARROW, NARROW, 1), nn.Conv2d(NARROW, WIDE, 1), nn.BatchNorm2d(WIDE)], "ours"))
    model.before[2].train()
    fast = se_fx.optimize_for_inference(model)
    assert outcomes(fast, "fold_norms") == []
    assert outcomes(fast, "hoist_squeezes") == [False]
    x, y = images(), images()
    expected = model(x), model(y)
    for name, buffer in fast.named_buffers():
        assert buffer is model.get_buffer(name), "statistics are updated, and shared, as they were"
    assert_same((fast(x), fast(y)), expected)


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
    for rewrites in (None, *([name] for name in REWRITES)):
        fast = se_fx.optimize_for_inference(model, rewrites=rewrites)
        x = images()
        assert_same(fast(x.clone()), model(x.clone()))
    if how in CHANGED:
        assert not any(outcomes(se_fx.optimize_for_inference(model), "hoist_squeezes"))


def test_a_shared_conv_is_folded_with_each_norm() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(NARROW, NARROW, 1), nn.Conv2d(NARROW, WIDE, 1)
            self.norms = nn.ModuleList([nn.BatchNorm2d(WIDE), nn.BatchNorm2d(WIDE)])
            self.se = SqueezeExcite2d(WIDE, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.se(self.norms[0](self.conv(x))) + self.se(self.norms[1](self.conv(x)))

    model = settled(Shared())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = se_fx.optimize_for_inference(model)
    assert outcomes(fast, "fold_norms") == [True, True]
    assert outcomes(fast, "hoist_squeezes") == [True, True]
    assert_same(fast(x := images()), model(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_eca_is_hoisted_where_the_image_is_large_enough() -> None:
    model = settled(Excited([nn.Conv2d(NARROW, NARROW, 1), nn.Conv2d(NARROW, WIDE, 1)], "eca"))
    # 9, 4, 7 or 6 positions save 8 channels each; the matrix has 12 x 4, as many as 6 positions save
    for shape, hoisted in (((1, 3, 3), True), ((1, 2, 2), False), ((7, 1, 1), True), ((2, 1, 3), False)):
        x = images(shape[0], NARROW, *shape[1:])
        fast = se_fx.optimize_for_inference(model, {"x": x})
        assert outcomes(fast, "hoist_squeezes") == [hoisted]
        assert_same(fast(x), model(x))
    assert outcomes(se_fx.optimize_for_inference(model), "hoist_squeezes") == [False]


@pytest.mark.parametrize("gate", ["sigmoid", "hardsigmoid"])
def test_identity_blocks_vanish(gate: str) -> None:
    net = settled(nn.Sequential(nn.Conv2d(NARROW, WIDE, 3), nn.BatchNorm2d(WIDE), nn.ReLU(), nn.Conv2d(WIDE, WIDE, 1)))
    gm = se_fx.transform(net, min_channels=1, latent_channels=3, init="identity", gate=gate).eval()
    fast = se_fx.optimize_for_inference(gm, rewrites=["constant_gates"])
    assert outcomes(fast, "constant_gates") == [True, True]
    assert [str(node.target) for node in fast.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3"]
    assert torch.equal(fast(x := images()), net(x))


@pytest.mark.parametrize("style", ["timm", "timm effnet", "torchvision", "hard"])
def test_gates_that_are_constant_become_factors_of_the_conv(style: str) -> None:
    model = settled(Excited([nn.Conv2d(NARROW, WIDE, 3)], style))
    last = [module for module in model.blocks[style].modules() if isinstance(module, nn.Conv2d)][-1]
    nn.init.zeros_(last.weight)
    fast = se_fx.optimize_for_inference(model)
    assert outcomes(fast, "constant_gates") == [True]
    assert [type(fast.get_submodule(node.target)) for node in fast.graph.nodes if node.op == "call_module"] == [nn.Conv2d]
    assert_same(fast(x := images()), model(x))


def test_a_norm_behind_a_block_goes_into_its_gate() -> None:
    net = nn.Sequential(nn.Conv2d(NARROW, WIDE, 1, bias=False), nn.BatchNorm2d(WIDE), nn.ReLU())
    gm = settled(se_fx.transform(net, min_channels=1, latent_channels=3))
    fast = se_fx.optimize_for_inference(gm, rewrites=["fold_norms"])
    assert outcomes(fast, "fold_norms") == [True]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert_same(fast(x := images()), gm(x))


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_products_are_the_same_in_both_forms(batch: int) -> None:
    linear = nn.Linear(24, 10).double()
    product = VectorLinear(linear.weight.detach(), linear.bias.detach())
    x = torch.randn(batch, 24, dtype=torch.float64)
    product.few = 1
    compiled = torch.compile(product, backend="aot_eager", fullgraph=True, dynamic=False)
    for form in (product, compiled):
        assert_same(form(x), linear(x))
        assert_same(form(x[:, :, None, None]), linear(x)[:, :, None, None])


# ------------------------------------------------------------------------------------------------------- random chains
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
