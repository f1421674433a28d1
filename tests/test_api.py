"""The public interface, pinned: a change of it shows here, as a line. `python tests/test_api.py` prints what it is now."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import se_fx
import se_fx.cli
from se_fx.criteria import CRITERIA
from se_fx.planning import Options

ROOT = Path(__file__).parents[1]

EXPECTED = """\
Benchmark: rows: tuple[Row, ...], baseline: str, training: bool, freezing: bool, channels_last: bool, dtype: str,
        autocast: str | None, rounds: int, device: str, machine: str
    Benchmark.to_dict() -> dict[str, Any]
Cost: params: int = 0, macs: int = 0, flops: int = 0, bytes: int = 0
    Cost.__add__(other: Cost) -> Cost
    Cost.__sub__(other: Cost) -> Cost
    Cost.astuple() -> tuple[int, int, int, int]
Folding: model: nn.Module, tolerance: float, folded: tuple[FoldedSite, ...], kept: tuple[KeptSite, ...], changes:
        Changes | None = None
    Folding.saved -> Cost
    Folding.to_dict() -> dict[str, Any]
GateProfile: sites: tuple[SiteGates, ...]
    GateProfile.to_dict() -> dict[str, Any]
    GateProfile.plot(path: str | os.PathLike[str])
Machine: flops_per_second: float, bytes_per_second: float, device: str, dtype: str
    Machine.seconds(operators: Iterable[Operator]) -> float
Optimization: model: str, steps: tuple[Step, ...], before: Cost | None = None, opaque: tuple[tuple[str, str], ...] = (),
        purpose: str = 'inference', kept: int | None = None
    Optimization.count() -> int
    Optimization.to_dict() -> dict[str, Any]
Plan: sites: tuple[Site, ...], skipped: tuple[Skip, ...] = (), opaque: tuple[tuple[str, str], ...] = (), alone:
        tuple[str, ...] = (), base: Cost = Cost(params=0, macs=0, flops=0, bytes=0), measured: bool = False, callables:
        Callables = {}
    Plan.__len__() -> int
    Plan.of(rewritten: Any) -> Plan
    Plan.added -> Cost
    Plan.within(*, flops: float | None = None, params: float | None = None, bytes: float | None = None, by: str | None =
        None) -> Plan
    Plan.only(*patterns: str) -> Plan
    Plan.without(*patterns: str) -> Plan
    Plan.__or__(other: Plan) -> Plan
    Plan.__sub__(other: Plan) -> Plan
    Plan.to_dict() -> dict[str, Any]
    Plan.from_dict(data: Mapping[str, Any]) -> Plan
Report: model: str, sites: tuple[Site, ...], skipped: tuple[Skip, ...], base: Cost, added: Cost, measured: bool = False,
        opaque: tuple[tuple[str, str], ...] = (), alone: tuple[str, ...] = (), regions: tuple[str, ...] = (), uncounted:
        tuple[tuple[str, int], ...] = (), activation_bytes: tuple[int, int] | None = None, activation_bytes_optimized:
        int | None = None, excerpt: tuple[Part, ...] = (), operators: tuple[Operator, ...] = ()
    Report.to_dict() -> dict[str, Any]
    Report.to_html(path: str | os.PathLike[str])
    Report.estimate(machine: Machine) -> Estimate
    Report.skipped_by_reason() -> dict[str, list[Skip]]
    Report.table() -> str
Site: name: str, channels: int, latent_channels: int | None, placement: str = 'conv', init: str = 'default', bias: bool
        = False, activation: str = 'relu', gate: str = 'sigmoid', block: str | None = None, spatial: tuple[int, int] |
        None = None, cost: Cost = Cost(params=0, macs=0, flops=0, bytes=0), score: float | None = None
SiteGates: name: str, samples: int, channel_means: Tensor, channel_spreads: Tensor, class_means: Mapping[int, Tensor] =
        {}
    SiteGates.mean -> float
    SiteGates.spread_over_samples -> float
    SiteGates.spread_over_channels -> float
    SiteGates.spread_over_classes -> float | None
