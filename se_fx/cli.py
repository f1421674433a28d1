"""The command line: `se-fx report MODEL`. Built on the public names alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

import se_fx
from se_fx import Plan, Report, SqueezeExciteError
from se_fx.arguments import as_device
from se_fx.blocks import BLOCKS
from se_fx.criteria import CRITERIA
from se_fx.errors import blaming
from se_fx.loading import load_model
from se_fx.placement import PLACEMENTS

__all__ = ["main"]

_EXAMPLES = """\
examples:
  se-fx report resnet50 --min-channels 512 --input 1,3,224,224
  se-fx report resnet50 --placement residual --latent-channels 1/16 --min-channels 1 --input 1,3,224,224 --html report.html
  se-fx plan timm:efficientnet_lite0 --where 'blocks.*' --latent-channels 0.25
  se-fx plan resnet50 --placement residual --min-channels 1 --input 1,3,224,224 --budget flops=0.1% --budget params=2%
  se-fx suggest mobilenet_v2
  se-fx bench resnet50 --placement residual --min-channels 1 --input 1,3,224,224 --batch-sizes 1 8 --compiled
  se-fx transform my_package.models:build --checkpoint plain.pt --init identity --save se.pt

MODEL is the name of a torchvision model, timm:NAME, or package.module:callable, the callable taking no arguments and
returning an nn.Module (or being one). Zoo models are built without pretrained weights; nothing is downloaded.

exit status: 0 done; 1 done, and there is no block: none wanted, or none fits the budget; 2 bad input.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        chosen, result, text = _COMMANDS[arguments.command][0](arguments)
    except (SqueezeExciteError, OSError) as error:
        print(f"se-fx: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2) if arguments.json else text)
    return 0 if len(chosen) else 1


# ------------------------------------------------------------------------------------------------------------- commands
Outcome = tuple[Plan, Any, str]  # the plan, JSON, text


def _plan(arguments: argparse.Namespace) -> Outcome:
    chosen = _chosen(load_model(arguments.model), arguments, costs=True)
    return chosen, chosen.to_dict(), str(chosen)


def _report(arguments: argparse.Namespace) -> Outcome:
    model = load_model(arguments.model)
    report = cast("Report", se_fx.report(se_fx.transform(model, _chosen(model, arguments)), _inputs(arguments)))
    result, text = report.to_dict(), str(report)
    if arguments.roofline and not report.measured:
        raise SqueezeExciteError("--roofline: costs are needed; give the shape of an input, such as --input 1,3,224,224")
    if arguments.roofline:
        estimate = report.estimate(se_fx.measure_machine())
        result["roofline"] = {"base_seconds": estimate.base, "added_seconds": estimate.added}
        text += f"\n\n{estimate}"
    if arguments.html is not None:
        report.to_html(arguments.html)
        text += f"\n\nWritten to {arguments.html}."
    return Plan(report.sites), result, text


def _suggest(arguments: argparse.Namespace) -> Outcome:
    suggestion = se_fx.suggest(load_model(arguments.model), _inputs(arguments))
    return suggestion.plan, {"options": suggestion.options, "reasons": suggestion.reasons}, str(suggestion)


def _transform(arguments: argparse.Namespace) -> Outcome:
    model = load_model(arguments.model, meta=False)
    if arguments.checkpoint is not None:
        saved = _tensors(arguments.checkpoint)
        with blaming(f"--checkpoint {arguments.checkpoint}: does not fit {arguments.model}"):
            model.load_state_dict(saved.get("state_dict", saved))
    rewritten = se_fx.transform(model, _chosen(model, arguments), seed=arguments.seed)
    chosen = Plan.of(rewritten)
    with open(arguments.save, "wb") as file:
        torch.save({"plan": chosen.to_dict(), "state_dict": rewritten.state_dict()}, file)
    text = (
        f"{chosen}\n\nWritten to {arguments.save}. To read it back:\n\n"
        f"    saved = torch.load({str(arguments.save)!r}, weights_only=True)\n"
        '    gm = se_fx.transform(model, se_fx.Plan.from_dict(saved["plan"]))\n'
        '    gm.load_state_dict(saved["state_dict"])'
    )
    return chosen, {"saved": str(arguments.save), **chosen.to_dict()}, text


def _tensors(path: str) -> Any:
    """What a checkpoint holds; no code of it is run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise SqueezeExciteError(
            f"--checkpoint {path}: expected a state_dict that torch.save has written: pickled models, which are code, are "
            f"never loaded; save model.state_dict() ({type(error).__name__})"
        ) from error


def _bench(arguments: argparse.Namespace) -> Outcome:
    device = as_device(arguments.device)
    model = load_model(arguments.model, meta=False).to(device)
    rewritten = se_fx.transform(model, _chosen(model, arguments))
    with blaming("--input: no tensor of this shape can be made"):
        inputs = torch.zeros(arguments.input or (1, 3, 224, 224), device=device)
    result = se_fx.bench(
        rewritten,
        inputs,
        batch_sizes=arguments.batch_sizes,
        compiled="both" if arguments.compiled else False,
        training=arguments.training,
        channels_last=arguments.channels_last,
        autocast=torch.bfloat16 if arguments.bf16 else None,
        rounds=arguments.rounds,
    )
    return Plan.of(rewritten), result.to_dict(), str(result)


def _chosen(model: nn.Module, arguments: argparse.Namespace, *, costs: bool = False) -> Plan:
    """The plan the arguments ask for; with costs only where these are wanted, or a budget needs them."""
    given = {name: getattr(arguments, name, None) for name in (*CRITERIA, *_OF_BLOCKS)}
    options = {name: value for name, value in given.items() if value is not None}
    budget = dict(arguments.budget or ())
    chosen = se_fx.plan(model, example_inputs=_inputs(arguments) if costs or budget else None, **options)
    return chosen.within(**budget) if budget else chosen


def _inputs(arguments: argparse.Namespace) -> torch.Tensor | None:
    return torch.empty(arguments.input, device="meta") if arguments.input else None


_COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], Outcome], str]] = {
    "report": (_report, "transform a model; show what was inserted, what it adds, and what was skipped and why"),
    "plan": (_plan, "show where blocks would go, or with --json the plan that transform() can replay"),
    "suggest": (_suggest, "recommended options for a model, with the reasons"),
    "transform": (_transform, "transform a model and save its plan and its weights"),
    "bench": (_bench, "measure the latency of a model with and without blocks"),
}


# ------------------------------------------------------------------------------------------------------------- arguments
_OF_BLOCKS = ("latent_channels", "placement", "init", "bias", "activation", "gate", "block")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="se-fx",
        description="Squeeze-and-Excitation blocks for any PyTorch CNN: where they go and what they cost.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"se_fx {se_fx.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, does) in _COMMANDS.items():
        command = commands.add_parser(
            name, help=does, description=does, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("model", metavar="MODEL", help="torchvision name, timm:NAME, or package.module:callable")
        command.add_argument(
            "--input",
            type=_shape,
            metavar="N,C,H,W",
            help="shape of an example input, to count MACs, FLOPs and bytes; none is computed",
        )
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
        if name != "suggest":
            _add_options(command)
    _add_outputs(commands.choices)
    return parser


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
    commands["transform"].add_argument("--checkpoint", metavar="FILE", help="a state_dict to load into the model first")
    commands["transform"].add_argument("--seed", type=int, metavar="N", help="draw the blocks' weights from this seed")
    commands["transform"].add_argument("--save", metavar="FILE", required=True, help="where plan and state_dict go")
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
