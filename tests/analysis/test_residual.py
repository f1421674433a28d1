"""Residual units: found where there are some, in whatever style they are written, and nowhere else."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn
from torchvision.models import get_model

import se_fx
from se_fx.analysis import changes_in_place
from se_fx.placement import Spot

timm = pytest.importorskip("timm")

# Counted in the source of each model: blocks per stage, less those without a shortcut.
COUNTS = {
    "resnet18": 2 + 2 + 2 + 2,
    "resnet34": 3 + 4 + 6 + 3,
    "resnet50": 3 + 4 + 6 + 3,
    "resnet101": 3 + 4 + 23 + 3,
    "resnext50_32x4d": 3 + 4 + 6 + 3,
    "wide_resnet50_2": 3 + 4 + 6 + 3,
    "regnet_x_400mf": 1 + 2 + 7 + 12,
    "regnet_y_400mf": 1 + 3 + 6 + 6,
    "mobilenet_v2": 0 + 1 + 2 + 3 + 2 + 2 + 0,  # in each group all but the first
    "mobilenet_v3_large": 1 + 1 + 2 + 3 + 1 + 2,
    "mobilenet_v3_small": 0 + 1 + 2 + 1 + 2,
    "efficientnet_b0": 0 + 1 + 1 + 2 + 2 + 3 + 0,
    "efficientnet_v2_s": 2 + 3 + 3 + 5 + 8 + 14,
    "mnasnet1_0": 2 + 2 + 2 + 1 + 3 + 0,
    "convnext_tiny": 3 + 3 + 9 + 3,
    "maxvit_t": 2 + 2 + 5 + 2,  # its attention has no conv
    "fcn_resnet50": 3 + 4 + 6 + 3,
    "timm:resnetv2_50": 3 + 4 + 6 + 3,
    "timm:resnet50d": 3 + 4 + 6 + 3,
    "timm:darknet53": 1 + 2 + 8 + 8 + 4,
    "timm:cspdarknet53": 1 + 2 + 8 + 8 + 4,
    "timm:cspresnet50": 3 + 3 + 5 + 2,
    "timm:convmixer_768_32": 32,
    "timm:convnextv2_nano": 2 + 2 + 8 + 2,
    "timm:dla34": 2 + 4 + 4 + 2,
    "timm:res2net50_26w_4s": 3 + 4 + 6 + 3,
    "timm:tresnet_m": 0 + 0 + 11 + 3,  # the first two stages' branches end in SE
    "timm:xception41": 3 + 8 + 1,  # the exit flow's second has no shortcut
    "timm:inception_resnet_v2": 10 + 20 + 10,
    "timm:resnest26d": 2 + 2 + 2 + 2,
    "timm:skresnet34": 3 + 4 + 6 + 3,
    "timm:gernet_s": 1 + 3 + 7 + 2 + 1,
    "timm:nf_resnet26": 2 + 2 + 2 + 2,
    "timm:starnet_s1": 2 + 2 + 8 + 3,
    "timm:ghostnet_100": 16,
    "timm:hrnet_w18_small": 1 + 2 * 2 + 3 * 2 + 4 * 2 + 4,  # stages of 1, 2, 3, 4 branches; four more in the head
}


def build(name: str) -> nn.Module:
    if name.startswith("timm:"):
        return timm.create_model(name.removeprefix("timm:"))
    weights = {"weights": None, "weights_backbone": None} if name.startswith("fcn") else {"weights": None}
    return get_model(name, **weights)


@pytest.mark.parametrize("name", COUNTS)
def test_as_many_as_in_the_source(name: str) -> None:
    assert len(se_fx.plan(build(name), placement="residual", min_channels=1)) == COUNTS[name]


@pytest.mark.parametrize(
    "name",
    ["mobilenetv3_large_100", "mobilenetv4_conv_small", "efficientnet_b0", "mixnet_s", "fbnetc_100", "spnasnet_100",
     "tinynet_a", "hardcorenas_a", "efficientnetv2_rw_s"],
)  # fmt: skip
def test_as_many_as_timms_blocks_say(name: str) -> None:
    model = timm.create_model(name)
    sites = se_fx.plan(model, placement="residual", min_channels=1).sites
    skips = [n for n, m in model.named_modules() if getattr(m, "has_skip", False)]
    assert [site.name.rsplit(".", site.name.count(".") - 2)[0] for site in sites] == skips


@pytest.mark.parametrize(
    "name", ["vgg16_bn", "densenet121", "swin_t", "vit_b_32", "googlenet", "timm:repvgg_a0", "timm:twins_svt_small"]
)
def test_models_without_any_are_told_what_else_there_is(name: str) -> None:
    model = get_model(name, init_weights=False) if name == "googlenet" else build(name)
    with pytest.raises(se_fx.SqueezeExciteError, match=r"placement='residual'.*no such place.*for 'conv'"):
        se_fx.plan(model, placement="residual")


def test_in_a_bottleneck_it_sits_between_the_last_norm_and_the_addition() -> None:
    gm = se_fx.transform(get_model("resnet50", weights=None), placement="residual", min_channels=1)
    blocks = [node for node in gm.graph.nodes if node.op == "call_module" and "squeeze_excite" in str(node.target)]
    assert len(blocks) == 16
    for node in blocks:
        (user,) = node.users
        assert str(node.args[0].target).endswith("bn3")
        assert user.target is operator.iadd


@pytest.mark.parametrize("name", ["convnext_tiny", "timm:convnext_tiny"])
def test_in_convnext_it_sits_upstream_of_layer_scale_and_drop_path(name: str) -> None:
    gm = se_fx.transform(build(name), placement="residual", min_channels=1)
    blocks = [node for node in gm.graph.nodes if node.op == "call_module" and "squeeze_excite" in str(node.target)]
    for node in blocks:
        (user,) = node.users
        assert node.args[0].target == "permute" or str(node.args[0].target).endswith("block.6")  # a Permute
        assert getattr(user.target, "__name__", user.target) == "mul"


def test_branches_that_end_in_attention_have_it_already() -> None:
    with pytest.raises(se_fx.SqueezeExciteError, match="no such place"):
        se_fx.plan(timm.create_model("seresnet18"), placement="residual")


# ---------------------------------------------------------------------------------------------------------- by other hands
class Unit(nn.Module):
    """A stem and one unit, whose forward is given."""

    def __init__(self, forward: Callable[[Unit, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.wide, self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.other = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.position = nn.Parameter(torch.zeros(1, 8, 1, 1))
        self.unit = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(self, self.stem(x))


def drop_path(x: Tensor, keep: float = 0.9) -> Tensor:
    mask = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep)
    return x.div(keep) * mask


def rand_drop_path(x: Tensor, keep: float = 0.9) -> Tensor:
    mask = (keep + torch.rand((x.shape[0], 1, 1, 1), dtype=x.dtype)).floor_()
    return x / keep * mask


def halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.cat([a + b, b], 1)


UNITS = {
    "functional": lambda m, x: F.relu(x + m.other(m.b(F.relu(m.norm(m.a(x)))))),
    "in place": lambda m, x: F.relu_(m.other(m.b(F.relu_(m.norm(m.a(x))))).add_(x)),
    "torch.add": lambda m, x: torch.add(m.b(m.a(x).relu()), x),
    "alpha": lambda m, x: torch.add(x, m.b(m.a(x).relu()), alpha=0.2),
    "scaled": lambda m, x: x + 0.1 * m.b(m.a(x).relu()),
    "pre-activation": lambda m, x: m.b(F.relu(m.other(m.a(F.relu(m.norm(x)))))) + x,
    "projected": lambda m, x: F.relu(m.down(x) + m.b(F.relu(m.a(x)))),
    "option A": lambda m, x: m.wide(F.relu(m.a(x))) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)),
    "activation last": lambda m, x: F.leaky_relu(m.norm(m.b(F.leaky_relu(m.a(x))))) + x,
    "layer scale": lambda m, x: x + m.b(F.gelu(m.a(x))) * m.position,
    "drop path": lambda m, x: x + drop_path(m.b(F.gelu(m.a(x)))),
    "drop path, another": lambda m, x: x + rand_drop_path(m.b(F.gelu(m.a(x)))),
    "dropout": lambda m, x: x + F.dropout2d(m.b(F.gelu(m.a(x))), 0.5, m.training),
    "gate inside": lambda m, x: x + m.b(F.relu(m.a(x)) * F.relu(m.a(x)).mean((2, 3), keepdim=True).sigmoid()),
    "split inside": lambda m, x: x + m.b((lambda h: torch.cat([F.relu(h[0]), h[1]], 1))(m.a(x).chunk(2, 1))),
    "after other sums": lambda m, x: (lambda y: y + m.b(F.relu(m.a(y))))(halves(x + x.mean((2, 3), keepdim=True))),
    "shortcut read by others": lambda m, x: torch.cat([m.down(x), m.down(x) + m.b(F.relu(m.a(x)))], 1),
}
LAST = {"option A": "wide"}

NO_UNITS = {
    "pyramid": lambda m, x: m.down(x) + F.interpolate(m.up(F.relu(m.wide(x))), scale_factor=1),
    "skip across a decoder": lambda m, x: x + m.up(F.relu(m.wide(F.relu(m.a(x))))),
    "position embedding": lambda m, x: F.relu(x + m.position),
    "position encoding": lambda m, x: x + m.a(x),
    "broadcast": lambda m, x: x + m.b(F.relu(m.a(x.mean((2, 3), keepdim=True)))),
    "parallel convs": lambda m, x: F.relu(m.norm(m.a(x)) + m.other(m.b(x))),
    "two branches": lambda m, x: m.b(F.relu(m.a(x))) + F.relu(m.down(x)),
    "coupling": lambda m, x: (lambda h: h[0] + m.b(F.relu(m.a(torch.cat([h[1], h[1]], 1))))[:, :4])(x.chunk(2, 1)),
    "twice itself": lambda m, x: x + x,
    "branch read by others": lambda m, x: (lambda y: torch.cat([y, m.b(F.relu(y)) + x], 1))(m.a(x)),
    "branch returned too": lambda m, x: (lambda y: (y, m.b(F.relu(y)) + x))(m.a(x)),
    "ends in a gate": lambda m, x: (lambda y: x + y * y.mean((2, 3), keepdim=True).sigmoid())(m.b(F.relu(m.a(x)))),
    "tokens": lambda m, x: (lambda t: t + m.b(F.gelu(m.a(t.mT.unflatten(2, (4, 4))))).flatten(2).mT)(x.flatten(2).mT),
}


@pytest.mark.parametrize("name", UNITS)
def test_however_it_is_written(name: str) -> None:
    plan = se_fx.plan(Unit(UNITS[name]), placement="residual", min_channels=1)
    assert [site.name for site in plan.sites] == [LAST.get(name, "b")]


@pytest.mark.parametrize("name", NO_UNITS)
def test_no_residual_unit(name: str) -> None:
    with pytest.raises(se_fx.SqueezeExciteError, match="no such place"):
        se_fx.plan(Unit(NO_UNITS[name]), placement="residual", min_channels=1)


@pytest.mark.parametrize("placement", ["norm", "residual", "pre", "post", "identity"])
@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("training", [False, True])
def test_identity_is_bitwise_and_remove_undoes_it(name: str, placement: str, training: bool) -> None:
    model = Unit(UNITS[name]).train(training)
    try:
        gm = se_fx.transform(model, placement=placement, init="identity", min_channels=1)
    except se_fx.SqueezeExciteError:
        assert (name, placement) not in {(unit, each) for unit in UNITS for each in ("residual", "post")}
        return
    x = torch.randn(2, 3, 4, 4)
    outputs = []
    for each in (model, gm, se_fx.remove(gm)):
        torch.manual_seed(1)
        outputs.append(each(x))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


class Doubled(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        return 2 * x


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


#: Convs that get a block, by the placement and the code.
CHOSEN = [
    ("pre", lambda m, x: m.b(m.a(F.relu(x))) + x, ["b"]),
    ("pre", lambda m, x: m.b(m.a(F.relu_(x))) + x, []),  # what the shortcut reads is changed by the branch
    ("identity", lambda m, x: m.b(F.relu(m.a(x))).add_(x), ["b"]),
    ("identity", lambda m, x: x.add_(m.b(F.relu(m.a(x)))), []),  # who reads x reads the sum
    ("identity", lambda m, x: m.b(F.relu(m.a(x))).add(x), ["b"]),
    ("norm", lambda m, x: F.group_norm(m.b(F.relu(m.norm(m.a(x)))), 2), ["a", "b"]),
    ("norm", lambda m, x: m.a(F.relu(m.norm(m.a(x)))) + m.other(m.b(x)), ["b"]),  # the second call of `a` has none
    ("norm", lambda m, x: F.instance_norm(x, weight=m.a(x).mean((0, 2, 3))), ["stem"]),
    ("residual", doubled_widths, []),  # one block for two widths there can't be
]


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


def test_two_placements_on_one_value_follow_each_other_in_any_order() -> None:
    def two(m: Unit, x: Tensor) -> Tensor:
        x = F.relu(m.a(F.relu(m.stem_like(x))) + x)
        return F.relu(m.b(F.relu(m.down(x))) + x)

    model = Unit(two)
    model.stem_like = nn.Conv2d(8, 8, 1)
    model.eval()
    x = torch.randn(2, 3, 5, 5)
    first = {"placement": "post", "where": "a", "block": Doubled, "min_channels": 1}
    second = {"placement": "pre", "where": "b", "block": Doubled, "min_channels": 1}
    once = se_fx.transform(se_fx.transform(model, **first), **second)
    other = se_fx.transform(se_fx.transform(model, **second), **first)
    s = model.stem(x)
    y = 2 * F.relu(model.a(F.relu(model.stem_like(s))) + s)
    expected = F.relu(model.b(F.relu(model.down(2 * y))) + y)
    assert torch.equal(once(x), expected)
    assert torch.equal(other(x), expected)
    assert torch.equal(se_fx.transform(model, se_fx.Plan.of(once))(x), expected)
    assert torch.equal(se_fx.transform(model, se_fx.Plan.of(other))(x), expected)


@pytest.mark.parametrize("placement", ["residual", "pre", "post", "identity"])
def test_a_second_transform_finds_the_same_places_beside_hooked_modules(placement: str) -> None:
    model = Unit(lambda m, x: UNITS["functional"](m, m.down(x)))
    model.down = nn.Sequential(nn.Conv2d(8, 8, 1))
    model.down.register_forward_hook(lambda module, args, output: None)
    gm = se_fx.transform(model, placement=placement, min_channels=1)
    again = se_fx.transform(gm, placement=placement, min_channels=1)
    assert again.state_dict().keys() == gm.state_dict().keys()
    assert {skip.name for skip in se_fx.plan(gm, placement=placement).skipped if "already" in skip.reason} == {"b"}


def test_units_that_share_their_modules_share_a_block() -> None:
    model = Unit(lambda m, x: UNITS["functional"](m, UNITS["functional"](m, x)))
    gm = se_fx.transform(model, placement="residual", min_channels=1)
    calls = [node for node in gm.graph.nodes if node.op == "call_module" and "squeeze_excite" in str(node.target)]
    assert len(calls) == 2
    assert len({node.target for node in calls}) == 1
    assert len(se_fx.Plan.of(gm)) == 1


def test_units_in_code_that_is_no_graph_are_found_within_their_regions() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.units = nn.ModuleList(Unit(UNITS["functional"]) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for unit in self.units:
                if x.sum() > -1e9:
                    x = unit(x[:, :3])
            return x

    model = Loop()
    gm = se_fx.transform(model, placement="residual", min_channels=1, init="identity")
    assert [site.name for site in se_fx.Plan.of(gm).sites] == ["units.0.b", "units.1.b"]
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(gm.eval()(x), model.eval()(x))


def test_quantizable_resnets_are_resnets() -> None:
    model = torchvision.models.quantization.resnet18(weights=None)
    assert len(se_fx.plan(model, placement="residual", min_channels=1)) == 8


def test_a_policy_of_ones_own() -> None:
    def deep_1x1(graph, root):
        for node in graph.nodes:
            module = root.get_submodule(node.target) if node.op == "call_module" else None
            if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.in_channels > 3:
                yield Spot(node.target, module.out_channels, (node,))

    model = Unit(UNITS["projected"])
    plan = se_fx.plan(model, placement=deep_1x1, min_channels=1)
    assert [site.name for site in plan.sites] == ["down"]
    assert {skip.reason for skip in plan.skipped} == {"is not chosen by test_residual.deep_1x1"}
    gm = se_fx.transform(model, plan)
    assert next(key for key in gm.state_dict() if "squeeze_excite" in key).startswith("squeeze_excite.down.")


IN_PLACE = [operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.ifloordiv, F.relu_, "mul_"]
PLAIN = [operator.add, operator.floordiv, torch.relu, F.relu, F.gelu, "mul", "__mul__"]
CALLS = {**dict.fromkeys(IN_PLACE, True), **dict.fromkeys(PLAIN, False)}


@pytest.mark.parametrize("call", CALLS)
def test_what_writes_its_result_where_its_input_was(call: Callable[..., Tensor] | str) -> None:
    graph = fx.Graph()
    create = graph.call_method if isinstance(call, str) else graph.call_function
    assert changes_in_place(create(call, (graph.placeholder("x"), 2)), {}) == CALLS[call]


@pytest.mark.parametrize("asked", [False, True])
def test_what_is_asked_to_work_in_place_does(asked: bool) -> None:
    functions = (
        lambda x: F.hardswish(x, asked),
        lambda x: F.elu(x, 1.0, asked),
        lambda x: F.relu(x, inplace=asked),
        nn.ReLU(asked),
    )
    for function in functions:
        traced = fx.symbolic_trace(nn.Sequential(function) if isinstance(function, nn.Module) else function)
        (node,) = (node for node in traced.graph.nodes if node.op.startswith("call"))
        assert changes_in_place(node, dict(traced.named_modules())) == asked
