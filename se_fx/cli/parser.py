"""The arguments of the command line, and the help that teaches them."""

from __future__ import annotations

import argparse

import torch

import se_fx
from se_fx.blocks import BLOCKS
from se_fx.cli.commands import COMMANDS
from se_fx.criteria import CRITERIA
from se_fx.measure import SALIENCIES
from se_fx.placement import PLACEMENTS

__all__ = ["parser"]

_EXAMPLES = """\
examples:
  se-fx report resnet50 --min-channels 512 --input 1,3,224,224
  se-fx report resnet50 --placement residual --latent-channels 1/16 --min-channels 1 --input 1,3,224,224 --html report.html
  se-fx plan timm:efficientnet_lite0 --where 'blocks.*' --latent-channels 0.25
  se-fx plan resnet50 --placement residual --min-channels 1 --input 1,3,224,224 --budget flops=0.1% --budget params=2%
  se-fx suggest mobilenet_v2
  se-fx score models.py:build --checkpoint plain.pt --batches data.py:batches --placement residual --budget params=1%
  se-fx transform my_package.models:build --checkpoint plain.pt --init identity --save se.pt
  se-fx optimize timm:seresnet50 --checkpoint weights.pt --input 1,3,224,224 --onnx fast.onnx
  se-fx bench resnet50 --placement residual --min-channels 1 --input 1,3,224,224 --batch-sizes 1 8 --compiled

MODEL is the name of a torchvision model, timm:NAME, package.module:callable or path/to/file.py:callable, the callable taking
no arguments and returning an nn.Module (or being one). Zoo models are built without pretrained weights; nothing is downloaded.
With --trust-pickle, MODEL may also be a file that holds a whole model.

exit status: 0 done; 1 done, and found nothing: no place for a block, none fits the budget, nothing to optimize; 2 bad input.
"""
_SPEC = "package.module:name or path/to/file.py:name"


def parser() -> argparse.ArgumentParser:
    """What `se-fx` understands."""
    made = argparse.ArgumentParser(
        prog="se-fx",
        description="Squeeze-and-Excitation blocks for any PyTorch CNN: where they go and what they cost.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"se_fx {se_fx.__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, does) in COMMANDS.items():
        command = commands.add_parser(
            name, help=does, description=does, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("model", metavar="MODEL", help=f"torchvision name, timm:NAME, or {_SPEC}")
        command.add_argument(
            "--input",
            type=_shape,
            metavar="N,C,H,W",
            help="shape of an example input, to count MACs, FLOPs and bytes; none is computed",
        )
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
        command.add_argument(
            "--checkpoint",
            metavar="FILE",
            help="a state_dict to load into the model first, or what `se-fx transform --save` wrote, blocks and all",
        )
        command.add_argument(
            "--trust-pickle",
            action="store_true",
            help="MODEL may be a file that torch.save wrote a whole model to; loading it runs whatever code it holds",
        )
        if name not in ("suggest", "optimize"):
            _add_options(command)
    _add_outputs(commands.choices)
    return made


def _add_options(command: argparse.ArgumentParser) -> None:
    options = command.add_argument_group("where blocks go, and of what kind")
    for name, criterion in CRITERIA.items():
        if criterion.argument:
            options.add_argument(f"--{name.replace('_', '-')}", **criterion.argument)
    options.add_argument(
        "--latent-channels", type=_number, metavar="X", help="hidden width, or a fraction of the channels (default: 64)"
    )
    options.add_argument("--placement", help=f"where a block goes: {', '.join(PLACEMENTS)} (default: conv)")
    options.add_argument(
        "--budget",
        action="append",
        type=_budget,
        metavar="KIND=X",
        help="keep the most blocks that add at most X flops, params or bytes: a number or, of the model's own, 1%% or 0.01; "
        "repeatable; flops and bytes need --input",
    )
    options.add_argument("--block", help=f"another kind of attention: {', '.join(BLOCKS)} (default: Squeeze-and-Excitation)")
    options.add_argument("--init", help="default or identity (default: default)")
    options.add_argument("--bias", action="store_true", default=None, help="biases in the blocks' linear layers")
    options.add_argument("--activation", help="relu, silu or gelu (default: relu)")
    options.add_argument("--gate", help="sigmoid or hardsigmoid (default: sigmoid)")


def _add_outputs(commands: dict[str, argparse.ArgumentParser]) -> None:
    commands["report"].add_argument("--html", metavar="FILE", help="also write a page with charts; needs --input for costs")
    commands["report"].add_argument(
        "--roofline", action="store_true", help="also estimate latency, from this machine's peak rates; needs --input"
    )
    commands["transform"].add_argument("--seed", type=int, metavar="N", help="draw the blocks' weights from this seed")
    commands["transform"].add_argument("--save", metavar="FILE", required=True, help="where plan and state_dict go")
    score = commands["score"]
    score.add_argument(
        "--batches", metavar="SPEC", required=True, help=f"{_SPEC}: pairs of inputs and targets, or a function that makes them"
    )
    loss = "torch.nn.functional:cross_entropy"
    score.add_argument("--loss", metavar="SPEC", default=loss, help=f"{_SPEC}: of outputs and targets (default: {loss})")
    score.add_argument("--saliency", default="first_order", help=f"{' or '.join(SALIENCIES)} (default: first_order)")
    optimize = commands["optimize"]
    optimize.add_argument("--target", help="export: for engines with fusions of their own (with --onnx, the default)")
    optimize.add_argument("--onnx", metavar="FILE", help="also write an ONNX model; needs --input, pip install 'se_fx[onnx]'")
    optimize.add_argument("--pt2", metavar="FILE", help="also write a program of torch.export; needs --input")
    optimize.add_argument("--dynamic-batch", action="store_true", help="what is written takes batches of any size")
    bench = commands["bench"]
    bench.add_argument("--batch-sizes", type=int, nargs="+", default=[1], metavar="N", help="default: 1")
    bench.add_argument("--compiled", action="store_true", help="also under torch.compile")
    bench.add_argument("--training", action="store_true", help="training steps instead of inference")
    bench.add_argument("--channels-last", action="store_true", help="in memory format channels_last")
    bench.add_argument("--bf16", action="store_true", help="under autocast to bfloat16")
    bench.add_argument("--device", default="cpu", help="default: cpu")
    bench.add_argument("--rounds", type=int, default=15, metavar="N", help="timings of each model (default: 15)")


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
        torch.empty(shape, device="meta")  # as large as tensors can be
    except (ValueError, RuntimeError, TypeError):
        shape = ()
    if not shape:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a shape such as 1,3,224,224")
    return shape


def _budget(text: str) -> tuple[str, float]:
    kind, _, amount = text.partition("=")
    try:
        value = float(amount.removesuffix("%")) / 100 if amount.endswith("%") else _number(amount)
    except (ValueError, argparse.ArgumentTypeError):
        value = -1
    too_much = amount.endswith("%") and value >= 1
    if kind not in ("flops", "params", "bytes") or not value >= 0 or too_much:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected flops=, params= or bytes= and an amount, a number or less than 100%, such as flops=1%"
        )
    return kind, value


def _number(text: str) -> float:
    try:
        if "/" in text:
            numerator, denominator = text.split("/")
            return float(numerator) / float(denominator)
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a width such as 64 or a fraction such as 0.0625 or 1/16"
        ) from None