SqueezeExcite2d(num_features: int, latent_channels: float = 0.125, *, bias: bool = False, activation: str |
        Callable[[Tensor], Tensor] = 'relu', gate: str | Callable[[Tensor], Tensor] = 'sigmoid', init: str = 'default',
        device: torch.device | str | None = None, dtype: torch.dtype | None = None): Module
    SqueezeExcite2d.excitation(x: Tensor) -> Tensor
    SqueezeExcite2d.forward(x: Tensor) -> Tensor
    SqueezeExcite2d.get_extra_state() -> Tensor
    SqueezeExcite2d.set_extra_state(state: Any)
    SqueezeExcite2d.extra_repr() -> str
SqueezeExciteError: ValueError
Suggestion: options: dict[str, Any], reasons: tuple[str, ...], plan: Plan
apply_squeeze_excite(model: nn.Module, latent_channels: float = 64, min_channels: int | str = 128, optimizers: Optimizer
        | Iterable[Optimizer] | None = None, *, plan: Plan | None = None, placement: str | Policy = 'conv', init: str =
        'default', bias: bool = False, activation: str | Function = 'relu', gate: str | Function = 'sigmoid', block: str
        | BlockFactory | None = None, where: Where = None, stages: Stages = None, necks: bool | None = None, overrides:
        Overrides = None, seed: int | None = None, **criteria: Any)
bench(models: Mapping[str, nn.Module] | nn.Module, example_inputs: Any = None, *, batch_sizes: Sequence[int] = (1,),
        compiled: bool | str = False, backend: str | Mapping[str, str] = 'inductor', freezing: bool = False, training:
        bool = False, channels_last: bool = False, dtype: torch.dtype | None = None, autocast: torch.dtype | None =
        None, device: torch.device | str | None = None, rounds: int = 15, min_seconds: float = 0.05, progress: bool =
        True) -> Benchmark
blocks_of(rewritten: nn.Module) -> dict[str, nn.Module]
bypassed(rewritten: nn.Module) -> Iterator[None]
fold_gates(rewritten: nn.Module, profile: GateProfile, tolerance: float = 0.02, *, held_out: Iterable[Any] | None =
        None, progress: bool = True) -> Folding
load_blocks(model: nn.Module, path: str | os.PathLike[str])
measure_machine(device: torch.device | str = 'cpu', dtype: torch.dtype = torch.float32) -> Machine
optimize_for_inference(model: nn.Module, example_inputs: Any = None, *, rewrites: Iterable[str] | None = None, target:
        str | None = None) -> nn.Module
optimize_for_training(model: nn.Module, example_inputs: Any = None, *, exact: bool = True, rewrites: Iterable[str] |
        None = None) -> nn.Module
plan(model: nn.Module, *, example_inputs: Any = None, min_channels: int | str = 128, latent_channels: float = 64,
        placement: str | Policy = 'conv', init: str = 'default', bias: bool = False, activation: str | Function =
        'relu', gate: str | Function = 'sigmoid', block: str | BlockFactory | None = None, where: Where = None, stages:
        Stages = None, necks: bool | None = None, overrides: Overrides = None, **criteria: Any) -> Plan
profile_gates(rewritten: nn.Module, batches: Iterable[Any], *, progress: bool = True) -> GateProfile
remove(rewritten: nn.Module) -> nn.Module
report(rewritten: nn.Module, example_inputs: Any = None) -> Report | Optimization
save_blocks(model: nn.Module, path: str | os.PathLike[str])
score(model: nn.Module, plan: Plan, batches: Iterable[Any], loss: Callable[[Any, Any], Tensor], *, saliency: str =
        'first_order', progress: bool = True) -> Plan
