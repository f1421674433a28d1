"""A pretrained network gets Squeeze-and-Excitation and is fine-tuned on few images: does that help?

EfficientNet-Lite0, with its real ImageNet weights and a new classifier, learns scikit-learn's handwritten digits, enlarged,
from ten images of each class. So does its copy with blocks where EfficientNet-B0 has them. The blocks start as exact
identities: before training, both networks compute bitwise the same. Both take as many steps, over the same batches. A seed
decides which images these are, and the new weights; so the difference is taken seed by seed, and printed with its 95 %
interval, whatever it is.

How each part is trained (docs/finetune.md says why); each rate is the largest of one cycle:

  pretrained weights   AdamW at --rate, with weight decay, but none for norms and biases; or not at all (--frozen)
  blocks, classifier   at --block-rate and --classifier-rate, both higher, without weight decay
  BatchNorm            keeps ImageNet's statistics (--norms adapt: takes those of the batches)

    python examples/finetune.py
    python examples/finetune.py --frozen                    the blocks and the classifier alone
    python examples/finetune.py --seeds 8 --plot finetune.png
    python examples/finetune.py --shots 50 --steps 200 --size 64 --device cuda
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
from comparison import Comparison
from digits import CLASSES, Data, accuracy, batches, digits, fit
from quickstart import OPTIONS, pretrained
from torch import Tensor, nn
from tqdm import tqdm

import se_fx


def few(data: Data, shots: int, seed: int) -> Data:
    """`shots` images of each class, drawn with `seed`."""
    images, labels = data
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[labels[order] == label][:shots] for label in range(CLASSES)])
    return images[chosen], labels[chosen]


def pair(original: nn.Module, seed: int) -> dict[str, nn.Module]:
    """The network with a new classifier, and its copy with blocks; they share no tensor."""
    torch.manual_seed(seed)
    plain = copy.deepcopy(original)
    plain._fc = nn.Linear(plain._fc.in_features, CLASSES)
    return {"without": plain, "with SE": se_fx.transform(copy.deepcopy(plain), init="identity", **OPTIONS)}


def prepare(model: nn.Module, arguments: argparse.Namespace) -> torch.optim.Optimizer:
    """Set what trains, in which mode, and at which rate."""
    parts: dict[str, list[nn.Parameter]] = {"blocks": [], "classifier": [], "weights": [], "norms and biases": []}
    for name, parameter in model.named_parameters():
        if "squeeze_excite" in name.split("."):
            parts["blocks"].append(parameter)
        elif name.startswith("_fc."):
            parts["classifier"].append(parameter)
        else:
            parameter.requires_grad_(not arguments.frozen)
            parts["weights" if parameter.ndim > 1 else "norms and biases"].append(parameter)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(arguments.norms == "adapt")
    groups = [
        {"params": parts["blocks"], "lr": arguments.block_rate, "weight_decay": 0.0},
        {"params": parts["classifier"], "lr": arguments.classifier_rate, "weight_decay": 0.0},
        {"params": parts["weights"], "lr": arguments.rate, "weight_decay": 0.01},
        {"params": parts["norms and biases"], "lr": arguments.rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]])


def compare(arguments: argparse.Namespace, training: Data, held_out: list[Data]) -> tuple[Comparison, se_fx.GateProfile]:
    """Train both networks with each seed; the gates are those of the last."""
    original = pretrained()
    reached: dict[str, list[float]] = {"without": [], "with SE": []}
    with tqdm(total=2 * arguments.steps * arguments.seeds, desc="training", unit="step", leave=False) as bar:
        for seed in range(arguments.seeds):
            models = {name: model.to(arguments.device).eval() for name, model in pair(original, seed).items()}
            if seed == 0:
                describe(models, held_out)
            chosen = few(training, arguments.shots, seed)
            for name, model in models.items():
                optimizer = prepare(model, arguments)
                torch.manual_seed(seed)  # both drop the same
                fit(model, optimizer, chosen, arguments.steps, batch_size=arguments.batch_size, seed=seed, tick=bar.update)
                reached[name].append(accuracy(model.eval(), held_out))
            tqdm.write(f"seed {seed}: " + ", ".join(f"{name} {100 * values[-1]:.2f} %" for name, values in reached.items()))
    profile = se_fx.profile_gates(models["with SE"], held_out, progress=False)
    return Comparison(*map(tuple, reached.values())), profile


def describe(models: dict[str, nn.Module], held_out: list[Data]) -> None:
    """Say what the blocks add, and that they change nothing before they are trained."""
    report = se_fx.report(models["with SE"], example_inputs=held_out[0][0][:1])
    added = f"{report.added.params:,} parameters ({report.added.params / report.base.params:.1%})"
    print(f"{len(report.sites)} blocks add {added} and {report.added.macs / report.base.macs:.1%} MACs")
    with torch.no_grad():
        outputs: list[Tensor] = [model(held_out[0][0]) for model in models.values()]
    before = [accuracy(model, held_out) for model in models.values()]
    assert torch.equal(*outputs)
    assert before[0] == before[1]
    print(f"before training: {100 * before[0]:.2f} % without, {100 * before[1]:.2f} % with SE; outputs bitwise equal\n")


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a first look: two seeds, 8 steps, 100 test images")
    parser.add_argument("--seeds", type=int, metavar="N", help="how often both are trained (default: 3)")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps, each of one batch (default: 40)")
    parser.add_argument("--shots", type=int, default=10, metavar="N", help="training images of each class (default: 10)")
    parser.add_argument("--size", type=int, default=32, metavar="PIXELS", help="height and width of images (default: 32)")
    parser.add_argument("--batch-size", type=int, default=20, metavar="N", help="images in a step (default: 20)")
    parser.add_argument("--rate", type=float, default=3e-4, metavar="LR", help="of pretrained weights (default: 0.0003)")
    parser.add_argument("--block-rate", type=float, default=1e-3, metavar="LR", help="of the blocks (default: 0.001)")
    parser.add_argument("--classifier-rate", type=float, default=1e-2, metavar="LR", help="of the classifier (default: 0.01)")
    parser.add_argument("--frozen", action="store_true", help="train new parameters alone, pretrained ones stay")
    parser.add_argument("--norms", choices=("keep", "adapt"), default="keep", help="BatchNorm's statistics (default: keep)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="such as cpu or cuda (default: cpu)")
    parser.add_argument("--plot", metavar="FILE", help="draw the result")
    arguments = parser.parse_args(words)
    arguments.seeds = arguments.seeds or (2 if arguments.quick else 3)
    arguments.steps = arguments.steps or (8 if arguments.quick else 40)
    return arguments


def main(words: Sequence[str] | None = None) -> Comparison:
    arguments = parsed(words)
    training, test = ((x.to(arguments.device), y.to(arguments.device)) for x, y in digits(arguments.size))
    held_out = batches(*test)[: 1 if arguments.quick else None]
    comparison, profile = compare(arguments, training, held_out)
    count, tested = CLASSES * arguments.shots, sum(len(labels) for _, labels in held_out)
    print(f"\nafter {arguments.steps} steps on {count} training images, on {tested} test images:")
    print(comparison, end="\n\n")
    print(f"gates of seed {arguments.seeds - 1} on the test images; they began at 1:\n{profile}")
    if arguments.plot:
        title = f"EfficientNet-Lite0 fine-tuned on {count} digits, {arguments.seeds} seeds"
        comparison.plot(title, ("without", "with SE"), arguments.plot)
    return comparison


if __name__ == "__main__":
    main()
