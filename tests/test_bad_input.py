"""Bad input, to every public function, method and command: one clear error that names the argument, and nothing has changed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_values import (
    CALLS,
    FOREIGN,
    FROZEN,
    META,
    MODEL,
    NARROW,
    NO_BUDGETS,
    NO_DEVICES,
    NO_DTYPES,
    NO_FLAGS,
    NO_FUNCTIONS,
    NO_INPUTS,
    NO_MODELS,
    NO_PATHS,
    NO_WIDTHS,
    NOT_REWRITTEN,
    OPTIMIZERS,
    PLAN,
    PROFILE,
    REWRITTEN,
    TOO_WIDE,
    UNCALLABLE,
    Together,
    Uncopied,
    fails,
    other_spots,
)
from test_faults import X, difference, world
from torch import nn
from torch.fx import symbolic_trace

import se_fx
from se_fx.placement import Spot

TRANSFORMS = ("transform", "plan")
CHOOSING = (*TRANSFORMS, "apply_squeeze_excite")
REPLAYING = ("transform", "apply_squeeze_excite")
OF_MODELS = (*TRANSFORMS, "suggest", "apply_squeeze_excite", "optimize_for_inference", "optimize_for_training")
OF_REWRITTEN = ("report", "remove", "blocks_of", "bypassed", "profile_gates", "fold_gates", "Plan.of")

Row = tuple[str, str, Any, str]  # function, argument, value, what the message says


def rows(functions: str | Iterable[str], argument: str, *pairs: tuple[Any, str]) -> list[Row]:
    names = [functions] if isinstance(functions, str) else functions
    return [(name, argument, value, words) for name in names for value, words in pairs]


ROWS: list[Row] = [
    # models and their inputs
    *rows(OF_MODELS, "model", *NO_MODELS),
    *rows(("transform", "plan", "suggest", "apply_squeeze_excite"), "model", (nn.Linear(2, 2), "Linear has no nn.Conv2d")),
    *rows("optimize_for_inference", "model", (MODEL, "training mode: call model.eval()")),
    *rows(
        (*TRANSFORMS, "suggest", "report", "optimize_for_inference", "optimize_for_training"),
        "example_inputs",
        *NO_INPUTS,
        UNCALLABLE[0],
    ),
    *rows("report", "example_inputs", *UNCALLABLE[1:]),
    *rows(OF_REWRITTEN, "rewritten", *NOT_REWRITTEN),
    *rows("save_blocks", "model", *NOT_REWRITTEN, (FOREIGN, "must be added to se_fx.blocks.BLOCKS first")),
    *rows("load_blocks", "model", *NO_MODELS, NOT_REWRITTEN[3]),
    # options of transform and plan
    *rows(
        CHOOSING,
        "min_channels",
        *(
            (value, "expected the least number of output channels")
            for value in (0, -1, 1.5, True, "many", "", None, math.nan, [])
        ),
    ),
    *rows((*CHOOSING, "SqueezeExcite2d"), "latent_channels", *NO_WIDTHS, *TOO_WIDE),
    *rows(
        CHOOSING,
        "placement",
        *((value, "expected one of 'conv'") for value in ("sideways", "", 3, None, [])),
        *(
            (policy, "expected it to yield Spots")
            for policy in (
                other_spots("0"),
                other_spots(lambda graph: Spot("nowhere", 8, tuple(graph.nodes)[1:2])),
                other_spots(lambda graph: Spot("1.norm", 8, tuple(graph.nodes)[1:2])),
                other_spots(Spot("0", 8, ())),
                other_spots(Spot("0", 8, tuple(symbolic_trace(nn.ReLU()).graph.nodes)[:1])),
            )
        ),
    ),
    *rows(
        (*CHOOSING, "SqueezeExcite2d"), "init", *((value, "expected one of 'default'") for value in ("ones", 3, None, [], nn))
    ),
    *rows((*CHOOSING, "SqueezeExcite2d"), "bias", *NO_FLAGS),
    *rows((*CHOOSING, "SqueezeExcite2d"), "activation", *NO_FUNCTIONS),
    *rows((*CHOOSING, "SqueezeExcite2d"), "gate", *NO_FUNCTIONS),
    *rows(
        (*CHOOSING, "SqueezeExcite2d"),
        "gate",
        (Together(gate=nn.Tanh(), init="identity"), "the gate is 0.0 at zero"),
        (Together(gate=fails, init="identity"), "it raised RuntimeError; use init='default'"),
        (
            Together(gate=lambda x: torch.cat([x, x]), init="identity"),
            "expected a function of a tensor to one of the same shape",
        ),
    ),
    *rows(CHOOSING, "where", *((value, "expected a predicate") for value in (3, "", [], [3], True, {1: 2}))),
    *rows(CHOOSING, "where", *((value, "matches no Conv2d; the first is named '0'") for value in ("layr*", "a\nb", ["!9"]))),
    *rows(
        CHOOSING,
        "stages",
        *((value, 'expected "last", a number from 0 on') for value in (1.0, True, "", [], [None], {0: 1}, nn, ["last", 2.5])),
        *((value, "there are 2: 0 (0 to 1.conv), 1 (2.conv)") for value in (2, -3, [0, 7], 10**30)),
        *(
            (value, "'layer4': no module of this name holds a Conv2d; stages are 0 (0 to 1.conv), 1")
            for value in ("layer4", [0, "layer4"])
        ),
    ),
    *rows(CHOOSING, "necks", *((value, "True for convs of necks and decoders alone") for value in (1, 0, "yes", [], nn))),
    *rows(
        CHOOSING,
        "overrides",
        (["layer4"], "expected a dict from glob patterns"),
        ({3: {}}, "overrides[3]"),
        ({"0": 3}, "overrides['0']=3: expected, for a glob pattern, a dict of"),
        ({"0": {"min_channels": 3}}, "expected, for a glob pattern, a dict of"),
        ({"0": {"gate": "nope"}}, "overrides['0']: gate='nope'"),
        ({"0": {"latent_channels": 0}}, "overrides['0']: latent_channels=0"),
        ({"9": {"bias": True}}, "'9' matches no Conv2d; the first is named '0'"),
    ),
    *rows(
        CHOOSING,
        "block",
        *((value, "a factory channels -> nn.Module") for value in (3, "cbamm", "", [])),
        (fails, "a factory channels -> nn.Module, and for 8 it failed: RuntimeError: on purpose"),
        (nn.ReLU(), "a factory channels -> nn.Module, and for 8 it failed: TypeError"),
        (lambda channels: None, "it made a NoneType"),
        (lambda channels: nn.Conv2d(channels, 4, 1), "at '0', (1, 4, 64, 64) comes instead of (1, 8, 64, 64)"),
        (lambda channels: nn.AvgPool2d(2), "returns a tensor of its input's shape"),
        (Together(block=nn.Identity, bias=True), "bias: is for se_fx's own block, and not for block="),
    ),
    *rows(
        CHOOSING,
        "gate",
        (lambda x: x.sum(1), "returns a tensor of its input's shape"),
        (lambda x: torch.cat([x, x], 1), "returns a tensor of its input's shape"),
    ),
    *rows(CHOOSING, "placement", (fails, "a policy (graph, root) -> spots, and it failed: RuntimeError: on purpose")),
    *rows(
        CHOOSING, "placement", *((each, "a policy (graph, root) -> spots, and it failed") for each in (nn.ReLU, lambda *_: 3))
    ),
    *rows(CHOOSING, "where", (fails, "failed: RuntimeError: on purpose"), (nn.ReLU, "failed: TypeError")),
    *rows(CHOOSING, "where", (lambda name, module: np.ones(2), "failed: ValueError: The truth value of an array")),
    *rows(
        ("transform", "apply_squeeze_excite"),
        "plan",
        (Together(plan=PLAN, gate="hardsigmoid"), "a plan fixes all options already"),
    ),
    *rows(
        ("transform", "apply_squeeze_excite"),
        "plan",
        *(({"version": 1}, "plan=dict: expected a Plan"), ([], "plan=list"), ("p.json", "plan=str")),
    ),
    *rows(
        REPLAYING,
        "seed",
        *((value, "expected an integer from 0 to 2**64 - 1, or None") for value in (-1, 2**64, True, 1.0, "0", math.nan, [0])),
    ),
    *rows(CHOOSING, "min_chanels", (64, "there is no such option; did you mean 'min_channels'?")),
    *rows(CHOOSING, "foo", (64, "there is no such option; expected one of")),
    *rows(
        "apply_squeeze_excite",
        "optimizers",
        *(
            (value, "expected a torch.optim.Optimizer, or several, and got")
            for value in ("sgd", 3, [OPTIMIZERS[0], None], torch.optim.SGD, MODEL.parameters())
        ),
    ),
    # the block
    *rows(
        "SqueezeExcite2d",
        "num_features",
        *((value, "expected the number of channels, an integer from 1") for value in (0, 2.5, True, None, "8", 10**30, [8])),
    ),
    *rows(
        "SqueezeExcite2d.set_extra_state",
        "state",
        *((value, "expected the numbers that a SqueezeExcite2d has written") for value in (None, 3, "x", [], torch.zeros(3))),
    ),
    *rows("SqueezeExcite2d", "device", *NO_DEVICES),
    *rows("SqueezeExcite2d", "dtype", *NO_DTYPES),
    # plans
    *rows("Site", "name", *((value, "expected str") for value in (None, 3, b"0"))),
    *rows("Site", "channels", *((value, "expected int from 1 to 2**20") for value in (None, "8", 0, -1, 8.0, True, 10**12))),
    *rows("Site", "latent_channels", *((value, "expected int from 1 to 2**20") for value in ("8", 0, 0.5, True, 10**12))),
    *rows("Site", "latent_channels", (1025, "at most 1024"), (None, "expected a width, or a block of others")),
    *rows("Site", "block", (3, "expected str"), ("eca", "expected a width, or a block of others")),
    *rows("Site", "bias", (1, "expected bool"), (None, "expected bool")),
    *rows("Plan", "sites", *((value, "expected a tuple of Sites") for value in (None, [], 3, "x", ("0",), (se_fx.Site,)))),
    *rows("Plan", "sites", (PLAN.sites * 2, "expected each site once, and got '0' twice")),
    *rows(
        "Plan.from_dict",
        "data",
        *(
            (value, "expected what Plan.to_dict() returns, of version 1, and got version None")
            for value in (None, [], {}, "x", nn)
        ),
        *(({"version": value, "sites": []}, "of version 1, and got version") for value in (2, 0, True, 1.0, "1", None, [])),
        ({"version": 2}, "upgrade se_fx if a later one has saved it"),
        ({"version": 1}, "plan['sites']: expected a list of sites"),
    ),
    *rows("Plan.within", "flops", *NO_BUDGETS),
    *rows("Plan.within", "params", *NO_BUDGETS),
    *rows("Plan.within", "bytes", *NO_BUDGETS),
    *rows("Plan.within", "by", *((value, "expected None, or 'score'") for value in ("scores", 3, [], nn))),
    *rows("Plan.within", "by", (Together(by="score", params=1), "this plan's sites have no scores")),
    # scores
    *rows("score", "model", *NO_MODELS, (REWRITTEN, "it has a block at '0' already")),
    *rows("score", "plan", *((value, "expected a Plan, such as se_fx.plan(model) returns") for value in (None, 3, {}, []))),
    *rows("score", "plan", (se_fx.Plan((se_fx.Site("9", 8, 2),)), "'9' does not fit: Sequential has no such Conv2d")),
    *rows("score", "batches", *((value, "expected batches") for value in (3, None, X, "x", {"x": X}))),
    *rows("score", "batches", ([], "expected at least one batch with a sample"), ([X], "expected pairs of inputs and targets")),
    *rows("score", "batches", ([(X, X, X)], "expected pairs of inputs and targets"), ([(3, X)], "batches: batch=int")),
    *rows("score", "loss", *((value, "expected a function of outputs and targets") for value in (None, 3, "mse"))),
    *rows("score", "loss", (fails, "loss: it failed"), (lambda out, target: out, "expected a single number")),
    *rows("score", "saliency", *((value, "expected one of 'first_order', 'fisher'") for value in ("taylor", 3, None, []))),
    *rows("score", "progress", *NO_FLAGS),
    *rows("Plan.within", "flops", (Together(), "expected a budget, flops=, params= or bytes=")),
    *rows(
        ("Plan.only", "Plan.without"),
        "patterns",
        *((value, "matches no site of this plan") for value in ("9", "", None, 3, nn)),
    ),
    # reports, profiles, machines
    *rows("Report.to_html", "path", *NO_PATHS),
    *rows(("save_blocks", "load_blocks"), "path", *NO_PATHS, (".", "'.': can't be "), ("no/file", "can't be ")),
    *rows("load_blocks", "path", (__file__, "expected a file of se_fx.save_blocks, with a header of at most 16,777,216 bytes")),
    *rows("GateProfile.plot", "path", *NO_PATHS, ("gates.docx", "expected an ending"), ("gates", "expected an ending")),
    *rows("Report.estimate", "machine", *((value, "se_fx.measure_machine()") for value in (None, 3, "cpu", se_fx.Machine))),
    *rows("Machine.seconds", "operators", (None, "expected the operators of a report"), (3, "expected the operators")),
    *rows(
        ("measure_machine", "bench"), "device", *NO_DEVICES, ("meta", "expected 'cpu', or a CUDA device"), ("xla", "expected")
    ),
    *rows(("measure_machine", "bench"), "dtype", *NO_DTYPES),
    *rows("measure_machine", "dtype", (None, "expected a floating-point dtype")),
    # gates
    *rows(
        "profile_gates",
        "batches",
        *((value, "expected batches; for a single one, batches=[batch]") for value in (None, 3, X, "x", {"x": X})),
        ([], "expected at least one batch"),
        ([3], "batch=int: expected a tensor"),
        ([(X, torch.tensor([1, 2, 3]))], "3 labels came with gates of 2 samples"),
        *(([value], words) for value, words in UNCALLABLE if not isinstance(value, dict)),
    ),
    *rows("profile_gates", "rewritten", (FOREIGN, "it has no block of se_fx's own")),
    *rows(("profile_gates", "fold_gates", "bench"), "progress", *NO_FLAGS),
    *rows(
        "fold_gates",
        "profile",
        ({}, "profile=dict: expected a GateProfile; call se_fx.profile_gates"),
        (None, "profile=NoneType"),
        (Together(rewritten=NARROW, profile=PROFILE), "site '0' does not fit: the profile has 8 channels there, this model 4"),
        (Together(rewritten=FOREIGN, profile=PROFILE), "site '0' does not fit: this model has no block of se_fx's own there"),
    ),
    *rows(
        "fold_gates",
        "tolerance",
        *(
            (value, "expected how far gates may vary, a number >= 0")
            for value in (-0.1, math.nan, math.inf, True, "0.02", None, [])
        ),
    ),
    *rows(
        "fold_gates",
        "held_out",
        *((value, "expected batches; for a single one, held_out=[batch]") for value in (3, X, "x", {"x": X}, nn.ReLU)),
        ([], "expected at least one batch"),
        (iter([]), "expected at least one batch"),
        ([3], "batch=int: expected a tensor"),
        *(([value], words) for value, words in UNCALLABLE if not isinstance(value, dict)),
    ),
    # inference
    *rows(
        "optimize_for_inference",
        "rewrites",
        (["hoist_squeeze"], "did you mean 'hoist_squeezes'"),
        *((value, "expected names in a list") for value in ("fold_norms", 3, True, nn.ReLU)),
        *(([value], "expected some of 'blends'") for value in (3, None, [], nn.ReLU)),
    ),
    *rows(
        "optimize_for_training",
        "rewrites",
        (["recompute_product"], "did you mean 'recompute_products'"),
        *((value, "expected names in a list") for value in ("recompute_products", 3, True, nn.ReLU)),
        *(([value], "expected some of 'linear_gates'") for value in (3, None, [], nn.ReLU)),
        (["moments"], "rewrites: 'moments' rounds in another way; pass exact=False"),
    ),
    *rows("optimize_for_training", "exact", *((value, "exact=") for value in (1, None, "no", [], nn.ReLU))),
    *rows("optimize_for_inference", "target", *((value, "target=") for value in ("onnx", "", 3, True, nn.ReLU, ["export"]))),
    # benchmarks
    *rows(
        "bench",
        "models",
        ({}, "models={}: expected modules by name, the baseline first, or one model"),
        ([MODEL], "models=list: expected modules by name"),
        (MODEL, "models=Sequential: expected modules by name, the baseline first, or one model that se_fx.transform"),
        (np.zeros(3), "models=ndarray"),
        ({"a": MODEL, "b": 3}, "models: 'b' is of type int"),
        ({1: MODEL}, "models: 1 is of type Sequential"),
        ({"a": Uncopied(3, 8, 1)}, "models['a']: can't be copied to cpu. RuntimeError: holds a file"),
        (Together(models={"a": MODEL, "b": FROZEN}, training=True), "models['b']: a training step (eager) failed with"),
        (Together(models={"a": META}, device="cpu"), "models['a']: can't be copied to cpu"),
    ),
    *rows("bench", "device", (Together(models={"a": FROZEN, "b": META}), "device: the models' tensors are on cpu, meta")),
    *rows("bench", "device", (Together(models={"a": META}), "device='meta': expected 'cpu'")),
    *rows(
        "bench",
        "example_inputs",
        *NO_INPUTS,
        (None, "example_inputs=NoneType: expected a tensor"),
        ((), "expected a tensor with samples in dimension 0, got no inputs"),
        (X[:0], "expected a tensor with samples in dimension 0, got inputs (0, 3, 8, 8)"),
        (X[:, :2], "models['a']: inference (eager) failed with inputs (1, 2, 8, 8); check example_inputs"),
    ),
    *rows(
        "bench",
        "batch_sizes",
        *((value, "expected integers >= 1, such as (1, 8)") for value in ((), (1, 0), 8, (True,), "8", None, [1.5], iter([1]))),
    ),
    *rows("bench", "compiled", *((value, 'expected False, True or "both"') for value in ("maybe", None, 1, torch.ones(2), []))),
    *rows(
        "bench",
        "backend",
        *((value, "expected a backend of torch.compile") for value in ("no_such", None, 3, "", nn, {"a": "no_such"}, {"a": 3})),
    ),
    *rows(
        "bench", "backend", ({"b": "eager"}, "'b' is not among the models, ['a']"), ("eager", 'pass compiled=True or "both"')
    ),
    *rows(
        "bench",
        "freezing",
        *NO_FLAGS,
        (True, 'freezes weights in compiled code; pass compiled=True or "both"'),
        (Together(freezing=True, compiled=True, training=True), "training changes; pass training=False"),
    ),
    *rows("bench", "training", *NO_FLAGS, (Together(models={"a": FROZEN}, training=True), "pass training=False")),
    *rows("bench", "channels_last", *NO_FLAGS),
    *rows(
        "bench",
        "autocast",
        *((value, "expected None, torch.bfloat16 or torch.float16") for value in (torch.float32, True, "b")),
    ),
    *rows("bench", "rounds", *((value, "expected an integer >= 1") for value in (0, -1, 1.5, True, None, "3", math.inf))),
    *rows(
        "bench",
        "min_seconds",
        *((value, "expected seconds, a number >= 0") for value in (-1, math.nan, math.inf, None, True, "1")),
    ),
]


#: What messages call the only argument, where not by its name.
NAMED = {"Plan.from_dict": "plan"}


def state() -> dict[str, Any]:
    of_rewritten = {f"rewritten {key}": value for key, value in world(REWRITTEN, []).items() if key.startswith("module")}
    return {**world(MODEL, OPTIMIZERS), **of_rewritten}


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_of_every_function(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    function, good = CALLS[name]
    faults = []
    before = state()
    for _, argument, value, words in (row for row in ROWS if row[0] == name):
        given = {**good, **(value if isinstance(value, Together) else {argument: value})}
        label = f"{name}({argument}={value!r:.60})"
        try:
            if name in ("Plan.only", "Plan.without", "Plan.from_dict"):
                function(value)
            else:
                function(**given)
            faults.append(f"{label}: accepted")
        except se_fx.SqueezeExciteError as error:
            message = str(error)
            if words not in message or NAMED.get(name, argument) not in message or "\n" in message or len(message) > 600:
                faults.append(f"{label}: {message}")
        except Exception as error:
            faults.append(f"{label}: {type(error).__name__}: {error}")
        if changed := difference(before, state()):
            faults.append(f"{label} changed {changed}")
            before = state()
    assert not faults, "\n".join(faults)
    assert not list(tmp_path.iterdir())