suggest(model: nn.Module, example_inputs: Any = None) -> Suggestion
transform(model: nn.Module, plan: Plan | None = None, *, example_inputs: Any = None, min_channels: int | str = 128,
        latent_channels: float = 64, placement: str | Policy = 'conv', init: str = 'default', bias: bool = False,
        activation: str | Function = 'relu', gate: str | Function = 'sigmoid', block: str | BlockFactory | None = None,
        where: Where = None, stages: Stages = None, necks: bool | None = None, overrides: Overrides = None, seed: int |
        None = None, **criteria: Any) -> nn.Module
options: min_channels = 128, where = None, stages = None, necks = None, latent_channels = 64, placement = 'conv', init =
        'default', bias = False, activation = 'relu', gate = 'sigmoid', block = None, overrides = None
se_fx.integrations.composer: SqueezeExcite
    FxSqueezeExcite: Algorithm
        FxSqueezeExcite.__init__(self, latent_channels: float=64, min_channels: int | str=128)
        FxSqueezeExcite.required_on_load()
        FxSqueezeExcite.match(self, event: Event, state: State)
        FxSqueezeExcite.apply(self, event: Event, state: State, logger: Logger)
        FxSqueezeExcite.load_state_dict(self, state: dict[str, Any])
se_fx.integrations.lightning: SqueezeExcite
    SqueezeExcite: Callback
        SqueezeExcite.__init__(self, *, recompute: bool=False, **options: Any)
        SqueezeExcite.rewrite(self, module: LightningModule)
        SqueezeExcite.restore(module: LightningModule, checkpoint: Mapping[str, Any])
        SqueezeExcite.setup(self, trainer: Trainer, pl_module: LightningModule, stage: str)
        SqueezeExcite.state_dict(self)
        SqueezeExcite.load_state_dict(self, state_dict: dict[str, Any])
        SqueezeExcite.on_train_start(self, trainer: Trainer, pl_module: LightningModule)
        SqueezeExcite.on_after_backward(self, trainer: Trainer, pl_module: LightningModule)
        SqueezeExcite.on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule)
se-fx report MODEL [--input N,C,H,W] [--json] [--checkpoint FILE] [--trust-pickle] [--min-channels N] [--where GLOB]
        [--stages STAGE] [--necks/--no-necks] [--latent-channels X] [--placement PLACEMENT] [--budget KIND=X] [--block
        BLOCK] [--init INIT] [--bias] [--activation ACTIVATION] [--gate GATE] [--html FILE] [--roofline]
se-fx plan MODEL [--input N,C,H,W] [--json] [--checkpoint FILE] [--trust-pickle] [--min-channels N] [--where GLOB]
        [--stages STAGE] [--necks/--no-necks] [--latent-channels X] [--placement PLACEMENT] [--budget KIND=X] [--block
        BLOCK] [--init INIT] [--bias] [--activation ACTIVATION] [--gate GATE]
se-fx suggest MODEL [--input N,C,H,W] [--json] [--checkpoint FILE] [--trust-pickle]
se-fx score MODEL [--input N,C,H,W] [--json] [--checkpoint FILE] [--trust-pickle] [--min-channels N] [--where GLOB]
        [--stages STAGE] [--necks/--no-necks] [--latent-channels X] [--placement PLACEMENT] [--budget KIND=X] [--block
        BLOCK] [--init INIT] [--bias] [--activation ACTIVATION] [--gate GATE] --batches SPEC [--loss SPEC =
        torch.nn.functional:cross_entropy] [--saliency SALIENCY = first_order]
se-fx transform MODEL [--input N,C,H,W] [--json] [--checkpoint FILE] [--trust-pickle] [--min-channels N] [--where GLOB]
        [--stages STAGE] [--necks/--no-necks] [--latent-channels X] [--placement PLACEMENT] [--budget KIND=X] [--block
        BLOCK] [--init INIT] [--bias] [--activation ACTIVATION] [--gate GATE] [--seed N] --save FILE
se-fx optimize MODEL [--input N,C,H,W] [--json] [--checkpoint FILE] [--trust-pickle] [--target TARGET] [--onnx FILE]
        [--pt2 FILE] [--dynamic-batch]
