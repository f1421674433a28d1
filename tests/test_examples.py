"""The examples that train and place blocks: what they print is true, and what they compare is comparable."""

from __future__ import annotations

import argparse
import importlib
import json
import struct
from pathlib import Path
from types import ModuleType

import comparison
import custom_attention
import digits
import finetune
import lean_training
import matplotlib.image
import pytest
import scipy.stats
import timm
import timm.layers
import torch
import torchvision
import train
from timm.layers.cbam import CbamModule
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.squeezenet import Fire

import se_fx

# ------------------------------------------------------------------------------------------------------------- comparisons
WITHOUT, WITH_SE = (0.91, 0.93, 0.90, 0.92), (0.93, 0.94, 0.93, 0.93)


def test_interval_is_that_of_a_paired_t_test() -> None:
    test = scipy.stats.ttest_rel(WITH_SE, WITHOUT)
    assert comparison.Comparison(WITHOUT, WITH_SE).interval == pytest.approx(tuple(test.confidence_interval(0.95)))


@pytest.mark.parametrize(
    ("with_se", "verdict"),
    [(WITH_SE, "better with blocks: +1.75 points"), (WITHOUT[::-1], "no difference shown"), ((0.8, 0.82, 0.8, 0.81), "worse")],
)
def test_verdicts(with_se: tuple[float, ...], verdict: str) -> None:
    assert verdict in str(comparison.Comparison(WITHOUT, with_se))


def test_one_seed_gives_no_verdict() -> None:
    assert "take more" in str(comparison.Comparison((0.5,), (0.6,)))


