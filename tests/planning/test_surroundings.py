"""Stages and necks: which convs `stages=` and `necks=` mean. Expected names are those that people gave the same parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import se_fx
from se_fx.capture import capture
from se_fx.cli import main
from se_fx.criteria import CRITERIA, Candidate
from se_fx.planning.surroundings import surroundings_of

models = torchvision.models
PLAIN: dict[str, Any] = {"weights": None, "weights_backbone": None}


def convs(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def named(model: nn.Module, *prefixes: str) -> list[str]:
    return [name for name in convs(model) if f"{name}.".startswith(tuple(f"{prefix}." for prefix in prefixes))]


def candidates(model: nn.Module) -> dict[str, Candidate]:
    """The convs of a model as criteria get them, which look around once."""
    found = surroundings_of(capture(model), convs(model))
    return {name: Candidate(model.get_submodule(name), 8, partial(found.__getitem__, name)) for name in convs(model)}


def chosen(model: nn.Module | dict[str, Candidate], **options: Any) -> list[str]:
    """The convs that criteria leave."""
    among = candidates(model) if isinstance(model, nn.Module) else model
    excluded = {name for option, value in options.items() for name in CRITERIA[option].excludes(value, among)}
    return [name for name in among if name not in excluded]


def by_number(model: nn.Module) -> list[list[str]]:
    """The convs of all stages that have numbers."""
    among = candidates(model)
    count = 1 + max(each.surroundings.stage for each in among.values() if each.surroundings.stage is not None)
    with pytest.raises(se_fx.SqueezeExciteError, match=f"there are {count}: 0 "):
        CRITERIA["stages"].excludes(count, among)
    return [chosen(among, stages=number) for number in range(count)]


# ---------------------------------------------------------------------------------------------------------------- stages
RESNET = ["conv1", "layer1", "layer2", "layer3", "layer4"]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_numbers_mean_what_resnets_call_stages(name: str) -> None:
    with torch.device("meta"):
        model = models.get_model(name, weights=None)
    among = candidates(model)
    for number, stage in enumerate(RESNET):
        assert chosen(among, stages=number) == chosen(among, stages=stage) == chosen(among, stages=number - 5)
        assert chosen(among, stages=number) == named(model, stage)
    assert chosen(among, stages="last") == named(model, "layer4")
    assert chosen(among, stages=["last", "layer2", 0]) == named(model, "conv1", "layer2", "layer4")
    assert chosen(among, stages="layer4.0.conv1") == ["layer4.0.conv1"]
    assert chosen(among, stages=None, necks=None) == chosen(among, necks=False) == convs(model)
    assert chosen(among, necks=True) == []


#: The stages of networks by the names of their parts, as their papers have them.
STAGES: dict[str, tuple[Callable[[], nn.Module], list[list[str]]]] = {
    "VGG": (
        models.vgg16,
        [
            [f"features.{number}" for number in numbers]
            for numbers in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
        ],
    ),
    "ConvNeXt": (models.convnext_tiny, [[f"features.{number}", f"features.{number + 1}"] for number in (0, 2, 4, 6)]),
    "MobileNetV3": (
        models.mobilenet_v3_large,
        [[f"features.{n}" for n in numbers] for numbers in ((0, 1), (2, 3), (4, 5, 6), range(7, 13), range(13, 17))],
    ),
    "timm's EfficientNet": (
        lambda: timm.create_model("efficientnet_b0"),
        [
            ["conv_stem", "blocks.0"],
            ["blocks.1"],
            ["blocks.2"],
            ["blocks.3", "blocks.4"],
            ["blocks.5", "blocks.6", "conv_head"],
        ],
    ),
    "timm's RegNet": (lambda: timm.create_model("regnetx_002"), [["stem"], ["s1"], ["s2"], ["s3"], ["s4"]]),
    "Inception's heads in training have none": (
        lambda: models.googlenet(init_weights=False),
        [
            ["conv1"],
            ["conv2", "conv3"],
            *([f"inception{n}{x}" for x in letters] for n, letters in ((3, "ab"), (4, "abcde"), (5, "ab"))),
        ],
    ),
    "a dilated ResNet": (
        lambda: models.resnet50(replace_stride_with_dilation=[False, True, True]),
        [["conv1"], ["layer1"], ["layer2", "layer3", "layer4"]],
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_resolutions(name: str) -> None:
    build, expected = STAGES[name]
    with torch.device("meta" if "timm" not in name else "cpu"):
        model = build()
    assert by_number(model) == [named(model, *parts) for parts in expected]


def test_gates_of_another_resolution_are_of_the_stage_that_they_are_in() -> None:
    assert by_number(Gated()) == [convs(Gated())]


def test_an_error_lists_the_stages() -> None:
    with pytest.raises(se_fx.SqueezeExciteError) as caught:
        se_fx.plan(models.resnet18(), stages=["last", "layr4"])
    assert str(caught.value) == (
        "stages=['last', 'layr4']: 'layr4': no module of this name holds a Conv2d; "
        "stages are 0 (conv1), 1 (layer1), 2 (layer2), 3 (layer3), 4 (layer4)"
    )


def test_parts_with_hooks_are_of_their_stages_and_hooks_do_not_run() -> None:
    model, ran = models.resnet18(), []
    model.layer3.register_forward_hook(lambda *_: ran.append(1))
    model.layer4[1].conv2.register_forward_pre_hook(lambda *_: ran.append(1))
    assert by_number(model) == [named(model, stage) for stage in RESNET]
    assert not ran


class Reads(nn.Module):
    """Code that needs values."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if bool(x.sum() > 0) else self.inner(-x)