se-fx bench MODEL [--input N,C,H,W] [--json] [--checkpoint FILE] [--trust-pickle] [--min-channels N] [--where GLOB]
        [--stages STAGE] [--necks/--no-necks] [--latent-channels X] [--placement PLACEMENT] [--budget KIND=X] [--block
        BLOCK] [--init INIT] [--bias] [--activation ACTIVATION] [--gate GATE] [--batch-sizes N = [1]] [--compiled]
        [--training] [--channels-last] [--bf16] [--device DEVICE = cpu] [--rounds N = 15]
plan: {"version": 1, "sites": [{"name": "0", "channels": 8, "latent_channels": 2, "placement": "conv", "init":
        "default", "bias": false, "activation": "relu", "gate": "sigmoid", "block": null}]}
state_dict: _extra_state, fc1.weight, fc1.bias, fc2.weight, fc2.bias
state_dict of a rewritten model: squeeze_excite.of_0._extra_state, squeeze_excite.of_0.fc1.weight,
        squeeze_excite.of_0.fc2.weight, 0.weight, 0.bias
requires-python: ">=3.10"
dependencies: ["torch>=2.6", "networkx>=3.0", "tabulate>=0.9"]
extras: torchvision, timm, html, examples, lightning, safetensors, onnx, exporters, ultralytics, transformers, smp,
        peft, recipes, strangers, test, docs, dev
scripts: se-fx = "se_fx.cli:main"
"""


# --------------------------------------------------------------------------------------------------------------- what is
def api() -> str:
    """Every public name, parameter, field, command, option and format."""
    parts = [*_names(), *_options(), *_integrations(), *_commands(), *_formats(), *_environment()]
    return "".join(textwrap.fill(part, 120, subsequent_indent="        ", break_on_hyphens=False) + "\n" for part in parts)


def _names() -> Iterator[str]:
    for name in se_fx.__all__:
        found = getattr(se_fx, name)
        if not inspect.isclass(found):
            yield f"{name}{_signature(found)}"
            continue
        if dataclasses.is_dataclass(found):
            yield f"{name}: " + ", ".join(
                _parameter(field.name, field.type, _default(field)) for field in dataclasses.fields(found)
            )
        elif issubclass(found, Exception):
            yield f"{name}: {found.__base__.__name__}"
        else:
            yield f"{name}{_signature(found)}: {found.__base__.__name__}"
        for method, value in vars(found).items():
            if isinstance(value, property) and not method.startswith("_"):
                yield f"    {name}.{method}{_signature(value.fget).removeprefix('()')}"
            elif callable(getattr(found, method)) and (not method.startswith("_") or method in OPERATORS):
                yield f"    {name}.{method}{_signature(getattr(found, method))}"


OPERATORS = ("__len__", "__or__", "__sub__", "__add__")


def _signature(function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    parameters = [each for each in signature.parameters.values() if each.name != "self"]
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    words = [_parameter(stars.get(each.kind, "") + each.name, each.annotation, each.default) for each in parameters]
    first = next((i for i, each in enumerate(parameters) if each.kind is each.KEYWORD_ONLY), None)
    if first is not None:
        words.insert(first, "*")
    returns = signature.return_annotation
    return f"({', '.join(words)})" + ("" if returns in (None, "None", signature.empty) else f" -> {returns}")


def _parameter(name: str, annotation: Any, default: Any) -> str:
    return f"{name}: {annotation}" + ("" if default is inspect.Parameter.empty else f" = {default!r}")


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory
    value = field.default if made is dataclasses.MISSING else made()
    return inspect.Parameter.empty if value is dataclasses.MISSING else value


def _options() -> Iterator[str]:
    """The options of `transform` and `plan`, wherever their signatures have them."""
    known = {name: criterion.default for name, criterion in CRITERIA.items()}
    known |= {field.name: field.default for field in dataclasses.fields(Options) if field.name != "criteria"}
    yield "options: " + ", ".join(f"{name} = {default!r}" for name, default in known.items())


def _integrations() -> Iterator[str]:
    """Read, not imported: the trainers need not be installed."""
    for path in sorted((ROOT / "se_fx/integrations").glob("[a-z]*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        public = next(ast.literal_eval(node.value) for node in tree.body if _assigns(node, "__all__"))
        yield f"se_fx.integrations.{path.stem}: {', '.join(public)}"
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield f"    {node.name}: {', '.join(map(ast.unparse, node.bases))}"
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and (method.name == "__init__" or not method.name.startswith("_")):
                        yield f"        {node.name}.{method.name}({ast.unparse(method.args)})"


def _assigns(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name


def _commands() -> Iterator[str]:
    (commands,) = (action for action in se_fx.cli.parser()._actions if isinstance(action, argparse._SubParsersAction))
    for command, parser in commands.choices.items():
        yield f"se-fx {command} " + " ".join(map(_argument, parser._actions[1:]))  # the first is --help


def _argument(action: argparse.Action) -> str:
    words = ["/".join(name for name in action.option_strings if name.startswith("--"))] if action.option_strings else []
    words += [] if action.nargs == 0 else [action.metavar or action.dest.upper()] if words else [str(action.metavar)]
    words += [] if action.default in (None, False) else [f"= {action.default}"]
    return " ".join(words) if action.required else f"[{' '.join(words)}]"


def _formats() -> Iterator[str]:
    """What is saved: a plan, and the keys of a block."""
    plan = se_fx.Plan((se_fx.Site("0", 8, 2),)).to_dict()
    yield f"plan: {json.dumps(plan)}"
    yield f"state_dict: {', '.join(se_fx.SqueezeExcite2d(8, bias=True).state_dict())}"
    rewritten = se_fx.transform(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1)), min_channels=1)
    yield f"state_dict of a rewritten model: {', '.join(rewritten.state_dict())}"


def _environment() -> Iterator[str]:
    """What it needs and offers, of `pyproject.toml`."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    for key in ("requires-python", "dependencies"):
        (value,) = re.findall(rf"^{key} = (.*)$", text, re.MULTILINE)
        yield f"{key}: {value}"
    extras = text.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    yield "extras: " + ", ".join(re.findall(r"^(\w+) = ", extras, re.MULTILINE))
    yield "scripts: " + text.split("[project.scripts]\n")[1].split("\n\n")[0]


