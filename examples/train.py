"""Does Squeeze-and-Excitation help? A network is trained from scratch with and without, at a matched budget.

Blocks cost something, so the network without them is given as much of something else (--match):

  params   it is widened until it has as many parameters as the one with blocks, as closely as widths allow
  flops    likewise, as many FLOPs in a forward call
  time     it stays as it is, and takes more steps: as many as fit into the time that the other one trains
  steps    it stays as it is, and takes as many steps: what the blocks cost is not made up for

Both networks of a seed see the same batches in the same order, changed by the same random shifts, under one schedule: the
seed decides these, and the initial weights. So the difference of the two is taken seed by seed. It is printed with its 95 %
interval, by Student's t, whatever it is.

    python examples/train.py                                      handwritten digits and a small ResNet, five seeds
    python examples/train.py --seeds 10 --steps 400 --plot train.png                  the figures of docs/training.md
    python examples/train.py --match time
    python examples/train.py --dataset FashionMNIST --root /usr/share/datasets/fashion-mnist --train-images 8000 \\
        --units 3 --stride 2 --steps 400                       as Debian's package dataset-fashion-mnist has it
    python examples/train.py --dataset CIFAR10 --root data --download --steps 8000 --batch-size 128 \\
        --flip --shift 4 --width 2 --device cuda
    python examples/train.py --model mobilenet_v2 --widen width_mult=1.0 --size 32 --latent-channels 0.0625
    python examples/train.py --model timm:resnet10t --match steps --size 32
"""

from __future__ import annotations

import argparse
import ast
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import fashion_mnist
import torch
import torch.nn.functional as F
import torchvision
from comparison import Comparison
from digits import CLASSES, Data, accuracy, batches, digits, fit
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm import tqdm

import se_fx
from se_fx.cost import measure

MATCHES = ("params", "flops", "time", "steps")
Build = Callable[[float], nn.Module]  # from how many times wider than usual