def test_names_where_resolutions_cannot_be_told() -> None:
    model = models.resnet18()
    model.layer3 = Reads(model.layer3)  # in the middle: what follows is unknown as well
    assert by_number(model) == [named(model, stage) for stage in RESNET]

    class Apart(models.ResNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if bool(x.sum() > 0) else -x)

    model = Apart(models.resnet.BasicBlock, [2, 2, 2, 2])  # nowhere: no part has more than half of all convs
    assert by_number(model) == [named(model, stage) for stage in RESNET]


def test_code_that_cannot_be_traced_but_run_is_looked_into() -> None:
    class Loops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(width, 8, 3, stride, 1) for width, stride in ((3, 1), (8, 2), (8, 1), (8, 2)))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat(list(self.convs[0](x)[None]))
            for conv in self.convs[1:]:
                x = conv(x) if len(x) else x
            return x

    assert by_number(Loops()) == [["convs.0"], ["convs.1", "convs.2"], ["convs.3"]]


# ----------------------------------------------------------------------------------------------------------------- necks
class UNet(nn.Module):
    """Two levels, by hand; `up` makes maps larger."""

    def __init__(self, up: str) -> None:
        super().__init__()
        self.up = up
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.grow = nn.ModuleList([nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)])
        wide = {"transposed": (16, 8), "interpolate": (32, 16)}.get(up, (8, 4))  # of enlarged maps
        self.d, self.e = nn.Conv2d(wide[0] + 16, 16, 3, padding=1), nn.Conv2d(wide[1] + 8, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 2, 1)

    def larger(self, x: Tensor, level: int) -> Tensor:
        if self.up == "transposed":
            return self.grow[level](x)
        if self.up == "interpolate":
            return F.interpolate(x, scale_factor=2)
        if self.up == "shuffle":
            return F.pixel_shuffle(x, 2)
        n, c, h, w = x.shape
        return x.reshape(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, h * 2, w * 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).relu()
        b = self.b(F.max_pool2d(a, 2)).relu()
        c = self.c(F.max_pool2d(b, 2)).relu()
        d = self.d(torch.cat([self.larger(c, 0), b], 1)).relu()
        return self.out(self.e(torch.cat([self.larger(d, 1), a], 1)).relu())


@pytest.mark.parametrize("up", ["transposed", "interpolate", "shuffle", "reshape"])
def test_a_decoder_begins_where_maps_get_larger_by_whatever_means(up: str) -> None:
    model = UNet(up)
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 2, 16, 16)
    assert chosen(model, necks=True) == ["d", "e", "out"]
    assert chosen(model, necks=False) == ["a", "b", "c"]
    assert by_number(model) == [["a"], ["b"], ["c"]]
    assert chosen(model, stages="last", necks=False) == ["c"]