def test_the_interface_is_this() -> None:
    assert api().splitlines() == EXPECTED.splitlines()


def test_all_that_can_be_reached_is_in_the_reference() -> None:
    """The classes of se_fx that public functions take and return, that are in their fields, and so on."""
    page = (ROOT / "docs/reference.md").read_text("utf-8")
    documented = {name.rpartition(".")[2] for name in re.findall(r"^\.\. auto\w+:: (\S+)$", page, re.MULTILINE)}
    reached = {thing.__name__ for thing in _reached([getattr(se_fx, name) for name in se_fx.__all__])}
    assert len(reached) > len(se_fx.__all__)
    assert reached <= documented


def _reached(found: list[Any]) -> Iterator[Any]:
    seen: list[Any] = []
    while found:
        thing = found.pop()
        if thing in seen:
            continue
        seen.append(thing)
        yield thing
        values = [value for name, value in vars(thing).items() if name[0] != "_"] if inspect.isclass(thing) else [thing]
        functions = [getattr(each, "fget", None) or getattr(each, "__func__", each) for each in values]
        hinted = [each for each in (*functions, thing) if inspect.isfunction(each) or dataclasses.is_dataclass(each)]
        for hint in (hint for each in hinted for hint in typing.get_type_hints(each).values()):
            found += [part for part in _parts(hint) if part.__module__.startswith("se_fx")]


def _parts(hint: Any) -> Iterator[Any]:
    if inspect.isclass(hint) and not typing.get_args(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from _parts(part) if not isinstance(part, list) else (inner for each in part for inner in _parts(each))


if __name__ == "__main__":
    print(api(), end="")
