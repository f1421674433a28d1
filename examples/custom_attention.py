"""Attention blocks of other kinds, put in by the same pass: ECA and CBAM from their papers, and timm's by name.

A block is a factory, from the number of channels to a module that maps (N, C, H, W) to the same shape. Each kind goes where the
papers have it, at the end of the residual branches of a torchvision ResNet; the report counts its costs as it counts
Squeeze-and-Excitation's. Then each network trains for a moment on scikit-learn's handwritten digits, all weights drawn anew
from one seed: a check that gradients reach the blocks and that the loss falls, no comparison of kinds.

    python examples/custom_attention.py
    python examples/custom_attention.py --timm ese coord lcbam       others of timm's
    python examples/custom_attention.py --model resnet50 --size 224 --steps 0          costs alone
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

import timm.layers
import torch
import torchvision
from digits import CLASSES, digits, fit
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import se_fx
from se_fx.blocks import BLOCKS


class ECA(nn.Module):
    """Efficient Channel Attention: a channel's gate is computed from its own mean and those of its neighbours.

    The kernel size is the odd number nearest to log2(C) / 2 + 1/2.

    Source: Wang et al., *ECA-Net*, CVPR 2020, arXiv 1910.03151, equations 9 and 12.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        near = int(abs(math.log2(channels) / 2 + 0.5))
        kernel = near if near % 2 else near + 1
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3))[:, None]
        return x * self.conv(means).sigmoid()[:, 0, :, None, None]


class CBAM(nn.Module):
    """Convolutional Block Attention: gates of channels, from their means and maxima; then gates of places, from theirs.

    Source: Woo et al., *CBAM*, ECCV 2018, arXiv 1807.06521, section 3: reduction ratio 16, kernel size 7.
    """

    def __init__(self, channels: int, ratio: int = 16, kernel: int = 7) -> None:
        super().__init__()
        hidden = max(1, channels // ratio)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        by_channel = self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))
        x = x * by_channel.sigmoid()[:, :, None, None]
        by_place = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
        return x * self.norm(self.conv(by_place)).sigmoid()


def from_timm(name: str) -> Callable[[int], nn.Module]:
    """A factory of timm's attention of this name."""
    return lambda channels: timm.layers.create_attn(name, channels)


def networks(model: str, names: Sequence[str], seed: int) -> dict[str, nn.Module]:
    """The network without blocks, and with those of each kind; all have the same weights beside."""
    options: dict[str, dict[str, object]] = {
        "SE, r = 16": {"latent_channels": 1 / 16},
        "ECA": {"block": "ECA"},
        "CBAM": {"block": "CBAM"},
        **{f"timm's {name}": {"block": f"timm {name}"} for name in names},
    }
    # In the table, blocks go by name: a plan that was saved with them finds them again.
    BLOCKS.update({"ECA": ECA, "CBAM": CBAM} | {f"timm {name}": from_timm(name) for name in names})
    torch.manual_seed(seed)
    first = torchvision.models.get_model(model, weights=None, num_classes=CLASSES)
    made = {"none": first}
    for kind, chosen in options.items():
        again = torchvision.models.get_model(model, weights=None, num_classes=CLASSES)
        again.load_state_dict(first.state_dict())
        made[kind] = se_fx.transform(again, placement="residual", min_channels=1, seed=seed, **chosen)
    return made


def train(models: dict[str, nn.Module], images: Tensor, labels: Tensor, steps: int) -> dict[str, tuple[float, float]]:
    """The loss on the first and over the last steps of each network, trained alike."""
    losses: dict[str, tuple[float, float]] = {}
    with tqdm(total=steps * len(models), desc="training", unit="step", leave=False) as bar:
        for kind, model in models.items():
            blocks = {name: p.detach().clone() for name, p in model.named_parameters() if "squeeze_excite" in name.split(".")}
            optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
            found = fit(model.train(), optimizer, (images, labels), steps, batch_size=32, tick=bar.update)
            parameters = dict(model.named_parameters())
            still = [name for name, before in blocks.items() if torch.equal(before, parameters[name])]
            assert not still, f"{kind}: training did not move {still}"
            losses[kind] = found[0], sum(found[-3:]) / len(found[-3:])
    return losses


def main(words: Sequence[str] | None = None) -> dict[str, tuple[float, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", metavar="NAME", help="a torchvision network with residual units")
    parser.add_argument(
        "--timm", nargs="*", default=["eca", "cbam", "gc"], metavar="NAME", help="names of timm.layers.create_attn"
    )
    parser.add_argument("--size", type=int, default=32, metavar="PIXELS", help="height and width of images (default: 32)")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="training steps of each network (default: 8)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="such as cpu or cuda (default: cpu)")
    arguments = parser.parse_args(words)

    models = networks(arguments.model, arguments.timm, seed=0)
    example = torch.zeros(1, 3, arguments.size, arguments.size)
    reports = {kind: se_fx.report(model, example_inputs=example) for kind, model in models.items() if kind != "none"}
    print(reports["CBAM"], end="\n\n")

    losses: dict[str, tuple[float, float]] = {}
    if arguments.steps:
        (images, labels), _ = digits(arguments.size)
        models = {kind: model.to(arguments.device) for kind, model in models.items()}
        losses = train(models, images.to(arguments.device), labels.to(arguments.device), arguments.steps)

    base = reports["CBAM"].base
    rows = [["none", "-", f"{base.params:,}", f"{base.macs:,}", f"{base.flops:,}", f"{base.bytes:,}"]]
    for kind, report in reports.items():
        added = (report.added.params, report.added.macs, report.added.flops, report.added.bytes)
        rows.append([kind, len(report.sites), *(f"+{number:,}" for number in added)])
    headers = ["kind", "blocks", "parameters", "MACs", "FLOPs", "bytes moved"]
    if losses:
        headers += ["first loss", "last losses"]
        rows = [[*row, *(f"{loss:.3f}" for loss in losses[row[0]])] for row in rows]
    print(tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1))))
    return losses


if __name__ == "__main__":
    main()