class Pyramid(nn.Module):
    """Lateral convs, the top's among them, and output convs, under names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.t1, self.t2 = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.t3 = nn.Conv2d(16, 32, 3, 2, 1)
        self.x1, self.x2, self.x3 = nn.Conv2d(8, 4, 1), nn.Conv2d(16, 4, 1), nn.Conv2d(32, 4, 1)
        self.y1, self.y2, self.y3 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def merged(self, t1: Tensor, t2: Tensor, t3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p3 = self.x3(t3)
        p2 = self.x2(t2) + F.interpolate(p3, size=t2.shape[-2:])
        p1 = self.x1(t1) + F.interpolate(p2, size=t1.shape[-2:])
        return self.y1(p1), self.y2(p2), self.y3(p3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t1 = self.t1(x)
        t2 = self.t2(t1.relu())
        return self.merged(t1, t2, self.t3(t2.relu()))


def test_lateral_and_output_convs_of_all_levels_are_the_necks() -> None:
    assert chosen(Pyramid(), necks=True) == ["x1", "x2", "x3", "y1", "y2", "y3"]


def test_a_pyramid_alone_is_a_neck() -> None:
    class Alone(Pyramid):
        def __init__(self) -> None:
            super().__init__()
            del self.t1, self.t2, self.t3

        def forward(self, finest: Tensor, middle: Tensor, coarsest: Tensor) -> Any:
            return self.merged(finest, middle, coarsest)

    assert chosen(Alone(), necks=True) == convs(Alone())
    assert chosen(Alone(), necks=False) == []


FPN = ("backbone.fpn",)
#: The necks of networks by the names of their parts.
NECKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "Faster R-CNN": (lambda: models.detection.fasterrcnn_resnet50_fpn(**PLAIN), FPN),
    "FCOS": (lambda: models.detection.fcos_resnet50_fpn(**PLAIN), FPN),
    "SSDLite has none": (lambda: models.detection.ssdlite320_mobilenet_v3_large(**PLAIN), ()),
    "DeepLabV3": (lambda: models.segmentation.deeplabv3_mobilenet_v3_large(**PLAIN), ("classifier",)),
    "LR-ASPP": (lambda: models.segmentation.lraspp_mobilenet_v3_large(**PLAIN), ("classifier",)),
    "FCN enlarges its result alone": (lambda: models.segmentation.fcn_resnet50(**PLAIN), ()),
}


@pytest.mark.parametrize("name", NECKS)
def test_necks_of_detectors_and_of_segmentation(name: str) -> None:
    build, expected = NECKS[name]
    with torch.device("meta"):
        model = build()
    among, neck = candidates(model), named(model, *expected)
    assert chosen(among, necks=True) == neck
    assert chosen(among, necks=False) == [name for name in among if name not in neck]


def test_the_last_stage_of_a_detector_is_its_backbones() -> None:
    with torch.device("meta"):
        model = models.detection.fasterrcnn_resnet50_fpn(**PLAIN)
    assert chosen(model, stages="last") == named(model, "backbone.body.layer4")


class Gated(nn.Module):
    """Attention that computes its gates at another resolution, and enlarges them; one that is broadcast; and windows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.near = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 1)
        self.squeeze, self.context, self.window = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.end = nn.Conv2d(8, 8, 3, padding=6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.near(x) * (x + F.interpolate(self.gate(x), size=x.shape[-2:])).sigmoid()  # self-calibrated
        x = x * self.squeeze(F.adaptive_avg_pool2d(x, 1)).sigmoid().expand_as(x)
        x = x + self.context(x.mean((2, 3), keepdim=True))
        n, c, h, w = x.shape
        windows = x.reshape(n, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5).reshape(n * 4, c, h // 2, w // 2)
        x = self.window(windows).reshape(n, 2, 2, c, h // 2, w // 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)
        return self.end(F.pad(x, (3, 3, 3, 3)))


def test_what_is_no_neck() -> None:
    assert chosen(Gated(), necks=True) == []
    assert chosen(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), necks=True) == []
    for name in ("mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5"):
        assert chosen(models.get_model(name, weights=None), necks=True) == []


# ----------------------------------------------------------------------------------------------------------- both, always
def test_nothing_is_run_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr("se_fx.planning.choosing.surroundings_of", fails)
    assert len(se_fx.plan(UNet("shuffle"), min_channels=1)) == 6
    with pytest.raises(se_fx.SqueezeExciteError, match="necks=True failed: RuntimeError: on purpose"):
        se_fx.plan(UNet("shuffle"), necks=True)


def test_code_that_runs_for_it_leaves_nothing_behind() -> None:
    class Counts(Reads):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__(inner)
            self.seen: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(1)
            torch.rand(1, device="cpu")
            return super().forward(self.inner[0](x))

    model = Counts(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    state, randomness = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    assert chosen(model, stages="last", necks=False) == ["inner.0"]
    assert model.seen == []
    assert model.training
    assert torch.equal(torch.get_rng_state(), randomness)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_plans_by_stages_and_necks_replay_and_all_verbs_take_both() -> None:
    model, options = UNet("interpolate"), {"min_channels": 1, "latent_channels": 2, "stages": ["last", "d"]}
    plan = se_fx.plan(model, **options)
    assert [site.name for site in plan.sites] == ["c", "d"]
    replayed = se_fx.transform(model, se_fx.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))))
    assert list(se_fx.blocks_of(replayed)) == ["c", "d"]
    assert list(se_fx.blocks_of(se_fx.transform(model, **options, necks=True))) == ["d"]
    again = se_fx.transform(replayed, min_channels=1, latent_channels=2, stages=0)
    assert sorted(se_fx.blocks_of(again)) == ["a", "c", "d"]
    se_fx.apply_squeeze_excite(model, **options, necks=False)
    assert list(se_fx.blocks_of(model)) == ["c"]


def test_the_command_line_takes_both(capsys: pytest.CaptureFixture[str]) -> None:
    def sites(*arguments: str) -> list[str]:
        main(["plan", "resnet18", "--min-channels", "512", "--json", *arguments])
        return [site["name"] for site in json.loads(capsys.readouterr().out)["sites"]]

    assert sites("--stages", "-1", "--stages", "layer3") == named(models.resnet18(), "layer4")
    assert sites("--stages", "0", "--stages", "3") == []
    assert sites("--stages", "last", "--no-necks") == named(models.resnet18(), "layer4")
    assert sites("--necks") == []
