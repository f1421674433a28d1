"""Models leave the process: `torch.export`, ONNX, AOTInductor, checkpoints and pickles; for all three kinds of result.

Exported programs run ATen's kernels as the model does, some of them decomposed: fp32's default tolerances. onnxruntime and
AOTInductor have kernels of their own, which add up in another order; on networks with many layers, these differences grow.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
from test_copies import KINDS, WAYS, Split, X, hybrid
from torch import Tensor, nn
from trained import resnet10

import se_fx

pytestmark = pytest.mark.integration

BATCH = torch.export.Dim("batch", min=1)
BATCHES = (1, 2, 5)


FEW = ("conv, default", "residual, identity")  # each placement and each start once


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[*FEW, "in place"])
def way(request: pytest.FixtureRequest) -> str:
    return request.param


def inputs(model: nn.Module, x: Tensor) -> tuple[Tensor | None, ...]:
    """`Split` has an optional argument, which exporters want to be given."""
    return (x, None) if isinstance(model, Split) else (x,)


def export(model: nn.Module, x: Tensor = X, dynamic: bool = True, **options: Any) -> torch.export.ExportedProgram:
    args = inputs(model, x)
    shapes = ({0: BATCH}, *[None] * (len(args) - 1)) if dynamic else None
    return torch.export.export(model, args, dynamic_shapes=shapes, **options)


def assert_onnx_close(
    program: torch.export.ExportedProgram, model: nn.Module, x: Tensor, path: Path, **tolerances: float
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own, about itself
        torch.onnx.export(program, f=path, dynamo=True, verbose=False)
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path)
    (name,) = [each.name for each in session.get_inputs()]
    for batch in BATCHES:
        larger = x[:1].repeat(batch, 1, 1, 1) + torch.randn(batch, 1, 1, 1)
        (found,) = session.run(None, {name: larger.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(larger), **tolerances)


# ----------------------------------------------------------------------------------------------------------- torch.export
@torch.no_grad()
def test_torch_export_with_any_batch(kind: str, way: str) -> None:
    original = KINDS[kind]().eval()
    model = WAYS[way](original)
    program = export(model)
    assert set(program.state_dict) == {key for key in model.state_dict() if not key.endswith("._extra_state")}
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    exported = torch.export.load(file).module()
    for batch in BATCHES:
        x = torch.randn(batch, *X.shape[1:])
        expected = model(x)
        torch.testing.assert_close(exported(*inputs(model, x)), expected)
        if "identity" in way:
            assert torch.equal(expected, original(x))


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_torch_export_of_one_shape(kind: str, strict: bool) -> None:
    model = WAYS["conv, default"](KINDS[kind]()).eval()
    exported = export(model, dynamic=False, strict=strict).module()
    torch.testing.assert_close(exported(*inputs(model, X)), model(X))


def test_a_program_exported_in_training_mode_trains(kind: str) -> None:
    model = WAYS["conv, default"](KINDS[kind]()).train()
    program = export(model).module()  # it has parameters and buffers of its own
    results = []
    for each in (model, program):
        torch.manual_seed(1)
        output = each(*inputs(model, X))
        output.square().mean().backward()
        results.append((output, {name: p.grad for name, p in each.named_parameters()}, dict(each.named_buffers())))
    torch.testing.assert_close(*results)
    assert all(gradient is not None for gradient in results[1][1].values())
    changed = [name for name, buffer in program.named_buffers() if name.endswith("running_mean") and buffer.abs().sum() > 0]
    assert bool(changed) == (kind == "whole graph")
    with pytest.raises(NotImplementedError, match=r"Calling eval\(\) is not supported"):
        program.eval()  # one mode's graph was exported


@torch.no_grad()
def test_jit_trace(kind: str, way: str) -> None:
    model = WAYS[way](KINDS[kind]()).eval()
    torch.testing.assert_close(torch.jit.trace(model, X)(X), model(X))


# ------------------------------------------------------------------------------------------------------ other runtimes
@pytest.mark.parametrize("few", FEW)
@torch.no_grad()
def test_onnx_with_any_batch(kind: str, few: str, tmp_path: Path) -> None:
    model = WAYS[few](KINDS[kind]()).eval()
    assert_onnx_close(export(model), model, X, tmp_path / "model.onnx")


@torch.no_grad()
def test_aot_inductor_package_with_any_batch(tmp_path: Path) -> None:
    class All(nn.Module):
        """All kinds in one, since what takes time is each start of the C++ compiler."""

        def __init__(self) -> None:
            super().__init__()
            self.kinds = nn.ModuleList(WAYS["conv, default"](make()) for make in KINDS.values())

        def forward(self, x: Tensor) -> list[Tensor]:
            return [kind(x) for kind in self.kinds]

    model = All().eval()
    path = torch._inductor.aoti_compile_and_package(export(model), package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    for batch in BATCHES:
        x = torch.randn(batch, *X.shape[1:])
        torch.testing.assert_close(loaded(x), model(x))


# ----------------------------------------------------------------------------------------------- networks of torchvision, timm
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "resnet10": (resnet10, {"placement": "residual", "min_channels": 64}),
    "timm's test_resnet": (lambda: timm.create_model("test_resnet", num_classes=10), {"min_channels": 16}),
    "timm's hybrid": (hybrid, {"min_channels": 16}),
}
IMAGES = torch.randn(2, 3, 32, 32)


def network(name: str) -> nn.Module:
    make, options = NETWORKS[name]
    return se_fx.transform(make(), latent_channels=8, **options).eval()


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_networks_of_others(name: str, tmp_path: Path) -> None:
    model = network(name)
    program = export(model, IMAGES)
    exported = program.module()
    for x in (IMAGES[:1], IMAGES.repeat(2, 1, 1, 1)):
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)  # a tenth of what other kernels get
    assert_onnx_close(program, model, IMAGES, tmp_path / "model.onnx", rtol=1e-3, atol=1e-5)


def gcresnext() -> nn.Module:
    """timm's gcresnext26ts with one unit in each of two stages."""
    config = timm.models.byobnet.model_cfgs["gcresnext26ts"]
    return timm.models.byobnet.ByobNet(
        dataclasses.replace(config, blocks=[dataclasses.replace(b, d=1) for b in config.blocks[:2]])
    )


