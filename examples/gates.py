"""What trained gates do, and removal of the blocks whose gates do nothing.

EfficientNet-Lite0 with its real ImageNet weights gets Squeeze-and-Excitation blocks where EfficientNet-B0 has them, which start
as exact identities. The blocks and a new classifier, all else frozen, learn scikit-learn's handwritten digits, enlarged.
Then:

1. profile_gates runs the training images through the network: what is each gate, for each class?
2. fold_gates removes the blocks whose gate is constant within a tolerance; their mean gate goes into the norm before them.
3. The test images, in no way used until then, say what that changes.

A spread is the standard deviation of a gate over images. The table has the mean over a block's channels; folding goes by the
largest.

    python examples/gates.py --quick              a first look: two epochs, 200 test images, two tolerances
    python examples/gates.py --plot gates.png     the figures of docs/gates.md
    python examples/gates.py --tolerances 0.2 --verbose     which blocks, and what each of them does alone
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from digits import CLASSES, accuracy, batches, digits
from quickstart import OPTIONS, pretrained
from tabulate import tabulate
from torch import Tensor, nn

import se_fx


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    """The blocks and the classifier learn, in eval mode, so that BatchNorm keeps its ImageNet statistics."""
    new = [p for name, p in model.named_parameters() if "squeeze_excite" in name.split(".") or name.startswith("_fc.")]
    model.eval().requires_grad_(False)
    for parameter in new:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(new, lr=rate, weight_decay=0.0)
    steps = epochs * -(-len(images) // 50)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, cycle_momentum=False)
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(images)).split(50):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        print(f"  epoch {epoch + 1}: loss {total / len(images):.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two epochs, 200 test images, two tolerances")
    parser.add_argument("--epochs", type=int, default=6, metavar="N", help="passes over the training images (default: 6)")
    parser.add_argument("--rate", type=float, default=3e-3, metavar="LR", help="AdamW's largest learning rate (default: 0.003)")
    parser.add_argument("--size", type=int, default=32, metavar="PIXELS", help="height and width of images (default: 32)")
    parser.add_argument(
        "--tolerances",
        type=float,
        nargs="+",
        metavar="T",
        help="how far gates, in [0, 2], may vary (default: 0.02 0.1 0.2 0.4)",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the gates of every block by class, channels in the order of their mean gate"
    )
    parser.add_argument("--verbose", action="store_true", help="print each folding's own table too")
    arguments = parser.parse_args()
    epochs = 2 if arguments.quick else arguments.epochs
    tolerances = arguments.tolerances or ([0.02, 0.2] if arguments.quick else [0.02, 0.1, 0.2, 0.4])

    torch.manual_seed(0)
    training, test = digits(arguments.size)
    original = pretrained()
    original._fc = nn.Linear(original._fc.in_features, CLASSES)
    model = se_fx.transform(original, init="identity", example_inputs=training[0][:1], **OPTIONS)

    start = time.perf_counter()
    print(f"training on {len(training[0])} digits:")
    train(model, *training, epochs, arguments.rate)
    held_out = batches(*test)[: 2 if arguments.quick else None]
    reached = accuracy(model, held_out)
    print(f"{time.perf_counter() - start:.0f} s; {reached:.2%} of {sum(len(y) for _, y in held_out)} test digits are right\n")

    profile = se_fx.profile_gates(model, batches(*training))
    print(profile, end="\n\n")
    if arguments.plot:
        profile.plot(arguments.plot)

    rows = []
    for tolerance in tolerances:
        folding = se_fx.fold_gates(model, profile, tolerance, held_out=held_out)
        changes = folding.changes
        assert changes is not None
        if arguments.verbose:
            print(folding, end="\n\n")
        row = [f"{tolerance:g}", f"{len(folding.folded)} of {len(profile.sites)}", f"{folding.saved.params:,}"]
        row += [f"{folding.saved.bytes:,}", f"{changes.largest:.3f}", f"{changes.relative:.3f}", f"{changes.agreement:.2%}"]
        rows.append([*row, f"{accuracy(folding.model, held_out):.2%}"])
    headers = ["tolerance", "blocks removed", "parameters saved", "bytes saved", "outputs move by", "of their std"]
    headers += ["same class", "accuracy"]
    print(tabulate(rows, headers, disable_numparse=True, colalign=["right"] * len(headers)))
    everything = accuracy(se_fx.remove(model), held_out)
    print(f"\naccuracy with all blocks {reached:.2%}; with all taken out, nothing folded, {everything:.2%}")


if __name__ == "__main__":
    main()
