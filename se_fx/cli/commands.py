"""What each command does: from its arguments to what it prints, as JSON and as text."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sized
from typing import Any, cast

import torch
from torch import nn

import se_fx
from se_fx import Optimization, Plan, Report, SqueezeExciteError
from se_fx.arguments import as_device
from se_fx.criteria import CRITERIA
from se_fx.errors import blaming
from se_fx.loading import load_model, load_object

__all__ = ["COMMANDS", "OF_BLOCKS"]

#: Options of blocks that have the same name in Python.
OF_BLOCKS = ("latent_channels", "placement", "init", "bias", "activation", "gate", "block")
Outcome = tuple[Sized, Any, str]  # what was found, JSON, text


def _plan(arguments: argparse.Namespace) -> Outcome:
    chosen = _chosen(_model(arguments), arguments, costs=True)
    return chosen, chosen.to_dict(), str(chosen)


def _report(arguments: argparse.Namespace) -> Outcome:
    model = _model(arguments)
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
    return report.sites, result, text


def _suggest(arguments: argparse.Namespace) -> Outcome:
    suggestion = se_fx.suggest(_model(arguments), _inputs(arguments))
    return suggestion.plan, {"options": suggestion.options, "reasons": suggestion.reasons}, str(suggestion)


def _score(arguments: argparse.Namespace) -> Outcome:
    model = _model(arguments, weights=True)
    batches, loss = (load_object(getattr(arguments, each), f"--{each}") for each in ("batches", "loss"))
    if callable(batches):
        with blaming(f"--batches {arguments.batches!r}: calling it failed"):
            batches = batches()
    chosen, budget = _chosen(model, arguments, costs=arguments.input is not None, cut=False), dict(arguments.budget or ())
    if budget:
        chosen.within(**budget)  # raises before anything takes time
    scored = se_fx.score(model, chosen, batches, loss, saliency=arguments.saliency)
    kept = scored.within(**budget, by="score") if budget else scored
    return kept, {"scores": {site.name: site.score for site in scored.sites}, **kept.to_dict()}, str(kept)


def _transform(arguments: argparse.Namespace) -> Outcome:
    model = _model(arguments, weights=True)
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


def _optimize(arguments: argparse.Namespace) -> Outcome:
    for_export = arguments.onnx is not None or arguments.pt2 is not None
    if for_export and arguments.input is None:
        raise SqueezeExciteError("--onnx, --pt2: the shape of an input is needed, such as --input 1,3,224,224")
    target = arguments.target or ("export" if arguments.onnx is not None else None)
    fast = se_fx.optimize_for_inference(_model(arguments, weights=True).eval(), _inputs(arguments), target=target)
    done = cast("Optimization", se_fx.report(fast))
    text, result = str(done), done.to_dict()
    if for_export:
        for path in _exported(fast, arguments):
            text += f"\n\nWritten to {path}."
    return [change for step in done.steps for change in step.changes], result, text


def _exported(model: nn.Module, arguments: argparse.Namespace) -> list[str]:
    """Write what was asked for; the paths."""
    batch, *rest = arguments.input
    inputs = (torch.zeros(max(batch, 2) if arguments.dynamic_batch else batch, *rest),)
    shapes = ({0: torch.export.Dim("batch")},) if arguments.dynamic_batch else None
    with blaming("--pt2, --onnx: torch.export failed"):
        program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    if arguments.pt2 is not None:
        with open(arguments.pt2, "wb") as file:
            torch.export.save(program, file)
    if arguments.onnx is not None:
        with blaming("--onnx: it needs pip install 'se_fx[onnx]', or this model can't be written"):
            written = torch.onnx.export(program, dynamo=True, verbose=False)
        assert written is not None
        written.save(arguments.onnx)
    return [path for path in (arguments.pt2, arguments.onnx) if path is not None]


def _bench(arguments: argparse.Namespace) -> Outcome:
    device = as_device(arguments.device)
    model = _model(arguments, weights=True).to(device)
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


# --------------------------------------------------------------------------------------------------------- model and plan
def _model(arguments: argparse.Namespace, *, weights: bool = False) -> nn.Module:
    """The model, with what `--checkpoint` holds; without, and where no weights are wanted, a zoo's is on the meta device."""
    path = arguments.checkpoint
    model = load_model(arguments.model, meta=not weights and path is None, trust_pickle=arguments.trust_pickle)
    if path is not None:
        saved = _tensors(path)
        with blaming(f"--checkpoint {path}: does not fit {arguments.model}"):
            if isinstance(saved, dict) and saved.keys() == {"plan", "state_dict"}:  # as `transform --save` writes it
                model = se_fx.transform(model, Plan.from_dict(saved["plan"]))
            model.load_state_dict(saved.get("state_dict", saved))
    return model


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


def _chosen(model: nn.Module, arguments: argparse.Namespace, *, costs: bool = False, cut: bool = True) -> Plan:
    """The plan the arguments ask for; with costs only where these are wanted, or a budget needs them."""
    given = {name: getattr(arguments, name, None) for name in (*CRITERIA, *OF_BLOCKS)}
    options = {name: value for name, value in given.items() if value is not None}
    budget = dict(arguments.budget or ())
    chosen = se_fx.plan(model, example_inputs=_inputs(arguments) if costs or budget else None, **options)
    return chosen.within(**budget) if budget and cut else chosen


def _inputs(arguments: argparse.Namespace) -> torch.Tensor | None:
    return torch.empty(arguments.input, device="meta") if arguments.input else None


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], Outcome], str]] = {
    "report": (_report, "transform a model; show what was inserted, what it adds, and what was skipped and why"),
    "plan": (_plan, "show where blocks would go, or with --json the plan that transform() can replay"),
    "suggest": (_suggest, "recommended options for a model, with the reasons"),
    "score": (_score, "how much a loss on your data wants a gate at each place; with --budget, the best places for it"),
    "transform": (_transform, "transform a model and save its plan and its weights"),
    "optimize": (_optimize, "make attention cheap for inference, whoever wrote it; show what was done, and write ONNX or .pt2"),
    "bench": (_bench, "measure the latency of a model with and without blocks"),
}