def regnety() -> nn.Module:
    """timm's regnety_002 with 7 units instead of 13."""
    config = timm.models.regnet.model_cfgs["regnety_002"]
    return timm.models.regnet.RegNet(dataclasses.replace(config, depth=7))


OPTIMISED: dict[str, Callable[[], nn.Module]] = {
    "seresnet10": lambda: timm.create_model("seresnet18", layers=(1, 1, 1, 1)),
    "regnety": regnety,
    "mobilenetv3_small_050": lambda: timm.create_model("mobilenetv3_small_050"),
    "gcresnext": gcresnext,
}


@pytest.mark.parametrize("target", [None, "export"])
@pytest.mark.parametrize("name", OPTIMISED)
def test_programs_of_optimised_networks_are_operators_on_tensors_alone(name: str, target: str | None) -> None:
    """All else, such as asking for the type of a sum, breaks the graph where they are compiled."""
    model, x = OPTIMISED[name]().eval(), torch.randn(1, 3, 32, 32)
    options = {} if target is None else {"target": target}
    program = torch.export.export(se_fx.optimize_for_inference(model, **options), (x,))
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    names = {str(function) for function in called} - {"<built-in function getitem>"}
    assert names
    assert all("Tensor" in str(function._schema.returns[0].type) for function in called if str(function) in names), names
    compiled = torch.compile(program.module(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), program.module()(x))


def test_googlenet_exports_in_both_modes() -> None:
    model = se_fx.transform(torchvision.models.googlenet(init_weights=False, num_classes=10), min_channels=192, init="identity")
    images = torch.randn(3, 3, 32, 32)
    for training in (False, True):
        model.train(training)
        program = export(model, images[:2]).module()
        torch.manual_seed(1)
        expected = model(images)
        torch.manual_seed(1)
        found = program(images)
        assert isinstance(found, Tensor) != training  # heads are auxiliary to training
        torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-4, atol=1e-5)


def test_what_optimising_leaves_of_a_conv_can_be_printed(lite0: nn.Module) -> None:
    """Exporters print the model. Lite0's convs have a child, for padding, that stays when their weights have gone elsewhere."""
    fast = se_fx.optimize_for_inference(se_fx.transform(lite0, where="*_depthwise_conv", min_channels=192))
    assert "Conv2dStaticSamePadding" in repr(fast)


# ----------------------------------------------------------------------------------------------------- saved and loaded
def test_checkpoints_load_into_a_model_made_from_the_plan(kind: str, way: str) -> None:
    model = WAYS[way](KINDS[kind]()).eval()
    file = io.BytesIO()
    torch.save({"plan": se_fx.Plan.of(model).to_dict(), "state_dict": model.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert json.loads(json.dumps(loaded["plan"])) == loaded["plan"]
    plan = se_fx.Plan.from_dict(loaded["plan"])
    again = (WAYS[way](KINDS[kind]()) if way == "in place" else se_fx.transform(KINDS[kind](), plan)).eval()
    assert se_fx.Plan.of(again).sites == plan.sites
    assert not torch.equal(again(X), model(X))
    again.load_state_dict(loaded["state_dict"])
    assert torch.equal(again(X), model(X))


LOAD_AND_RUN = """
import sys, torch, se_fx
threads, *paths = sys.argv[1:]
torch.set_num_threads(int(threads))
for path in paths:
    model, x = torch.load(path, weights_only=False)
    with torch.no_grad():
        evaluated = model.eval()(x)
    torch.manual_seed(1)
    trained = model.train()(x)
    original = se_fx.remove(model)
    torch.save((evaluated, trained, str(se_fx.report(model)), type(original).__name__, list(original.state_dict())), path)
"""


def test_whole_models_load_in_a_fresh_interpreter(tmp_path: Path) -> None:
    originals = {f"{kind}, {way}": (make(), rewrite, X) for kind, make in KINDS.items() for way, rewrite in WAYS.items()}
    models = {name: (copy.deepcopy(original), rewrite(original), x) for name, (original, rewrite, x) in originals.items()}
    models |= {name: (NETWORKS[name][0](), network(name), IMAGES) for name in NETWORKS}
    expected = {}
    for number, (original, model, x) in enumerate(models.values()):
        path = tmp_path / str(number)
        torch.save((model, x), path)
        with torch.no_grad():
            evaluated = model.eval()(x)
        torch.manual_seed(1)
        about = str(se_fx.report(model)), type(original).__name__, list(original.state_dict())
        expected[str(path)] = (evaluated, model.train()(x), *about)
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", LOAD_AND_RUN, str(torch.get_num_threads()), *expected]
    subprocess.run(command, env=os.environ | paths, check=True)
    for path, (*outputs, report, kind, keys) in expected.items():
        *found, found_report, found_kind, found_keys = torch.load(path)
        assert all(torch.equal(a, b) for a, b in zip(found, outputs, strict=True))
        assert (found_report, found_kind, found_keys) == (report, kind, keys)
