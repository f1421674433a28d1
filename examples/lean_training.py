"""Does a network that keeps less for backward learn the same? One is trained as it is, and as `optimize_for_training` makes it.

All start from the same weights and see the same batches of handwritten digits. The loss of each step is compared with that of
the network as it is. Rounding alone makes losses drift apart, a little more with each step: how much, the network itself shows,
as it is but in another memory format, or compiled.

    python examples/lean_training.py
    python examples/lean_training.py --compiled --plot lean_training.png      # with exact=False, which is for compiled networks
    python examples/lean_training.py --model efficientnet_b0
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence

import timm
import torch
from digits import CLASSES, digits, fit
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import se_fx
from se_fx.cost import activation_bytes

AS_IT_IS = "as it is"
Variant = Callable[[nn.Module], nn.Module]
EAGER: dict[str, Variant] = {
    AS_IT_IS: lambda model: model,
    f"{AS_IT_IS}, channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "optimised": se_fx.optimize_for_training,
}
COMPILED: dict[str, Variant] = {
    f"{AS_IT_IS}, compiled": lambda model: model,
    "optimised, exact=False, compiled": lambda model: se_fx.optimize_for_training(model, exact=False),
}
COLOURS = ("#222222", "#999999", "#d1495b", "#edae49", "#00798c")


def losses(model: nn.Module, arguments: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, int]]:
    """The loss of each step, and the bytes kept for a step, of each variant."""
    found: dict[str, list[float]] = {}
    kept: dict[str, int] = {}
    data, _ = digits(arguments.size)
    variants = EAGER | (COMPILED if arguments.compiled else {})
    with tqdm(total=len(variants) * arguments.steps, unit="step") as bar:
        for name, variant in variants.items():
            trained = variant(copy.deepcopy(model)).train()
            batch = torch.empty(arguments.batch_size, 3, arguments.size, arguments.size, device="meta")
            if name in COMPILED:
                trained.compile()
            else:
                kept[name] = activation_bytes(trained, batch) or 0
            optimizer = torch.optim.SGD(trained.parameters(), lr=arguments.lr, momentum=0.9, weight_decay=1e-4)
            torch.manual_seed(0)  # of dropout and the like
            found[name] = fit(trained, optimizer, data, arguments.steps, batch_size=arguments.batch_size, tick=bar.update)
    return found, kept


def table(found: Mapping[str, Sequence[float]], kept: Mapping[str, int]) -> str:
    rows = []
    for name, values in found.items():
        apart = [abs(a - b) for a, b in zip(values, found[AS_IT_IS], strict=True)]
        tenth = max(1, len(values) // 10)
        first = "" if name == AS_IT_IS else f"{max(apart[:tenth]):.1e}"
        rest = "" if name == AS_IT_IS else f"{sum(apart) / len(apart):.4f}"
        rows.append(
            [name, f"{kept[name] / 2**20:.1f}" if name in kept else "", f"{sum(values[-tenth:]) / tenth:.4f}", first, rest]
        )
    headers = ["", "kept, MiB", "loss, last tenth", "apart, first tenth, at most", "apart, mean"]
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 4))


def plot(found: Mapping[str, Sequence[float]], title: str, path: str) -> None:
    """Draw the losses on top of each other, and below how far each is from the network's as it is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8.4, 5.4), sharex=True, height_ratios=(3, 2), layout="constrained")
    for colour, (name, values) in zip(COLOURS, found.items(), strict=False):
        style = {"color": colour, "lw": 2.6 if name == AS_IT_IS else 1.2}
        above.plot(values, label=name, **style)
        if name != AS_IT_IS:
            below.plot([a - b for a, b in zip(values, found[AS_IT_IS], strict=True)], **style)
    above.set(ylabel="loss", yscale="log")
    above.legend(frameon=False)
    below.set(xlabel="step", ylabel="less that of the\nnetwork as it is")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="seresnet18", metavar="NAME", help="a network of timm's (default: seresnet18)")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="how many (default: 200)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images in a step (default: 32)")
    parser.add_argument("--size", type=int, default=32, metavar="PIXELS", help="height and width of images (default: 32)")
    parser.add_argument("--lr", type=float, default=0.02, help="the highest learning rate (default: 0.02)")
    parser.add_argument("--compiled", action="store_true", help="also compiled, as it is and by exact=False")
    parser.add_argument("--plot", metavar="FILE", help="draw the losses, into a PNG or SVG file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(arguments.model, num_classes=CLASSES)
    found, kept = losses(model, arguments)
    print(table(found, kept))
    if arguments.plot:
        plot(found, f"{arguments.model} on handwritten digits, {arguments.steps} steps, one seed", arguments.plot)


if __name__ == "__main__":
    main()
