"""What `se_fx.optimize_for_inference` takes off the time of networks with Squeeze-and-Excitation (SE) blocks.

Each group has a network without SE, *plain*, and networks with SE, each as it is and optimized:

    resnet50               timm's seresnet50, and timm's resnet50 with SE put at the end of its residual branches: torchvision's
                           block by hand, and `se_fx.transform`; SE after convs of 128 channels and more (placement
                           "conv") and after their norms ("norm"); and Composer's blocks after convs, where it is installed
    efficientnet_b0, regnety_008, mobilenetv3_large_100
                           timm's, which have SE; plain is the same with an Identity in the place of each block

A group, at a dtype and a batch size, is one run of `se_fx.bench`, printed as one table. Each round times every model once, in
changing order, and ratios are those of a round. *Overhead left* is the share of SE's overhead that optimizing leaves: the
ratio of optimized to plain, less 1, over the ratio of unoptimized to plain, less 1. Compiled is `torch.compile` with Inductor's
freezing; all is in memory format channels_last. Weights are random, and statistics of batch norms are those of random images.
Without --networks, plain is optimized too: what that changes has nothing to do with SE. With --backend, each network with SE is
also compiled as it is by ``torch.compile(model, backend="se_fx")``. With --skip-guards, compiled code doesn't look at each call
whether modules are as they were (`torch.compiler.skip_guard_on_all_nn_modules_unsafe`), which takes time with each module.

    python examples/benchmarks/inference.py                                                # everything: hours
    python examples/benchmarks/inference.py --models resnet50 --networks seresnet50 --batch-sizes 1 8 --modes compiled
    python examples/benchmarks/inference.py --modes eager --dtypes float32 --json eager.json
    python examples/benchmarks/inference.py --models efficientnet_b0 --batch-sizes 1 --modes compiled --backend --skip-guards
    python examples/benchmarks/inference.py --batch-sizes 1 --rounds 3 --min-seconds 0     # a first look

docs/composer.md says how to install Composer beside a current PyTorch.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from tabulate import tabulate
from timm.layers.squeeze_excite import SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation
from tqdm import tqdm

import se_fx

SIZE = 224
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OPTIMIZED = ", optimized"
BY_BACKEND = ", backend se_fx"
HEADERS = ["model", "mode", "median, ms", "IQR, ms", "to unoptimized", "IQR", "to plain", "IQR", "overhead left"]


# --------------------------------------------------------------------------------------------------------------- networks
def by_hand() -> nn.Module:
    """ResNet-50 with torchvision's SE where seresnet50 has timm's: last on each residual branch."""
    model = timm.create_model("resnet50")
    for block in model.modules():
        if isinstance(block, timm.models.resnet.Bottleneck):
            channels = block.conv3.out_channels
            block.se = SqueezeExcitation(channels, channels // 16)
    return model


def transformed(placement: str, min_channels: int) -> nn.Module:
    options = {"min_channels": min_channels, "latent_channels": 1 / 16}
    return se_fx.transform(timm.create_model("resnet50"), placement=placement, **options)


def composer() -> nn.Module:
    from composer.functional import apply_squeeze_excite

    model = timm.create_model("resnet50")
    apply_squeeze_excite(model)
    return model


def without_se(name: str) -> nn.Module:
    model = timm.create_model(name)
    for parent in list(model.modules()):
        for child_name, child in parent.named_children():
            if isinstance(child, (SEModule, SqueezeExcite)):
                setattr(parent, child_name, nn.Identity())
    return model


def pair(name: str) -> dict[str, Callable[[], nn.Module]]:
    return {f"{name} without SE": lambda: without_se(name), name: lambda: timm.create_model(name)}


GROUPS: dict[str, dict[str, Callable[[], nn.Module]]] = {  # the plain network first
    "resnet50": {
        "resnet50": lambda: timm.create_model("resnet50"),
        "seresnet50": lambda: timm.create_model("seresnet50"),
        "torchvision's SE by hand": by_hand,
        "se_fx, residual, 1/16": lambda: transformed("residual", 1),
        "se_fx, conv, 1/16": lambda: transformed("conv", 128),
        "se_fx, norm, 1/16": lambda: transformed("norm", 128),
        "Composer's defaults": composer,
    },
    "efficientnet_b0": pair("efficientnet_b0"),
    "regnety_008": pair("regnety_008"),
    "mobilenetv3_large_100": pair("mobilenetv3_large_100"),
}


def lively(model: nn.Module) -> nn.Module:
    """The model with random affine parameters in its batch norms, and the statistics of random images: nothing is 0 or 1."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
    momenta = {norm: norm.momentum for norm in norms}
    for norm in norms:
        norm.momentum = 1.0  # statistics are those of the last batch
    with torch.no_grad():
        model.train()(torch.randn(4, 3, SIZE, SIZE))
    for norm, momentum in momenta.items():
        norm.momentum = momentum
    return model.eval()


class Unguarded(nn.Module):
    """A model that its first call compiles, for itself alone, into code that asks nothing of its modules afterwards."""

    def __init__(self, model: nn.Module, backend: str) -> None:
        super().__init__()
        self.model, self.backend, self.compiled = model, backend, None

    def forward(self, x: Tensor) -> Tensor:
        if self.compiled is None:
            options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
            self.compiled = torch.compile(
                self.model, backend=self.backend, options=options, dynamic=False, isolate_recompiles=True
            )
        return self.compiled(x)