def test_plot(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    comparison.Comparison(WITHOUT, WITH_SE).plot("four seeds", ("without", "with SE"), str(path))
    picture = matplotlib.image.imread(path)
    assert picture.shape[:2] == (630, 1260)
    assert picture[..., :3].std() > 0.05  # not blank


# ---------------------------------------------------------------------------------------------------------------- training
class Seen(nn.Module):
    """A classifier that keeps what it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.Linear(width, 10))
        self.batches: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(x)
        return self.layers(x)


def test_a_seed_decides_what_is_seen() -> None:
    training, _ = digits.digits(8)
    augment = train.augmentation(shift=1, flip=True)
    seen = []
    for width, seed in ((4, 0), (7, 0), (4, 1)):
        model = Seen(width)
        losses = digits.fit(model, torch.optim.SGD(model.parameters(), lr=0.01), training, 3, seed=seed, augment=augment)
        assert len(losses) == 3
        seen.append(torch.cat(model.batches))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_shifts_and_flips_are_of_whole_images() -> None:
    images = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    possible = []
    for mirrored in (images, images.flip(3)):
        padded = nn.functional.pad(mirrored, (1,) * 4, mode="replicate")
        possible += [padded[..., y : y + 4, x : x + 4] for y in range(3) for x in range(3)]
    generator = torch.Generator().manual_seed(0)
    found = torch.cat([train.augmentation(1, flip=True)(images, generator) for _ in range(50)])
    which = [next(i for i, each in enumerate(possible) if any(torch.equal(image, one) for one in each)) for image in found]
    assert len(set(which)) > 12  # of 18


@pytest.mark.parametrize("match", ["params", "flops"])
def test_the_plain_network_is_widened_to_what_blocks_cost(match: str) -> None:
    arguments = argparse.Namespace(match=match, steps=3, width=2.0, model="small", units=1, stride=1, batch_size=50)
    options = {"placement": "residual", "latent_channels": 0.25, "min_channels": 1}
    image = torch.zeros(1, 3, 8, 8)
    plain, with_se = train.sides(train.builder(arguments, 10), options, image, arguments)
    for side in (plain, with_se):
        model = side.build()
        assert side.cost.params == sum(parameter.numel() for parameter in model.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(image)
        assert 2 * side.cost.macs == counter.get_total_flops()
    # Widths are integers: the next one of 16 channels is 6 % off, of 32 and 64 less, and rounding takes them one by one.
    assert getattr(plain.cost, match) == pytest.approx(getattr(with_se.cost, match), rel=0.02)
    assert (plain.steps, with_se.steps) == (3, 3)


def test_time_is_matched_by_steps() -> None:
    arguments = argparse.Namespace(
        match="time", steps=1000, width=1.0, model="small", units=1, stride=1, batch_size=4, device="cpu"
    )
    options = {"placement": "residual", "latent_channels": 0.25, "min_channels": 1}
    plain, with_se = train.sides(train.builder(arguments, 10), options, torch.zeros(1, 3, 8, 8), arguments)
    assert with_se.steps == 1000
    assert 1000 < plain.steps < 4000  # blocks take time, on any machine
    assert plain.cost.params < with_se.cost.params


def test_train_learns(capsys: pytest.CaptureFixture[str]) -> None:
    result = train.main(["--quick", "--steps", "25"])
    assert len(result.differences) == 2
    assert min(*result.without, *result.with_se) > 0.3  # of ten classes
    printed = capsys.readouterr().out
    assert "300 training and 599 test images of 8x8, 10 classes" in printed
    assert result.verdict() in printed


def test_train_reads_torchvision_datasets_and_models(tmp_path: Path) -> None:
    training, test = digits.digits(28)
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, (images, labels) in (("train", training), ("t10k", test)):
        pixels = ((images[:60, 0] + 1) * 127.5).byte()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 60, 28, 28) + pixels.numpy().tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 60) + labels[:60].byte().numpy().tobytes())
    arguments = train.parsed(["--dataset", "MNIST", "--root", str(tmp_path), "--train-images", "40"])
    (images, labels), (test_images, _), classes = train.dataset(arguments)
    assert (images.shape, test_images.shape, classes) == ((40, 3, 28, 28), (60, 3, 28, 28), 10)
    assert float(images.mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(images.std()) == pytest.approx(1.0, abs=1e-3)
    assert torch.equal(labels.bincount(minlength=10) <= training[1][:60].bincount(minlength=10), torch.ones(10).bool())
    words = ["--dataset", "MNIST", "--root", str(tmp_path), "--steps", "2", "--seeds", "2", "--batch-size", "20"]
    result = train.main([*words, "--model", "timm:resnet10t", "--match", "steps"])
    assert len(result.without) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--model", "resnet18"], "--widen"), (["--dataset", "MNITS"], "expected digits, or one of")],
)
def test_train_says_what_is_missing(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(words)
    assert said in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- fine-tuning
def test_few_images_of_each_class() -> None:
    training, _ = digits.digits(8)
    images, labels = finetune.few(training, 7, seed=1)
    assert labels.bincount().tolist() == [7] * 10
    assert len(images) == 70
    assert not torch.equal(images, finetune.few(training, 7, seed=2)[0])


@pytest.mark.parametrize("frozen", [False, True])
def test_each_parameter_has_its_rate(lite0: nn.Module, frozen: bool) -> None:
    model = finetune.pair(lite0, seed=0)["with SE"]
    arguments = finetune.parsed(["--frozen"] if frozen else [])
    optimizer = finetune.prepare(model, arguments)
    settings = {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(settings)
    for name, parameter in model.named_parameters():
        pretrained = "squeeze_excite" not in name and "_fc." not in name
        assert parameter.requires_grad is (not pretrained or not frozen)
        assert (settings[parameter][0] < 1e-3) is pretrained
        assert (settings[parameter][1] > 0) is (pretrained and parameter.ndim == 4)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert model.training
    assert len(norms) == 49
    assert not any(norm.training for norm in norms)


def test_finetune(capsys: pytest.CaptureFixture[str]) -> None:
    result = finetune.main(["--quick", "--frozen", "--seeds", "1"])
    printed = capsys.readouterr().out
    assert "12 blocks add 622,464 parameters" in printed
    assert "outputs bitwise equal" in printed
    assert "_blocks.15._depthwise_conv" in printed
    before = float(printed.split("before training: ")[1].split(" %")[0]) / 100
    assert min(*result.without, *result.with_se) > before + 0.1


# --------------------------------------------------------------------------------------------------------- other attention
@pytest.mark.parametrize("channels", [16, 64, 128, 256, 512, 2048])
def test_eca_is_timms(channels: int) -> None:
    ours, theirs, x = custom_attention.ECA(channels), timm.layers.EcaModule(channels), torch.randn(2, channels, 5, 4)
    theirs.load_state_dict(ours.state_dict())
    # Two ways to write one formula: they round differently.
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_cbam_is_timms_with_biases() -> None:
    ours, theirs = custom_attention.CBAM(64).eval(), CbamModule(64, mlp_bias=True).eval()
    with torch.no_grad():
        for mine, its in ((ours.mlp[0], theirs.channel.fc1), (ours.mlp[2], theirs.channel.fc2)):
            its.weight.copy_(mine.weight[..., None, None])
            its.bias.copy_(mine.bias)
        theirs.spatial.conv.conv.weight.copy_(ours.conv.weight.flip(1))  # mean and maximum, and not maximum and mean
        x = torch.randn(2, 64, 9, 9)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_custom_attention(capsys: pytest.CaptureFixture[str]) -> None:
    losses = custom_attention.main(["--steps", "4", "--size", "16", "--timm", "eca"])
    assert list(losses) == ["none", "SE, r = 16", "ECA", "CBAM", "timm's eca"]
    assert all(last < first for first, last in losses.values())
    assert losses["ECA"] == pytest.approx(losses["timm's eca"], rel=0.05)  # the same weights, trained alike
    rows = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    by_hand = sum(2 * (3 if channels == 64 else 5) for channels in (64, 128, 256, 512))
    assert f"+{by_hand}" in rows["ECA"]
    assert f"+{by_hand}" in rows["timm's eca"]


@pytest.fixture
def custom_placement(tables: None) -> ModuleType:
    """The example, whose policies are in se_fx's table while a test runs."""
    return importlib.reload(importlib.import_module("custom_placement"))


# ----------------------------------------------------------------------------------------------------------- own placement
def test_stage_ends(custom_placement: ModuleType) -> None:
    report = custom_placement.main(["stage_ends", "--model", "resnet18"])["stage_ends"]
    assert [site.name for site in report.sites] == [f"layer{stage}.1.conv2" for stage in (1, 2, 3, 4)]


def test_concatenated(tmp_path: Path, custom_placement: ModuleType) -> None:
    path = tmp_path / "plan.json"
    report = custom_placement.main(["concatenated", "--save", str(path)])["concatenated"]
    fires = {name: m for name, m in torchvision.models.squeezenet1_1().named_modules() if isinstance(m, Fire)}
    expected = {f"{name}.expand3x3": m.expand1x1.out_channels + m.expand3x3.out_channels for name, m in fires.items()}
    assert {site.name: site.channels for site in report.sites} == expected
    assert [site.name for site in se_fx.Plan.from_dict(json.loads(path.read_text())).sites] == list(expected)


def test_depthwise_and_strided(custom_placement: ModuleType) -> None:
    reports = custom_placement.main(["depthwise", "strided"])
    convs = torchvision.models.mobilenet_v2().named_modules()
    depthwise = [name for name, module in convs if isinstance(module, nn.Conv2d) and module.groups > 1]
    assert [site.name for site in reports["depthwise"].sites] == depthwise
    names = ["conv1", "layer2.0.conv1", "layer3.0.conv1", "layer4.0.conv1"]
    assert [site.name for site in reports["strided"].sites] == names


def test_lean_training_starts_alike(tmp_path: Path) -> None:
    arguments = argparse.Namespace(steps=3, batch_size=8, size=32, lr=0.02, compiled=False)
    torch.manual_seed(0)
    found, kept = lean_training.losses(timm.create_model("seresnet18", num_classes=digits.CLASSES), arguments)
    as_it_is, lean = found[lean_training.AS_IT_IS], found["optimised"]
    assert lean[0] == as_it_is[0]  # the first forward pass is the same, bit for bit
    assert lean[1:] == pytest.approx(as_it_is[1:], rel=1e-3)
    assert as_it_is[-1] != as_it_is[0]
    assert kept["optimised"] < 0.95 * kept[lean_training.AS_IT_IS]
    assert "optimised" in lean_training.table(found, kept)
    lean_training.plot(found, "three steps", str(tmp_path / "plot.png"))
    assert matplotlib.image.imread(tmp_path / "plot.png")[..., :3].std() > 0.05
