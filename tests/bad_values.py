"""Calls that are accepted, and values that they don't take, each with words of the message that says so."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from test_faults import X, network, optimizers_of
from torch import nn

import se_fx


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("on purpose")


class Together(dict[str, Any]):
    """Values of several arguments, for a row."""


class Uncopied(nn.Conv2d):
    def __deepcopy__(self, memo: object) -> Uncopied:
        raise RuntimeError("holds a file")


def other_spots(*found: Any) -> Callable[..., list[Any]]:
    """A policy that yields what are no spots of the graph it is given."""
    return lambda graph, root: [each(graph) if callable(each) else each for each in found]


MODEL = network()
OPTIMIZERS = optimizers_of(MODEL)
EVALUATED = network().eval()
REWRITTEN = se_fx.transform(MODEL, min_channels=1, latent_channels=2, seed=0)
FOREIGN = se_fx.transform(MODEL, min_channels=1, block=lambda channels: nn.Identity())
NARROW = se_fx.transform(nn.Sequential(nn.Conv2d(3, 4, 1)), min_channels=1, latent_channels=2)
PROFILE = se_fx.profile_gates(REWRITTEN, [X], progress=False)
PLAN = se_fx.plan(MODEL, min_channels=1, latent_channels=2, example_inputs=X)
REPORT = se_fx.report(REWRITTEN, X)
FROZEN, META = nn.Conv2d(3, 8, 1).requires_grad_(False), nn.Conv2d(3, 8, 1, device="meta")

#: Every public function and method that takes arguments, with some that it accepts.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "transform": (se_fx.transform, {"model": MODEL, "min_channels": 1}),
    "plan": (se_fx.plan, {"model": MODEL, "min_channels": 1}),
    "suggest": (se_fx.suggest, {"model": MODEL}),
    "apply_squeeze_excite": (se_fx.apply_squeeze_excite, {"model": MODEL, "min_channels": 1, "optimizers": OPTIMIZERS}),
    "report": (se_fx.report, {"rewritten": REWRITTEN}),
    "remove": (se_fx.remove, {"rewritten": REWRITTEN}),
    "blocks_of": (se_fx.blocks_of, {"rewritten": REWRITTEN}),
    "save_blocks": (se_fx.save_blocks, {"model": REWRITTEN, "path": "blocks.safetensors"}),
    "load_blocks": (se_fx.load_blocks, {"model": MODEL, "path": "blocks.safetensors"}),
    "bypassed": (lambda rewritten: se_fx.bypassed(rewritten).__enter__(), {"rewritten": copy.deepcopy(REWRITTEN)}),
    "profile_gates": (se_fx.profile_gates, {"rewritten": REWRITTEN, "batches": [X], "progress": False}),
    "score": (
        se_fx.score,
        {"model": MODEL, "plan": PLAN, "batches": [(X, X)], "loss": lambda out, target: out.square().mean(), "progress": False},
    ),
    "fold_gates": (se_fx.fold_gates, {"rewritten": REWRITTEN, "profile": PROFILE, "tolerance": 10, "progress": False}),
    "optimize_for_inference": (se_fx.optimize_for_inference, {"model": EVALUATED}),
    "optimize_for_training": (se_fx.optimize_for_training, {"model": MODEL}),
    "bench": (
        se_fx.bench,
        {"models": {"a": nn.Conv2d(3, 8, 1)}, "example_inputs": X, "rounds": 1, "min_seconds": 0, "progress": False},
    ),
    "measure_machine": (se_fx.measure_machine, {}),
    "SqueezeExcite2d": (se_fx.SqueezeExcite2d, {"num_features": 8}),
    "SqueezeExcite2d.set_extra_state": (se_fx.SqueezeExcite2d(8).set_extra_state, {}),
    "Site": (se_fx.Site, {"name": "0", "channels": 8, "latent_channels": 2}),
    "Plan": (se_fx.Plan, {}),
    "Plan.of": (se_fx.Plan.of, {}),
    "Plan.from_dict": (se_fx.Plan.from_dict, {}),
    "Plan.within": (PLAN.within, {}),
    "Plan.only": (PLAN.only, {}),
    "Plan.without": (PLAN.without, {}),
    "Report.to_html": (REPORT.to_html, {}),
    "Report.estimate": (REPORT.estimate, {}),
    "GateProfile.plot": (PROFILE.plot, {}),
    "Machine.seconds": (se_fx.Machine(1.0, 1.0, "cpu", "float32").seconds, {}),
}

NO_FLAGS = tuple((value, "expected True or False") for value in (None, 1, "yes", torch.ones(2), np.ones(2)))
NO_MODELS = (
    (None, "model=NoneType: expected an nn.Module"),
    ("resnet50", "model=str: expected an nn.Module"),
    ([MODEL], "model=list: expected an nn.Module"),
    (nn.ReLU, "model=type: expected an nn.Module; call it to make one"),
    (network, "model=function: expected an nn.Module; call it to make one"),
    (nn.Sequential(nn.LazyConv2d(8, 3)).eval(), "'0' has the uninitialised lazy parameter 'weight': run the model once"),
    (torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 1))).eval(), "model is TorchScript: transform the Python model"),
    (torch.compile(nn.Conv2d(3, 256, 1).eval()), "compiled already (OptimizedModule): transform the plain model first"),
    (nn.DataParallel(nn.Conv2d(3, 8, 1)).eval(), "wrapped for distribution already (DataParallel): transform the plain model"),
)
NO_INPUTS = (
    (3, "example_inputs=int: expected a tensor, a tuple"),
    ("x", "example_inputs=str"),
    (np.zeros(3), "example_inputs=ndarray"),
    ({1: X}, "example_inputs=dict: expected"),
    ((value for value in [X]), "example_inputs=generator"),
)
UNCALLABLE = (
    (X[:, :2], "the model could not be called with inputs (2, 2, 8, 8): RuntimeError"),
    (X[0, 0, 0], "the model could not be called with inputs (8,)"),
    (X.long(), "the model could not be called with inputs (2, 3, 8, 8)"),
    ({"image": X}, "the model could not be called with inputs (2, 3, 8, 8): TypeError"),
    ((X, X), "the model could not be called with inputs (2, 3, 8, 8), (2, 3, 8, 8)"),
    ((), "the model could not be called with no inputs"),
    ((None,), "the model could not be called with inputs NoneType"),
    (([X],), "the model could not be called with inputs list"),
)
NO_WIDTHS = tuple(
    (value, "expected a hidden width (an integer >= 1, such as 64) or a fraction")
    for value in (0, -3, 1.5, True, "64", None, math.nan, math.inf, [64], torch.ones(2), nn.ReLU, np.ones(2))
)
TOO_WIDE = ((10**30, "of at most"), (1e300, "of at most"), (2**20 * 4 + 1, "of at most"))
NO_FUNCTIONS = tuple(
    (value, "or a callable on tensors (an instance, not a class)") for value in ("swish", "", "a\nb", 3, None, nn.ReLU, [])
)
NO_DEVICES = (
    ("gpu", "expected"),
    ("", "expected"),
    (3.5, "expected"),
    (10**30, "expected"),
    ([], "expected"),
    ("cuda:99", "expected"),
)
NO_DTYPES = tuple(
    (value, "floating-point dtype such as torch.bfloat16") for value in (torch.int8, "float32", 3, torch.complex64)
)
NO_BUDGETS = tuple(
    (value, "an integer >= 0, or a fraction in (0, 1) of the model's own")
    for value in (-1, 1.5, True, "1%", math.nan, math.inf, [1], nn.ReLU)
)
NO_PATHS = tuple((value, "expected the path of a file") for value in (None, 3, "", b"x", [], Path))
NOT_REWRITTEN = (
    (None, "expected a model that se_fx has rewritten, and got NoneType; call se_fx.transform first"),
    (MODEL, "and got Sequential; call se_fx.transform first"),
    (type(MODEL), "and got type"),
    (nn.DataParallel(REWRITTEN), "and got DataParallel; pass its .module"),
    (se_fx.Plan(()), "and got Plan"),
)