# -------------------------------------------------------------------------------------------------------------- measuring
def prepared(group: str, chosen: list[str] | None, inputs: Tensor) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The models of a group, each as it is and optimized; and for each how far apart the two's outputs are."""
    models: dict[str, nn.Module] = {}
    differences: dict[str, str] = {}
    for position, (name, build) in enumerate(GROUPS[group].items()):
        if position and chosen is not None and name not in chosen:
            continue
        torch.manual_seed(0)
        try:
            model = lively(build()).to(inputs.device, inputs.dtype).to(memory_format=torch.channels_last)
        except ImportError as error:
            differences[name] = f"not installed: {error}"
            continue
        if not position and chosen is not None:
            models[name] = model
            continue
        optimized = se_fx.optimize_for_inference(model, example_inputs=(inputs,))
        models |= {name: model, name + OPTIMIZED: optimized}
        with torch.inference_mode():
            before, after = model(inputs).float(), optimized(inputs).float()
        differences[name] = f"{(after - before).abs().max():.1e}, outputs up to {before.abs().max():.1e}"
    return models, differences


def against(result: se_fx.Benchmark) -> list[list[str]]:
    """Rows of a table: each model against plain, each optimized one against itself unoptimized too."""
    rows = {(row.model, row.mode): row for row in result.rows}
    cells = []
    for (name, mode), row in rows.items():
        before = rows[name.removesuffix(OPTIMIZED).removesuffix(BY_BACKEND), mode]
        itself = ratio(row.against(before)) if row is not before else ["", ""]
        overhead = before.ratio - 1
        left = f"{(row.ratio - 1) / overhead:.0%}" if row is not before and overhead > 0 else ""
        times = [f"{1e3 * row.median:,.2f}", " to ".join(f"{1e3 * quartile:,.2f}" for quartile in row.iqr)]
        cells.append([name, mode, *times, *itself, *ratio(row), left])
    return cells


def ratio(row: Any) -> list[str]:
    return [f"{row.ratio:.3f}", " to ".join(f"{quartile:.3f}" for quartile in row.ratio_iqr)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = ("eager", "compiled")
    seconds = "the least that a timing lasts; calls are repeated to fill it, after two to warm up (default: 0.3)"
    add = parser.add_argument
    add("--models", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help="groups (default: all four)")
    add("--networks", nargs="+", metavar="NAME", help="networks of these groups, by name, plain ones besides (default: all)")
    add("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="images in a call (default: 1 8 32)")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of weights and images (default: both)")
    add("--modes", nargs="+", choices=modes, default=list(modes), help="how models are called (default: both)")
    add("--backend", action="store_true", help="compile networks with SE also by backend se_fx")
    add("--skip-guards", action="store_true", help="compiled code doesn't check modules at each call; with --modes compiled")
    add("--rounds", type=int, default=31, metavar="N", help="timings of each model (default: 31)")
    add("--min-seconds", type=float, default=0.3, metavar="S", help=seconds)
    add("--device", default="cpu", metavar="NAME", help="such as cpu or cuda (default: cpu)")
    add("--json", type=Path, metavar="FILE", help="write the seconds of all rounds there, anew after each table")
    arguments = parser.parse_args()
    compiles = "compiled" in arguments.modes
    if arguments.skip_guards and arguments.modes != ["compiled"]:
        parser.error("--skip-guards: it is for compiled code alone; pass --modes compiled")

    written: list[dict[str, Any]] = []
    machine = ""
    torch.manual_seed(0)
    bar = tqdm(list(itertools.product(arguments.models, arguments.dtypes, arguments.batch_sizes)), unit="table")
    for group, dtype, batch_size in bar:
        title = f"{group}, {dtype}, batch {batch_size}"
        bar.set_description(title)
        inputs = torch.randn(batch_size, 3, SIZE, SIZE).to(arguments.device, DTYPES[dtype], memory_format=torch.channels_last)
        models, differences = prepared(group, arguments.networks, inputs)
        if arguments.backend and compiles:
            names = [name.removesuffix(OPTIMIZED) for name in models if name.endswith(OPTIMIZED)]
            models |= {name + BY_BACKEND: models[name] for name in names}
        backends = {name: "se_fx" for name in models if name.endswith(BY_BACKEND)}
        if arguments.skip_guards:  # models that compile themselves
            models = {name: Unguarded(model, backends.get(name, "inductor")) for name, model in models.items()}
        bench_compiles = compiles and not arguments.skip_guards
        with torch._inductor.config.patch(freezing=arguments.skip_guards, freezing_discard_parameters=False):
            result = se_fx.bench(
                models,
                inputs,
                batch_sizes=(batch_size,),
                backend=backends if bench_compiles else "inductor",
                compiled="both" if len(set(arguments.modes)) == 2 else bench_compiles,
                freezing=bench_compiles,
                channels_last=True,
                rounds=arguments.rounds,
                min_seconds=arguments.min_seconds,
            )
        rows = against(result)
        if arguments.skip_guards:
            rows = [[name, "unguarded", *cells] for name, _, *cells in rows]
        rows += [[name, "", *words.split(": ")[:1]] for name, words in differences.items() if name not in models]
        tqdm.write(f"## {title}\n\n{tabulate(rows, HEADERS, 'github', disable_numparse=True)}\n")
        tqdm.write(tabulate(differences.items(), ["model", "largest difference of outputs"], "github") + "\n")
        written.append({"group": group, "differences": differences, **result.to_dict()})
        if arguments.json:
            arguments.json.write_text(json.dumps(written))
        machine = result.machine
        del models, inputs
        gc.collect()  # models are cyclic, and so is what was compiled of them
    print(f"{machine}, rounds: {arguments.rounds}")


if __name__ == "__main__":
    main()
