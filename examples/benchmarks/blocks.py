"""What each kind of attention block costs in a network: parameters, MACs, bytes moved, and latency beside the plain network's.

Blocks stand at the end of each residual branch. Latencies are of eval mode, and of `torch.compile` with --compiled: paired with
the plain network's in every round, so that what else the machine does counts for both; the ratio is the median of these.

    python examples/benchmarks/blocks.py
    python examples/benchmarks/blocks.py --model mobilenet_v3_large --size 160 --blocks eca ese --compiled
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torchvision
from tabulate import tabulate
from tqdm import tqdm

import se_fx
from se_fx.blocks import BLOCKS


def main(arguments: Sequence[str] | None = None) -> list[list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="a torchvision name (default: resnet50)")
    parser.add_argument("--size", type=int, default=224, help="height and width of the image (default: 224)")
    parser.add_argument("--batch-size", type=int, default=1, help="default: 1")
    parser.add_argument("--blocks", nargs="+", choices=["se", *BLOCKS], default=["se", *BLOCKS], help="default: all")
    parser.add_argument("--compiled", action="store_true", help="under torch.compile")
    parser.add_argument("--rounds", type=int, default=15, help="timings of each network; 0 for costs alone (default: 15)")
    options = parser.parse_args(arguments)

    x = torch.randn(options.batch_size, 3, options.size, options.size)
    rows = []
    for kind in tqdm(options.blocks, desc="blocks", unit="kind", leave=False):
        torch.manual_seed(0)
        model = torchvision.models.get_model(options.model, weights=None).eval()
        chosen = {"latent_channels": 1 / 16} if kind == "se" else {"block": kind}
        gm = se_fx.transform(model, placement="residual", min_channels=1, seed=0, **chosen)
        added = se_fx.report(gm, example_inputs=x).added
        time = "-"
        if options.rounds:
            timed = se_fx.bench(gm, x, batch_sizes=[options.batch_size], compiled=options.compiled, rounds=options.rounds)
            time = f"{timed.rows[-1].ratio:.3f}"  # the first row is the network without
        paper = "Hu et al., 2017, arXiv 1709.01507" if kind == "se" else getattr(BLOCKS[kind], "paper", "")
        costs = [f"{value:,}" for value in (added.params, added.macs, added.bytes)]
        rows.append([kind, *costs, time, paper])
    headers = ["block", "parameters", "MACs", "bytes moved", "time, of without", "paper"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * 4, "left")))
    return rows


if __name__ == "__main__":
    main()
