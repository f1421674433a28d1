"""When a gate's products of vectors and matrices are better written out than left to a library: `se_fx.products.MOST_MACS`.

Squeeze and excitation alone, compiled by Inductor with freezing, in both forms: one library call for each layer, or
multiplications and sums that the compiler fuses with its neighbours. Each round times both, one after the other; the
ratio is the median of the rounds' ratios. Below 1, writing out is faster.

    python examples/benchmarks/products.py
    python examples/benchmarks/products.py --bf16
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from tabulate import tabulate
from torch import Tensor, nn

from se_fx.rewrites.products import MOST_MACS, VectorLinear

SHAPES = (  # channels read, height and width, hidden width, channels scaled: of seresnet50, efficientnet_b0, and a wide one
    (64, 56, 16, 256),
    (128, 28, 32, 512),
    (256, 14, 64, 1024),
    (512, 7, 128, 2048),
    (96, 56, 4, 96),
    (240, 28, 10, 240),
    (672, 14, 28, 672),
    (1152, 7, 48, 1152),
    (2048, 7, 256, 2048),
)


class Gate(nn.Module):
    def __init__(self, channels: int, hidden: int, scaled: int, dtype: torch.dtype, few: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = (
            VectorLinear(torch.randn(rows, columns, dtype=dtype), torch.randn(rows, dtype=dtype))
            for rows, columns in ((hidden, channels), (scaled, hidden))
        )
        self.fc1.few = self.fc2.few = few

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def timed(model: nn.Module, x: Tensor, calls: int = 5) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        model(x)
    return (time.perf_counter() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--batch-sizes", type=int, nargs="+", default=[1, 4, 8, 16, 32], metavar="N", help="default: 1 4 8 16 32")
    add("--bf16", action="store_true", help="in bfloat16 instead of float32")
    add("--rounds", type=int, default=60, metavar="N", help="timings of each form (default: 60)")
    arguments = parser.parse_args()

    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    rows = []
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        for channels, size, hidden, scaled in SHAPES:
            for batch in arguments.batch_sizes:
                x = torch.randn(batch, channels, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
                torch.compiler.reset()
                forms = [torch.compile(Gate(channels, hidden, scaled, dtype, few).eval()) for few in (0, batch)]
                for form in forms * 2:
                    form(x)
                rounds = [[timed(form, x) for form in forms] for _ in range(arguments.rounds)]
                called, written = (1e6 * statistics.median(column) for column in zip(*rounds, strict=True))
                ratio = statistics.median(second / first for first, second in rounds)
                macs = [batch * hidden * width for width in (channels, scaled)]
                chosen = "/".join("out" if each <= MOST_MACS else "call" for each in macs)
                rows.append([f"{channels}, {hidden}, {scaled}", batch, f"{max(macs):,}", called, written, ratio, chosen])
    headers = ["channels, hidden, scaled", "batch", "MACs of the larger", "called, us", "written out, us", "ratio", "chosen"]
    print(tabulate(rows, headers, "github", floatfmt=("", "", "", ".0f", ".0f", ".2f", "")))


if __name__ == "__main__":
    main()
