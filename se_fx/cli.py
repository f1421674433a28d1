"""The command line: `se-fx report MODEL`. Built on the public names alone."""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import se_fx
from se_fx import SqueezeExciteError

__all__ = ["main"]

_EXAMPLES = """\
examples:
  se-fx report resnet50 --min-channels 512 --input 1,3,224,224
  se-fx plan timm:efficientnet_lite0 --where 'blocks.*' --latent-channels 0.25
  se-fx report my_package.models:build --input 1,3,32,32 --json

MODEL is the name of a torchvision model, timm:NAME, or package.module:callable, the callable taking no arguments and
returning an nn.Module (or being one). Models are built without weights. Nothing is trained, saved or downloaded.

exit status: 0 done, 2 bad input.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    options = {name: getattr(arguments, name) for name in _OPTIONS if getattr(arguments, name) is not None}
    try:
        model = load_model(arguments.model)
        inputs = torch.empty(arguments.input, device="meta") if arguments.input else None
        if arguments.command == "plan":
            chosen = se_fx.plan(model, example_inputs=inputs, **options)
            result, text = chosen.to_dict(), str(chosen)
        else:
            report = se_fx.report(se_fx.transform(model, **options), inputs)
            result, text = report.to_dict(), str(report)
    except SqueezeExciteError as error:
        print(f"se-fx: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2) if arguments.json else text)
    return 0


def load_model(spec: str) -> nn.Module:
    """The model that `spec` names; zoo models on the meta device, which takes no memory.

    Raises:
        SqueezeExciteError: there is none, or the package that has it is not installed.
    """
    source, _, name = spec.rpartition(":")
    if source == "timm":
        timm = _import("timm", spec)
        return _from_zoo(name, timm.list_models(), lambda: timm.create_model(name, pretrained=False))
    if source:
        return _from_module(source, name, spec)
    models = _import("torchvision", spec).models
    weights = {"weights": None}
    if (
        "weights_backbone" in getattr(models.get_model_builder(name), "__annotations__", {})
        if name in models.list_models()
        else False
    ):
        weights["weights_backbone"] = None
    return _from_zoo(name, models.list_models(), lambda: models.get_model(name, **weights))


def _import(package: str, spec: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise SqueezeExciteError(f"MODEL {spec!r}: {package} can't be imported ({error}); pip install {package}") from error


def _from_zoo(name: str, known: Sequence[str], build: Any) -> nn.Module:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = (
            f"did you mean {' or '.join(close)}?"
            if close
            else "expected a torchvision model, timm:NAME or package.module:callable"
        )
        raise SqueezeExciteError(f"MODEL {name!r}: there is no such model; {hint}")
    try:
        with torch.device("meta"):
            model: nn.Module = build()
    except (RuntimeError, NotImplementedError):  # some read values while they build themselves
        model = build()
    return model


def _from_module(source: str, name: str, spec: str) -> nn.Module:
    sys.path.insert(0, "")
    try:
        module = importlib.import_module(source)
    except ImportError as error:
        raise SqueezeExciteError(f"MODEL {spec!r}: can't import {source!r}: {error}") from error
    finally:
        sys.path.remove("")
    factory = getattr(module, name, None)
    if factory is None:
        raise SqueezeExciteError(f"MODEL {spec!r}: {source} has no {name!r}")
    try:
        model = factory if isinstance(factory, nn.Module) else factory()
    except Exception as error:
        raise SqueezeExciteError(f"MODEL {spec!r}: calling it failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise SqueezeExciteError(f"MODEL {spec!r}: expected it to return an nn.Module, and got {type(model).__name__}")
    return model


_OPTIONS = ("min_channels", "latent_channels", "placement", "init", "bias", "activation", "gate", "where")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="se-fx",
        description="Squeeze-and-Excitation blocks for any PyTorch CNN: where they go and what they cost.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"se_fx {se_fx.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, does in (
        ("report", "transform a model; show what was inserted, what it adds, and what was skipped and why"),
        ("plan", "show where blocks would go, or with --json the plan that transform() can replay"),
    ):
        _add_arguments(
            commands.add_parser(
                name, help=does, description=does, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
            )
        )
    return parser


def _add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="torchvision name, timm:NAME, or package.module:callable")
    command.add_argument(
        "--input",
        type=_shape,
        metavar="N,C,H,W",
        help="shape of an example input, to count MACs, FLOPs and bytes; none is computed",
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = command.add_argument_group("where blocks go, and of what kind")
    options.add_argument(
        "--min-channels", type=_int_or_auto, metavar="N", help='least output channels of a conv, or "auto" (default: 128)'
    )
    options.add_argument(
        "--latent-channels", type=_number, metavar="X", help="hidden width, or a fraction of the channels (default: 64)"
    )
    options.add_argument("--placement", help="where a block goes: conv, norm, residual, pre, post or identity (default: conv)")
    options.add_argument("--where", action="append", metavar="GLOB", help="only convs named so; '!GLOB' excludes; repeatable")
    options.add_argument("--init", help="default or identity (default: default)")
    options.add_argument("--bias", action="store_true", default=None, help="biases in the blocks' linear layers")
    options.add_argument("--activation", help="relu, silu or gelu (default: relu)")
    options.add_argument("--gate", help="sigmoid or hardsigmoid (default: sigmoid)")


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a shape such as 1,3,224,224")
    return shape


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


def _int_or_auto(text: str) -> int | str:
    if text != "auto" and not text.lstrip("-").isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer or auto")
    return text if text == "auto" else int(text)
