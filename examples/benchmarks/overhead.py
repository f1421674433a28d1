"""What Squeeze-and-Excitation blocks cost in time and memory: a torchvision network with and without them.

Each round times the original and every variant once; ratios are those of a round, to the original. Weights are random,
and so are inputs: neither changes what is computed.

    python examples/benchmarks/overhead.py
    python examples/benchmarks/overhead.py --batch-sizes 1 8 --compiled --channels-last --bf16
    python examples/benchmarks/overhead.py --batch-sizes 8 --training
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torchvision

import se_fx

VARIANTS: dict[str, dict[str, Any]] = {
    "conv, 128 channels or more": {"placement": "conv", "min_channels": 128},
    "conv, 512 channels or more": {"placement": "conv", "min_channels": 512},
    "residual, 1/16": {"placement": "residual", "min_channels": 1, "latent_channels": 1 / 16},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", metavar="NAME", help="a torchvision model (default: resnet50)")
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS", help="height and width of images (default: 224)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1], metavar="N", help="images in a call (default: 1)")
    parser.add_argument("--compiled", action="store_true", help="also under torch.compile")
    parser.add_argument("--training", action="store_true", help="training steps instead of inference")
    parser.add_argument("--channels-last", action="store_true", help="in memory format channels_last")
    parser.add_argument("--bf16", action="store_true", help="under autocast to bfloat16")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="timings of each model (default: 15)")
    parser.add_argument("--device", metavar="NAME", help="such as cpu or cuda (default: cpu)")
    arguments = parser.parse_args()

    original = torchvision.models.get_model(arguments.model)
    models = {"original": original} | {name: se_fx.transform(original, **options) for name, options in VARIANTS.items()}
    result = se_fx.bench(
        models,
        torch.rand(1, 3, arguments.size, arguments.size),
        batch_sizes=arguments.batch_sizes,
        compiled="both" if arguments.compiled else False,
        training=arguments.training,
        channels_last=arguments.channels_last,
        autocast=torch.bfloat16 if arguments.bf16 else None,
        device=arguments.device,
        rounds=arguments.rounds,
    )
    print(result)


if __name__ == "__main__":
    main()