# ---------------------------------------------------------------------------------------------------------------- networks
class Unit(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if (channels, stride) != (out_channels, 1):
            self.shortcut.extend([nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class SmallResNet(nn.Sequential):
    """A ResNet in the form of He et al. (2015), section 4.2: stages of 8, 16 and 32 channels, times `width`.

    It has `6 * units + 2` layers; the first one's stride is `stride`.
    """

    def __init__(self, width: float, classes: int, units: int = 1, stride: int = 1) -> None:
        first, second, third = (round(channels * width) for channels in (8, 16, 32))
        stages = ((first, first, 1), (first, second, 2), (second, third, 2))
        super().__init__(
            nn.Sequential(nn.Conv2d(3, first, 3, stride, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU()),
            *(Unit(*stage) if unit == 0 else Unit(stage[1], stage[1], 1) for stage in stages for unit in range(units)),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(third, classes)),
        )


def builder(arguments: argparse.Namespace, classes: int) -> Build:
    """How to build the network that the arguments name, in any width."""
    name = arguments.model
    if name == "small":
        return lambda width: SmallResNet(arguments.width * width, classes, arguments.units, arguments.stride)
    keyword, _, usual = (arguments.widen or "").partition("=")

    def build(width: float) -> nn.Module:
        # What is an integer stays one: width_per_group=64, but width_mult=1.0.
        value = ast.literal_eval(usual) if usual else None
        options = {keyword: type(value)(round(value * width) if isinstance(value, int) else value * width)} if keyword else {}
        if name.startswith("timm:"):
            import timm

            return timm.create_model(name.removeprefix("timm:"), pretrained=False, num_classes=classes, **options)
        return torchvision.models.get_model(name, weights=None, num_classes=classes, **options)

    return build


# -------------------------------------------------------------------------------------------------------------------- data
def dataset(arguments: argparse.Namespace) -> tuple[Data, Data, int]:
    """Training and test images, normalised, with their labels, and the number of classes."""
    if arguments.dataset == "digits":
        (images, labels), test = digits(arguments.size or 8)
        count = arguments.train_images or 300
        return (images[:count], labels[:count]), test, CLASSES
    parts = []
    for part, limit in (("train", arguments.train_images), ("test", None)):
        parts.append(_stacked(_source(arguments, part), arguments, limit))
    deviation, mean = torch.std_mean(parts[0][0], (0, 2, 3), keepdim=True)
    training, test = (((images - mean) / deviation, labels) for images, labels in parts)
    return training, test, int(torch.cat([training[1], test[1]]).max()) + 1


def _source(arguments: argparse.Namespace, part: str) -> Sequence[tuple[object, int]]:
    make = getattr(torchvision.datasets, arguments.dataset)
    options = {"train": part == "train"} if "train" in inspect.signature(make).parameters else {"split": part}
    options |= {"download": True} if arguments.download else {}
    fashion = arguments.dataset == "FashionMNIST"
    root = fashion_mnist.unpacked(arguments.root) if fashion else arguments.root
    try:
        return make(root, **options)
    except (RuntimeError, FileNotFoundError) as error:
        advice = fashion_mnist.ADVICE if fashion else "say where it is by --root, or fetch it by --download"
        raise SystemExit(
            f"--root {arguments.root}: torchvision can't read {arguments.dataset} there: {error}\n{advice}"
        ) from error


def _stacked(source: Sequence[tuple[object, int]], arguments: argparse.Namespace, limit: int | None) -> Data:
    """A dataset as two tensors, the first `limit` of its images, drawn at random but always the same ones."""
    steps = [v2.RGB(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    if arguments.size:
        steps[1:1] = [v2.Resize(arguments.size), v2.CenterCrop(arguments.size)]
    prepare = v2.Compose(steps)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:limit]
    pairs = [source[int(i)] for i in tqdm(order, desc="reading", unit="image", leave=False)]
    return torch.stack([prepare(image) for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def augmentation(shift: int, flip: bool) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Shifts each image by up to `shift` pixels either way, its edges repeated, and mirrors one in two."""

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        count, channels, height, width = images.shape
        down, right = torch.randint(2 * shift + 1, (2, count, 1), generator=generator)
        rows, columns = down + torch.arange(height), right + torch.arange(width)
        if flip:
            mirrored = torch.rand(count, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        padded = F.pad(images, (shift,) * 4, mode="replicate")
        image, channel = torch.arange(count)[:, None, None, None], torch.arange(channels)[:, None, None]
        return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]

    return augment


# ------------------------------------------------------------------------------------------------------------------ budgets
@dataclass(frozen=True)
class Side:
    """One of the two that are compared: how to build it, what it costs, and how long it trains."""

    name: str
    build: Callable[[], nn.Module]
    cost: se_fx.Cost
    width: float
    steps: int


def sides(build: Build, options: dict[str, object], image: Tensor, arguments: argparse.Namespace) -> tuple[Side, Side]:
    """The network without blocks and the one with, at the same budget."""
    match, steps = arguments.match, arguments.steps

    def blocks() -> nn.Module:
        return se_fx.transform(build(1.0), **options)

    def cost(width: float) -> se_fx.Cost:
        return measure(build(width), image).total

    report = se_fx.report(blocks(), example_inputs=image)
    with_se = Side("with SE", blocks, report.base + report.added, 1.0, steps)
    if match in ("params", "flops"):
        width = widened(lambda width: getattr(cost(width), match), getattr(with_se.cost, match))
        return Side("without", lambda: build(width), cost(width), width, steps), with_se
    if match == "time":
        steps = steps_in_as_much_time(build(1.0), blocks(), image, arguments)
    return Side("without", lambda: build(1.0), report.base, 1.0, steps), with_se


def steps_in_as_much_time(plain: nn.Module, with_blocks: nn.Module, image: Tensor, arguments: argparse.Namespace) -> int:
    """How many steps the plain network takes while the one with blocks takes the arguments'."""
    models = {"without": plain, "with SE": with_blocks}
    timings = se_fx.bench(models, image, batch_sizes=(arguments.batch_size,), training=True, device=arguments.device)
    return round(arguments.steps * timings.rows[1].ratio)


def widened(cost: Callable[[float], int], wanted: int) -> float:
    """The width in [1, 2] at which the cost, which grows with it in steps, is nearest to what is wanted: by bisection."""
    low, high = 1.0, 2.0
    tried = {low: cost(low), high: cost(high)}
    for _ in range(12):
        middle = (low + high) / 2
        tried[middle] = cost(middle)
        low, high = (middle, high) if tried[middle] < wanted else (low, middle)
    return min(tried, key=lambda width: abs(tried[width] - wanted))


# --------------------------------------------------------------------------------------------------------------------- main
def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a first look: two seeds, 40 steps")
    parser.add_argument("--seeds", type=int, metavar="N", help="how often both are trained (default: 5)")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps, each of one batch (default: 200)")
    parser.add_argument("--match", choices=MATCHES, default="params", help="what is made equal (default: params)")
    parser.add_argument("--plot", metavar="FILE", help="draw the result")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="such as cpu or cuda (default: cpu)")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="digits", metavar="NAME", help="digits, or a class of torchvision.datasets (default: digits)")
    add("--root", default="data", metavar="DIR", help="where torchvision's dataset is (default: data)")
    add("--download", action="store_true", help="fetch it first")
    add("--size", type=int, metavar="PIXELS", help="height and width to bring images to (default: 8 for digits; else none)")
    add(
        "--train-images",
        type=int,
        metavar="N",
        help="how many to train on (default: 300 digits, so that some go wrong; else all)",
    )
    add("--shift", type=int, default=1, metavar="PIXELS", help="how far images are shifted at random (default: 1)")
    add("--flip", action="store_true", help="mirror one image in two: not for digits")

    add = parser.add_argument_group("networks").add_argument
    add("--model", default="small", metavar="NAME", help="a torchvision model, timm:NAME, or a small ResNet (default: small)")
    add("--width", type=float, default=1.0, metavar="W", help="of the small one (default: 1, with 8, 16 and 32 channels)")
    add("--units", type=int, default=1, metavar="N", help="of its residual units, how many a stage (default: 1)")
    add("--stride", type=int, default=1, metavar="N", help="of its first convolution (default: 1)")
    add("--widen", metavar="KEYWORD=USUAL", help="another model's argument that widens it, with its usual value")
    add("--placement", default="residual", metavar="NAME", help="where blocks go (default: residual)")
    add(
        "--latent-channels", type=float, default=0.25, metavar="W", help="their width, or its share of channels (default: 0.25)"
    )
    add("--min-channels", type=int, default=1, metavar="C", help="the least channels that get a block (default: 1)")
    add("--batch-size", type=int, default=50, metavar="N", help="images in a step (default: 50)")
    add("--rate", type=float, default=5e-3, metavar="LR", help="AdamW's largest learning rate (default: 0.005)")

    arguments = parser.parse_args(words)
    arguments.seeds = arguments.seeds or (2 if arguments.quick else 5)
    arguments.steps = arguments.steps or (40 if arguments.quick else 200)
    if arguments.model != "small" and arguments.match in ("params", "flops") and not arguments.widen:
        parser.error(f"--match {arguments.match}: say how to widen {arguments.model} (--widen), or match time or steps")
    if arguments.dataset not in ("digits", *torchvision.datasets.__all__):
        parser.error(f"--dataset {arguments.dataset}: expected digits, or one of {', '.join(torchvision.datasets.__all__)}")
    return arguments


def trained(
    model: nn.Module,
    data: Data,
    steps: int,
    seed: int,
    arguments: argparse.Namespace,
    augment: Callable[[Tensor, torch.Generator], Tensor],
    tick: Callable[[], object],
) -> nn.Module:
    """The model after training those of its parameters that ask for gradients, in the mode it is in; then in eval mode."""
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=arguments.rate, weight_decay=0.05)
    torch.manual_seed(seed)  # for dropout, whatever the blocks' weights have drawn
    fit(model, optimizer, data, steps, batch_size=arguments.batch_size, seed=seed, augment=augment, tick=tick)
    return model.eval()


def compare(both: tuple[Side, Side], training: Data, held_out: list[Data], arguments: argparse.Namespace) -> Comparison:
    """Train both sides with each seed."""
    reached: dict[str, list[float]] = {side.name: [] for side in both}
    augment = augmentation(arguments.shift, arguments.flip)
    with tqdm(total=arguments.seeds * sum(side.steps for side in both), desc="training", unit="step", leave=False) as bar:
        for seed in range(arguments.seeds):
            for side in both:
                torch.manual_seed(seed)
                model = side.build().to(arguments.device).train()
                model = trained(model, training, side.steps, seed, arguments, augment, bar.update)
                reached[side.name].append(accuracy(model, held_out))
    return Comparison(*map(tuple, reached.values()))


def main(words: Sequence[str] | None = None) -> Comparison:
    arguments = parsed(words)
    *parts, classes = dataset(arguments)
    training, test = (tuple(tensor.to(arguments.device) for tensor in part) for part in parts)
    size = "x".join(map(str, training[0].shape[2:]))
    print(f"{len(training[0]):,} training and {len(test[0]):,} test images of {size}, {classes} classes")

    options = {name: getattr(arguments, name) for name in ("placement", "latent_channels", "min_channels")}
    both = sides(builder(arguments, classes), options, training[0][:1].cpu(), arguments)
    rows = []
    for side in both:
        costs = (side.cost.params, side.cost.macs, side.cost.flops, side.steps)
        rows.append([side.name, f"{side.width:.4f}", *(f"{number:,}" for number in costs)])
    headers = [f"matched by {arguments.match}", "width", "parameters", "MACs", "FLOPs", "steps"]
    print(tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 5)), end="\n\n")

    comparison = compare(both, training, batches(*test, 500), arguments)
    print(comparison)
    if arguments.plot:
        title = f"{arguments.dataset}, {len(training[0]):,} training images; {arguments.match} matched; {arguments.seeds} seeds"
        without, with_se = (f"{side.name}\n{side.cost.params:,} parameters\n{side.steps:,} steps" for side in both)
        comparison.plot(title, (without, with_se), arguments.plot)
    return comparison


if __name__ == "__main__":
    main()
