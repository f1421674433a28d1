"""What Squeeze-and-Excitation costs in training, as it is and optimised: time of a step, memory, the batch that fits.

Networks without blocks, with them, and what `se_fx.optimize_for_training` makes of these, with ``--compiled`` also by
``exact=False``. All variants of a network are timed in one run: each round times each once, and ratios, to the network without
blocks, are those of a round. Peak memory is measured; the bytes that autograd keeps are counted. The largest batch is the one
whose kept bytes, with two times the parameters (weights and gradients), are within ``--gib``. Weights and inputs are random:
neither changes what is computed.

    python examples/benchmarks/training.py
    python examples/benchmarks/training.py --compiled --channels-last --networks resnet50 --blocks residual
    python examples/benchmarks/training.py --device cuda --batch 128 --size 224 --bf16 --channels-last
    python examples/benchmarks/training.py --parts --networks efficientnet_b0
    python examples/benchmarks/training.py --quick
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import timm
import torch
import torchvision
from tabulate import tabulate
from torch import nn

import se_fx
from se_fx.cost import activation_bytes


def without_gates(name: str) -> nn.Module:
    """A network of timm's whose blocks of this kind do nothing."""
    model = timm.create_model(name)
    for module in list(model.modules()):
        if isinstance(getattr(module, "se", None), nn.Module):
            module.se = nn.Identity()
    return model


def resnet50(placement: str | None = None) -> nn.Module:
    model = torchvision.models.resnet50()
    return model if placement is None else se_fx.transform(model, placement=placement)


def composers() -> nn.Module:
    """MosaicML Composer's blocks, with its defaults, if it is installed."""
    from composer.algorithms.squeeze_excite import apply_squeeze_excite

    model = torchvision.models.resnet50()
    apply_squeeze_excite(model)
    return model


#: Networks by what they are without blocks: that, and with blocks, by name.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Callable[[], nn.Module]]]] = {
    "resnet50": (
        resnet50,
        {
            "timm's seresnet50": lambda: timm.create_model("seresnet50"),
            "residual": lambda: resnet50("residual"),
            "conv": lambda: resnet50("conv"),
            "Composer's": composers,
        },
    ),
    **{
        name: (lambda name=name: without_gates(name), {f"timm's {name}": lambda name=name: timm.create_model(name)})
        for name in ("efficientnet_b0", "regnety_008", "mobilenetv3_large_100")
    },
}


#: All kinds of blocks, by name.
BLOCKS = list(dict.fromkeys(title for _, blocks in NETWORKS.values() for title in blocks))


#: Fewer rewrites than all: less is computed again, and more is kept.
PARTS = {"readers alone": ["recompute_readers"], "readers, products": ["recompute_products", "recompute_readers"]}


def variants(name: str, compiled: bool, chosen: list[str], parts: bool) -> dict[str, nn.Module]:
    plain, blocks = NETWORKS[name]
    models = {f"{name}, no blocks": plain()}
    for title, make in blocks.items():
        if title not in chosen:
            continue
        try:
            model = make()
        except ImportError:
            continue
        models |= {title: model, f"{title}, optimised": se_fx.optimize_for_training(model)}
        if parts:
            models |= {f"{title}, {part}": se_fx.optimize_for_training(model, rewrites=names) for part, names in PARTS.items()}
        if compiled:
            models[f"{title}, not exact"] = se_fx.optimize_for_training(model, exact=False)
    return models


def largest_batch(model: nn.Module, size: int, limit: int) -> int:
    """The most images whose kept bytes fit, from those of two batches, in which every map is large enough to count."""
    kept = [activation_bytes(model, torch.empty(batch, 3, size, size, device="meta")) or 0 for batch in (32, 33)]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    each = kept[1] - kept[0]
    return max(0, (limit - 2 * weights - (kept[0] - 32 * each)) // each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME", help="which of them")
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=BLOCKS, metavar="NAME", help=f"which of {BLOCKS}")
    parser.add_argument("--size", type=int, default=160, metavar="PIXELS", help="height and width of images (default: 160)")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="images in a step (default: 4)")
    parser.add_argument("--gib", type=float, default=8, help="memory for the largest batch (default: 8)")
    parser.add_argument("--compiled", action="store_true", help="also under torch.compile")
    parser.add_argument("--channels-last", action="store_true", help="in memory format channels_last")
    parser.add_argument("--parts", action="store_true", help="also optimised by some of the rewrites alone")
    parser.add_argument("--bf16", action="store_true", help="under autocast to bfloat16")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="timings of each variant (default: 15)")
    parser.add_argument("--device", metavar="NAME", help="such as cpu or cuda (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="small images and few rounds, to see that it works")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.size, arguments.batch, arguments.rounds = 64, 2, 2

    for name in arguments.networks:
        models = variants(name, arguments.compiled, arguments.blocks, arguments.parts)
        result = se_fx.bench(
            models,
            torch.rand(1, 3, arguments.size, arguments.size),
            batch_sizes=(arguments.batch,),
            compiled="both" if arguments.compiled else False,
            training=True,
            channels_last=arguments.channels_last,
            autocast=torch.bfloat16 if arguments.bf16 else None,
            device=arguments.device,
            rounds=arguments.rounds,
            min_seconds=0 if arguments.quick else 0.05,
        )
        example = torch.empty(arguments.batch, 3, arguments.size, arguments.size, device="meta")
        kept = {title: activation_bytes(model, example) or 0 for title, model in models.items()}
        base = kept[result.baseline]
        rows = [
            [
                row.model,
                row.mode,
                f"{1e3 * row.median:.1f}",
                f"{row.ratio:.3f}" if row.ratios else "",
                *([f"{kept[row.model] / 2**20:.1f}", f"{kept[row.model] / base:.3f}"] if row.mode == "eager" else ["", ""]),
                f"{row.peak_bytes / 2**20:.1f}",
                largest_batch(models[row.model], arguments.size, int(arguments.gib * 2**30)) if row.mode == "eager" else "",
            ]
            for row in result.rows
        ]
        headers = [
            "",
            "mode",
            "step, ms",
            "of no blocks",
            "kept, MiB",
            "of no blocks",
            "peak, MiB",
            f"batch in {arguments.gib:g} GiB",
        ]
        print(tabulate(rows, headers, disable_numparse=True, colalign=("left", "left", *["right"] * 6)))
        print(
            f"{result.machine}; batch {arguments.batch}, {arguments.size} x {arguments.size}, {result.rounds} rounds\n",
            flush=True,
        )


if __name__ == "__main__":
    main()
