"""How long `import se_fx` takes, next to `import torch`, which it includes.

Interleaved: each round starts a fresh Python for each of the two, in turn, and the table shows medians and the median of the
rounds' ratios. The first round, which reads files from disk, doesn't count.

    python examples/benchmarks/import_time.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from tabulate import tabulate
from tqdm import tqdm

TIMED = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def seconds(module: str) -> float:
    done = subprocess.run([sys.executable, "-c", TIMED.format(module)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()

    pairs = [(seconds("torch"), seconds("se_fx")) for _ in tqdm(range(arguments.rounds + 1), leave=False)][1:]
    torch, se_fx = zip(*pairs, strict=True)
    ratio = statistics.median(b / a for a, b in pairs)
    row = (f"{statistics.median(torch):.2f}", f"{statistics.median(se_fx):.2f}", f"{ratio:.3f}")
    print(tabulate([row], ["import torch, s", "import se_fx, s", "ratio"], "github", disable_numparse=True))


if __name__ == "__main__":
    main()
