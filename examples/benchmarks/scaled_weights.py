"""Scaling a convolution's weights by a gate, instead of its output, at batch 1: why `se_fx.rewrites` doesn't.

The end of a bottleneck in four shapes of ResNet-50, compiled by Inductor with freezing: 1x1 convolution, gate, sum, ReLU. Each
round times both forms; the ratio is the median of the rounds' ratios. Above 1, scaling weights is slower.

    python examples/benchmarks/scaled_weights.py
    python examples/benchmarks/scaled_weights.py --bf16
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn


class End(nn.Module):
    def __init__(self, channels: int, scaled: int, weights: bool) -> None:
        super().__init__()
        self.conv, self.weights = nn.Conv2d(channels, scaled, 1), weights

    def forward(self, x: Tensor, gate: Tensor, shortcut: Tensor) -> Tensor:
        if not self.weights:
            return F.relu(self.conv(x) * gate + shortcut)
        factor = gate[0]
        return F.relu(F.conv2d(x, self.conv.weight * factor[..., None], self.conv.bias * factor[:, 0, 0]) + shortcut)


def timed(model: nn.Module, inputs: tuple[Tensor, ...], calls: int = 5) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        model(*inputs)
    return (time.perf_counter() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bf16", action="store_true", help="in bfloat16 instead of float32")
    parser.add_argument("--rounds", type=int, default=80, metavar="N", help="timings of each form (default: 80)")
    arguments = parser.parse_args()

    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    rows = []
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
            shapes = ((1, channels, size, size), (1, 4 * channels, 1, 1), (1, 4 * channels, size, size))
            inputs = tuple(torch.rand(s, dtype=dtype).contiguous(memory_format=torch.channels_last) for s in shapes)
            torch.compiler.reset()
            ends = (
                End(channels, 4 * channels, weights).to(dtype, memory_format=torch.channels_last) for weights in (False, True)
            )
            forms = [torch.compile(end.eval()) for end in ends]
            for form in forms * 2:
                form(*inputs)
            rounds = [[timed(form, inputs) for form in forms] for _ in range(arguments.rounds)]
            output, weights = (1e6 * statistics.median(column) for column in zip(*rounds, strict=True))
            ratio = statistics.median(second / first for first, second in rounds)
            rows.append([f"{channels} to {4 * channels}, {size}x{size}", output, weights, ratio])
    headers = ["convolution", "output scaled, us", "weights scaled, us", "ratio"]
    print(tabulate(rows, headers, "github", floatfmt=("", ".0f", ".0f", ".2f")))


if __name__ == "__main__":
    main()
