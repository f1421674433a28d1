"""How long `se_fx.transform` takes, next to `torch.fx.symbolic_trace`, which traces once and checks nothing.

Interleaved in one process: each round times both on every model, and the table shows medians and the median of the rounds'
ratios. Then, on chains of blocks, whether time grows with the number of nodes.

    python examples/benchmarks/transform_time.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torchvision
from tabulate import tabulate
from torch import fx, nn
from tqdm import tqdm

import se_fx

MODELS = ("resnet50", "resnet152", "densenet201")


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def chain(blocks: int) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(blocks):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()

    models = {name: torchvision.models.get_model(name) for name in MODELS}
    for model in models.values():  # once, to warm up
        se_fx.transform(model, min_channels=512), fx.symbolic_trace(model)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in tqdm(range(arguments.rounds), desc="models", leave=False):
        for name, model in models.items():
            trace = seconds(lambda model=model: fx.symbolic_trace(model))
            times[name].append((trace, seconds(lambda model=model: se_fx.transform(model, min_channels=512))))
    rows = []
    for name, pairs in times.items():
        traces, transforms = zip(*pairs, strict=True)
        ratio = statistics.median(b / a for a, b in pairs)
        rows.append(
            (name, f"{1e3 * statistics.median(traces):.0f}", f"{1e3 * statistics.median(transforms):.0f}", f"{ratio:.2f}")
        )
    print(
        tabulate(rows, ["model", "symbolic_trace, ms", "transform, ms", "ratio"], "github", disable_numparse=True), end="\n\n"
    )

    sizes = (25, 50, 100, 200)
    chains = {size: chain(size) for size in sizes}
    growth: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in tqdm(range(arguments.rounds), desc="chains", leave=False):
        for size, model in chains.items():
            growth[size].append(seconds(lambda model=model: se_fx.transform(model, min_channels=1, latent_channels=1)))
    rows = []
    for size in sizes:
        ratio = statistics.median(b / a for a, b in zip(growth[sizes[0]], growth[size], strict=True))
        rows.append((3 * size, f"{1e3 * statistics.median(growth[size]):.0f}", f"{size / sizes[0]:.0f}", f"{ratio:.1f}"))
    print(
        tabulate(rows, ["modules in a chain", "transform, ms", "nodes, times", "time, times"], "github", disable_numparse=True)
    )


if __name__ == "__main__":
    main()
